from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import CalibrationError
from grasp.evaluation.perplexity import PerplexityResult, Window, cut_windows, perplexity
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from tests.tiny_models import tiny_batches, tiny_model

BOS = 1


def text(length: int) -> Tensor:
    return tiny_batches(1, batch_size=1, length=length)[0].flatten()


@torch.no_grad()
def naive_losses(model: PreTrainedModel, tokens: Tensor, window: int, stride: int, bos: int | None) -> list[float]:
    """Token by token: the window that scores it is the first one, ``stride`` after another, that reaches it."""
    prefix = [] if bos is None else [bos]
    room = window - len(prefix)
    losses = []
    for t in range(len(tokens)):
        begin = next(b for b in range(0, len(tokens), stride) if t < b + room)
        context = prefix + tokens[begin:t].tolist()
        if context:
            probabilities = torch.softmax(model(torch.tensor([context])).logits[0, -1].double(), dim=0)
            losses.append(-math.log(probabilities[tokens[t]]))
    return losses


def assert_same(got: PerplexityResult, losses: Sequence[float]) -> None:
    assert got.tokens == len(losses)
    assert got.nonfinite == 0
    assert got.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [
        (2, 8, None),
        (7, 8, None),
        (8, 8, None),
        (9, 8, None),  # the last window has one token
        (37, 8, None),
        (37, 8, 3),
        (37, 8, 1),
        (36, 8, 4),
        (20, 2, None),
    ],
)
def test_equals_the_definition(length: int, window: int, stride: int | None, batch_size: int, bos: int | None) -> None:
    model, tokens = tiny_model("llama"), text(length)
    result = perplexity(model, tokens, window=window, stride=stride, batch_size=batch_size, bos_token_id=bos)
    room = window - (bos is not None)
    assert_same(result, naive_losses(model, tokens, window, stride or room, bos))


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt", "gpt_neox", "mixtral"])
def test_equals_the_definition_for_other_families(family: str) -> None:
    model, tokens = tiny_model(family), text(41)
    result = perplexity(model, tokens, window=16, stride=11, batch_size=2, bos_token_id=BOS)
    assert_same(result, naive_losses(model, tokens, 16, 11, BOS))


def test_long_windows_are_scored_in_pieces_without_a_seam() -> None:
    model, tokens = tiny_model("llama", max_position_embeddings=1024), text(700)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
        expected = nn.functional.cross_entropy(logits[:-1], tokens[1:])
    result = perplexity(model, tokens, window=1024)
    assert (result.tokens, result.windows) == (699, 1)
    assert result.nll == pytest.approx(expected.item(), rel=1e-5)


def test_works_on_compressed_models_and_on_models_without_some_layers() -> None:
    model, tokens = tiny_model("qwen2"), text(30)
    name = "model.layers.2.mlp.down_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(5)))
    remove_layers_(model, [1])
    assert_same(perplexity(model, tokens, window=9), naive_losses(model, tokens, 9, 9, None))


def test_accepts_lists_and_rows() -> None:
    model, tokens = tiny_model("llama"), text(20)
    expected = perplexity(model, tokens)
    assert perplexity(model, tokens.tolist()) == perplexity(model, tokens[None]) == expected


def test_more_context_is_what_a_smaller_stride_buys() -> None:
    assert cut_windows(10, 4, 4, first_needs_context=True) == [Window(0, 1, 4), Window(4, 5, 8), Window(8, 9, 10)]
    assert cut_windows(10, 4, 2, first_needs_context=True) == [
        Window(0, 1, 4),
        Window(2, 4, 6),
        Window(4, 6, 8),
        Window(6, 8, 10),
    ]
    assert cut_windows(9, 4, 4, first_needs_context=False) == [Window(0, 0, 4), Window(4, 4, 8), Window(8, 8, 9)]
    assert cut_windows(9, 4, 4, first_needs_context=True)[-1] == Window(4, 5, 8)


def test_the_window_is_no_longer_than_the_model_has_positions() -> None:
    model = tiny_model("opt", max_position_embeddings=16)  # learned positions: one more would be an index error
    result = perplexity(model, text(40), window=1024)
    assert (result.windows, result.tokens) == (3, 37)
    assert (result.window, result.stride) == (16, 16)
    with_bos = perplexity(model, text(40), window=1024, bos_token_id=BOS)
    assert (with_bos.window, with_bos.stride) == (16, 15)
    assert perplexity(model, text(40), window=1024, stride=5).stride == 5


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), r"shape \(T,\) or \(1, T\), got \(2, 8\)"),
        (torch.zeros(1, 1, 8, dtype=torch.int64), r"got \(1, 1, 8\)"),
        (torch.tensor(5), r"got \(\)"),
        (torch.zeros(8), "token ids must be integers, got torch.float32"),
        ([1.0, 2.5], "token ids must be integers, got torch.float32"),
        ([True, False], "token ids must be integers, got torch.bool"),
    ],
)
def test_what_is_no_row_of_integers_is_refused(tokens: Tensor | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tokens)


@pytest.mark.parametrize(("value", "perplexity_is"), [(float("nan"), math.isnan), (float("-inf"), math.isinf)])
def test_nonfinite_losses_are_counted_and_not_dropped(value: float, perplexity_is: object) -> None:
    model, tokens = tiny_model("llama"), text(20)
    rare = int(tokens[13])

    def spoil(_: nn.Module, __: object, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., rare] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    result = perplexity(model, tokens, window=8)
    assert result.tokens == 17
    hit = [t for t in range(20) if t % 8 and (math.isnan(value) or tokens[t] == rare)]
    assert result.nonfinite == len(hit)
    assert callable(perplexity_is)
    assert perplexity_is(result.perplexity)
    assert perplexity_is(result.nll)


def test_a_perplexity_beyond_floating_point_is_infinite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = perplexity(model, text(20))
    assert math.isfinite(result.nll)
    assert result.perplexity == math.inf
    assert result.nonfinite == 0


def test_half_precision_logits_are_scored_in_fp32() -> None:
    model, tokens = tiny_model("llama", torch.bfloat16), text(50)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1].float(), tokens[1:])
    assert perplexity(model, tokens).nll == pytest.approx(expected.item(), rel=1e-6)


def test_the_model_keeps_its_mode_and_reports_progress() -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    steps: list[tuple[str, int, int]] = []
    perplexity(model, text(37), window=8, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]
    assert model.model.layers[1].training
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("bos", [None, BOS])
def test_a_text_without_a_token_to_predict_is_refused(length: int, bos: int | None) -> None:
    with pytest.raises(CalibrationError, match=f"has {length} tokens; perplexity needs at least 2"):
        perplexity(tiny_model("llama"), text(10)[:length], bos_token_id=bos)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "between 1 and the 8 tokens of a window, or None; got 0"),
        ({"stride": 9}, "between 1 and the 8 tokens of a window, or None; got 9"),
        ({"stride": 8, "bos_token_id": BOS}, "between 1 and the 7 tokens"),
        ({"window": 1}, "window must be at least 2 positions, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_windows_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), text(30), **{"window": 8, **options})
