from __future__ import annotations

import pytest
import torch

from grasp.evaluation.generation import first_logits, time_generation
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 120, "new_tokens": 9}, "120 prompt tokens and 9 new tokens .* 128 positions"),
    ],
)
def test_impossible_generation_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_generation(tiny_model("llama"), **{"prompt_tokens": 4, "new_tokens": 2, **options})
