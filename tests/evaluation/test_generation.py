from __future__ import annotations

from functools import partial

import pytest
import torch

from grasp.evaluation.generation import CompiledSteps, first_logits, time_generation
from tests.tiny_models import tiny_model


def test_decoding_takes_every_step_from_one_token_and_the_cache() -> None:
    model = tiny_model("gpt2")
    calls: list[tuple[int, ...]] = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    model.generation_config.eos_token_id = list(range(97))  # whatever comes would end a text
    time = time_generation(model, prompt_tokens=10, new_tokens=4, batch_size=2)
    assert calls == [(2, 10, 32)] + 4 * [(2, 1, 32)]
    assert 0 < time.prefill_s < time.first_token_s
    assert len(time.steps_s) == 4
    assert time.decode_s == sum(time.steps_s) > 0
    assert time.kv_cache_bytes == 2 * 14 * 3 * 2 * 32 * 4  # sequences, tokens, layers, keys and values, features, fp32


def test_first_logits_are_those_of_the_whole_text_at_once() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(97, (2, 10), generator=generator)
    with torch.no_grad():
        expected = model(torch.cat([prompt, prompt[:, :1]], dim=1)).logits[:, -2:].transpose(0, 1)
    torch.testing.assert_close(first_logits(model, prompt_tokens=10, batch_size=2), expected, rtol=1e-4, atol=1e-5)


def test_compiled_steps_give_the_logits_of_the_model_and_use_their_cache_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces, and generates no code
    model = tiny_model("gemma3")
    steps = CompiledSteps(model)
    sizes = {"prompt_tokens": 6, "new_tokens": 3, "batch_size": 2, "depth": 4}
    expected = first_logits(model, **sizes)
    for _ in range(2):
        torch.testing.assert_close(first_logits(model, **sizes, compiled=steps), expected, rtol=1e-4, atol=1e-5)
        time = time_generation(model, **sizes, compiled=steps)
    assert len(time.steps_s) == 3
    assert len(steps._caches) == 1


def test_compiled_steps_of_models_of_one_class_and_of_two_sizes_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for activation in ("silu", "gelu"):
        model = tiny_model("llama", hidden_act=activation, num_hidden_layers=1)
        steps = CompiledSteps(model)
        for batch_size in (2, 3):
            sizes = {"prompt_tokens": 5, "batch_size": batch_size}
            logits = first_logits(model, **sizes, compiled=steps)
            torch.testing.assert_close(logits, first_logits(model, **sizes), rtol=1e-4, atol=1e-5)


def test_tokens_before_the_prompt_are_run_first() -> None:
    model = tiny_model("gpt2")
    calls: list[tuple[int, ...]] = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    time = time_generation(model, prompt_tokens=10, new_tokens=1, depth=7)
    assert calls == [(1, 7, 32), (1, 10, 32), (1, 1, 32)]
    assert time.kv_cache_bytes == 18 * 3 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        ({"prompt_tokens": 120, "new_tokens": 9}, "120 prompt tokens and 9 new tokens .* 128 positions"),
    ],
)
def test_impossible_generation_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_generation(tiny_model("llama"), **{"prompt_tokens": 4, "new_tokens": 2, **options})
