"""The tasks of ``benchmarks.gpu.check`` that decode with a whole model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.check_report import LeftOut
from benchmarks.gpu.check_runner import Emit
from benchmarks.gpu.check_tasks import the_device
from grasp.bench.decoding import TOLERANCE, difference
from grasp.bench.providers import unfuse_
from grasp.evaluation.generation import first_logits, now, time_generation
from grasp.method.ranks import rank_for_retain_ratio
from grasp.model.dense import dense_shape
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import all_targets


@torch.inference_mode()
def eager(
    emit: Emit, *, config: Mapping[str, Any], retain_ratio: float, new_tokens: int = 32, without: Sequence[str] = ()
) -> None:
    """Tokens/s of a Llama of random weights: dense, all layers low-rank, and these as plain linears."""
    dense = _dense(config)
    low_rank = _low_rank(dense, retain_ratio)
    unfused = copy.deepcopy(low_rank)
    unfuse_(unfused)
    expected = first_logits(unfused, prompt_tokens=128)
    for name, model in {"dense": dense, "unfused": unfused, "low-rank": low_rank}.items():
        if name in without:
            continue
        emit({"kind": "step", "provider": name})
        apart = None if name != "low-rank" else difference(first_logits(model, prompt_tokens=128), expected)
        if apart is not None and not apart <= TOLERANCE[torch.bfloat16]:
            reason = f"logits differ by {apart:.1e} from those of plain linears"
            emit({"kind": "left_out", **asdict(LeftOut("model", 1, name, reason, wrong=True))})
            continue
        time_generation(model, prompt_tokens=128, new_tokens=4)
        times = time_generation(model, prompt_tokens=128, new_tokens=new_tokens)
        rate = len(times.steps_s) / sum(times.steps_s)
        line = {"tokens_per_s": rate, "prefill_ms": 1e3 * times.prefill_s, "logits_difference": apart}
        emit({"kind": "model", "provider": name, "layers": config["num_hidden_layers"], **line})


@torch.inference_mode()
def static_cache(
    emit: Emit,
    *,
    config: Mapping[str, Any],
    retain_ratio: float | None,
    new_tokens: int = 32,
    without: Sequence[str] = (),
) -> None:
    """Tokens/s of ``generate`` with a static cache, for which transformers compiles the model with CUDA graphs.

    The model is low-rank, or dense if ``retain_ratio`` is ``None``.
    """
    name = f"{'dense' if retain_ratio is None else 'low-rank'}, static cache"
    if name not in without:
        emit({"kind": "step", "provider": name})
        model = _dense(config) if retain_ratio is None else _low_rank(_dense(config), retain_ratio)
        rate = _generate(model, the_device(), new_tokens)
        emit({"kind": "model", "provider": name, "layers": config["num_hidden_layers"], "tokens_per_s": rate})


def _dense(config: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    with the_device():
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
    return model.bfloat16().eval()


def _low_rank(dense: Any, retain_ratio: float) -> Any:
    """A copy of the model with random low-rank linears in all layers."""
    model = copy.deepcopy(dense)
    for target in all_targets(model):
        rank = rank_for_retain_ratio(dense_shape(target.module), retain_ratio, "factored")
        model.set_submodule(target.name, LowRankLinear.like(target.module, rank))
    group_linears_(model)
    return model


def _generate(model: Any, device: torch.device, new_tokens: int) -> float:
    """Tokens/s of ``generate`` with a static cache, from the difference of two lengths: the prompt cancels."""
    prompt = torch.randint(0, model.config.vocab_size, (1, 128), device=device)
    generate = partial(model.generate, prompt, do_sample=False, cache_implementation="static", pad_token_id=0)
    seconds = {}
    for length in (new_tokens, 2 * new_tokens):
        for _ in range(2):  # the first compiles
            start = now(device)
            generate(min_new_tokens=length, max_new_tokens=length)
            seconds[length] = now(device) - start
    return new_tokens / (seconds[2 * new_tokens] - seconds[new_tokens])
