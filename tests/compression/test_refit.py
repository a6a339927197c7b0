from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from grasp.compression import refit
from grasp.compression.refit import refit_
from grasp.errors import NonFiniteError
from grasp.method import least_squares as solver
from grasp.method.least_squares import Moments, Products, least_squares
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import decoder, layer_targets
from tests.tiny_models import tiny_batches, tiny_model


def halved(family: str, layers: tuple[int, ...]) -> tuple:
    """A model whose linears of some layers keep half of their groups, the dense one, and the dense linears."""
    model = tiny_model(family, torch.float64)
    dense = copy.deepcopy(model)
    targets = [target for layer in layers for target in layer_targets(model, layer)[0]]
    for target in targets:
        groups = min(target.module.weight.shape) // 2
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(groups)))
    return model, dense, targets


def inputs_of(model: torch.nn.Module, name: str, tokens: list[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in tokens:
            model(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_left_factor_is_the_least_squares_solution_for_what_the_refitted_model_feeds_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "PRIORS", (1e-9,))
    model, dense, targets = halved(family, (0, 2))
    tokens = tiny_batches(4)
    refit_(model, [CalibrationBatch(t) for t in tokens], targets)
    for target in targets:
        x, seen = inputs_of(dense, target.name, tokens), inputs_of(model, target.name, tokens)
        module = model.get_submodule(target.name)
        bias = 0 if target.module.bias is None else target.module.bias
        wanted = dense.get_submodule(target.name)(x) - bias
        solution = torch.linalg.lstsq(seen @ module.Vh.mT, wanted).solution
        torch.testing.assert_close(module.U.detach(), solution.mT.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_other_sequence_is_one_part_of_the_cross_validation_however_sequences_are_batched(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[int, Products] = {}

    def recorded(U: Tensor, Vh: Tensor, weight: Tensor, moments: Moments, part: Products) -> Tensor:
        parts[id(Vh)] = part
        return least_squares(U, Vh, weight, moments, part)

    monkeypatch.setattr(refit, "least_squares", recorded)
    tokens = torch.cat(tiny_batches(3))
    padding, mask = torch.full((3, 4), 5), (torch.arange(16) < 12).expand(3, 16)
    padded = CalibrationBatch(torch.cat([tokens[:3], padding], dim=1), mask)
    for batches in ([CalibrationBatch(tokens)], [padded, CalibrationBatch(tokens[3:5]), CalibrationBatch(tokens[5:])]):
        model, dense, targets = halved(family, (0, 2))
        refit_(model, batches, targets)
        for target in targets:
            module = model.get_submodule(target.name)
            x, seen = (inputs_of(each, target.name, [tokens[1::2]]) for each in (dense, model))
            projected, part = seen @ module.Vh.mT, parts[id(module.Vh)]
            torch.testing.assert_close(part.gram, (projected.mT @ projected).detach(), rtol=1e-4, atol=1e-5)
            wanted = dense_weight(target.module) @ x.mT @ projected
            torch.testing.assert_close(part.wanted, wanted.detach(), rtol=1e-4, atol=1e-5)
            assert part.tokens == 3 * 12


def test_the_compressed_model_comes_closer_to_the_dense_one_on_other_text() -> None:
    model, dense, targets = halved("llama", (0, 1, 2))
    other = tiny_batches(4, seed=9)

    def distance() -> float:
        with torch.no_grad():
            return sum(float((model(t).logits - dense(t).logits).norm()) for t in other)

    before = distance()
    refit_(model, [CalibrationBatch(t) for t in tiny_batches(40)], targets)
    assert distance() < before


def test_a_sum_that_overflows_is_refused() -> None:
    model, _, targets = halved("llama", (1,))
    up = next(target for target in targets if target.name.endswith("up_proj"))
    with torch.no_grad():
        up.module.weight.mul_(1e160)  # the products of what it gives are infinite
    with pytest.raises(NonFiniteError, match=r"input covariance of model.layers.1.mlp.down_proj is NaN or infinite"):
        refit_(model, [CalibrationBatch(t) for t in tiny_batches(1)], targets)


def test_padding_counts_nothing() -> None:
    tokens = tiny_batches(1, batch_size=2, length=8)[0]
    padded = torch.cat([tokens, torch.full((2, 4), 5)], dim=1)
    mask = (torch.arange(12) < 8).expand(2, 12)
    factors = []
    for batch in (CalibrationBatch(tokens), CalibrationBatch(padded, mask)):
        model, _, targets = halved("llama", (1,))
        refit_(model, [batch], targets)
        factors.append([model.get_submodule(target.name).U.detach() for target in targets])
    for alone, with_padding in zip(*factors, strict=True):
        torch.testing.assert_close(alone, with_padding, rtol=1e-5, atol=1e-6)  # rotary angles are fp32


def test_dense_linears_are_passed_over_and_everything_else_is_left_as_it_was() -> None:
    model, _, targets = halved("llama", (1,))
    others = list(layer_targets(model, 0)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refit_(model, [CalibrationBatch(t) for t in tiny_batches(2)], [*others, *targets])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{target.name}.U" for target in targets}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in layer.__dict__ for layer in decoder(model).layers)


def test_an_interruption_leaves_the_low_rank_linears_in_place() -> None:
    model, _, targets = halved("llama", (0, 1))

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "refit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit_(model, [CalibrationBatch(t) for t in tiny_batches(1)], targets, progress=interrupt)
    assert all(isinstance(model.get_submodule(target.name), LowRankLinear) for target in targets)


def test_directions_that_no_input_has_stay_as_they_are() -> None:
    U, Vh, W = torch.randn(5, 3), torch.eye(3, 4), torch.randn(5, 4)
    x = torch.randn(50, 4) * torch.tensor([1.0, 1.0, 0.0, 1.0])
    got = least_squares(U, Vh, W, Moments(x.mT @ x, x.mT @ x, len(x)))
    torch.testing.assert_close(got[:, 2], U[:, 2])
    assert not torch.allclose(got[:, :2], U[:, :2])


def test_streams_in_bfloat16_give_nearly_the_same_factors_in_the_models_own_dtype() -> None:
    solved = []
    for dtype in (None, "bfloat16"):
        model, dense, targets = halved("llama", (0, 1))
        refit_(model, [CalibrationBatch(t) for t in tiny_batches(40)], targets, dtype=dtype)
        factors = [model.get_submodule(target.name).U.detach() for target in targets]
        assert all(U.dtype == torch.float64 for U in factors)
        for target in targets:  # neither the linears that were replaced nor what was not replaced has been rounded
            assert torch.equal(target.module.weight, dense.get_submodule(target.name).weight)
        assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
        solved.append(torch.cat([U.flatten() for U in factors]))
    exact, rounded = solved
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()
