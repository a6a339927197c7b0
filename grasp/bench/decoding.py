"""Check and time models that generate: a prompt, then greedy steps with a KV cache, eagerly or compiled."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import Conv1D, PreTrainedModel

from grasp.bench.memory import peak_bytes_above_now
from grasp.bench.percentiles import Percentiles
from grasp.bench.providers import COMPRESSED, DENSE, REMOVED, ModelProvider, weights_of
from grasp.bench.timing import StopRule, rounds
from grasp.evaluation.generation import CompiledSteps, GenerationTime, first_logits, time_generation
from grasp.formatting import one_line
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedLinear, QuantizedLowRankLinear
from grasp.model.running import first_device
from grasp.model.size import parameter_count
from grasp.progress import Progress, no_progress
from grasp_kernels.roofline import Card

EAGER, COMPILED = MODES = ("eager", "compiled")
REFERENCE = "reference"
# Largest norm-wise relative difference of logits that rounding explains, between two ways to run the same weights.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Case(NamedTuple):
    """The sizes of a generation, see ``time_generation``."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    depth: int

    @property
    def rows(self) -> tuple[int, int]:
        """Tokens in the products of the prompt and of a step."""
        return self.batch_size * self.prompt_tokens, self.batch_size


class Key(NamedTuple):
    """A provider in a mode."""

    provider: str
    mode: str


class Generator(Protocol):
    """Anything that generates."""

    @property
    def device(self) -> torch.device:
        """Where its model is."""

    def generate(self, case: Case) -> GenerationTime:
        """The times of one generation."""


class Timed(NamedTuple):
    """A provider, and its compiled steps; ``None`` if it runs eagerly."""

    provider: ModelProvider
    steps: CompiledSteps | None = None

    @classmethod
    def of(cls, provider: ModelProvider, mode: str) -> Timed:
        """A provider in a mode."""
        return cls(provider, CompiledSteps(provider.model) if mode == COMPILED else None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return first_device(self.provider.model)

    def generate(self, case: Case) -> GenerationTime:
        """The times of one generation."""
        return time_generation(self.provider.prepared(), **case._asdict(), compiled=self.steps)

    def logits(self, case: Case) -> Tensor:
        """The logits after the prompt and after one step, (2, B, V)."""
        return first_logits(self.provider.prepared(), **case._asdict(), compiled=self.steps)


def difference(got: Tensor, expected: Tensor) -> float:
    """Norm-wise relative difference of logits (steps, B, V) in the worst step."""
    apart = torch.linalg.vector_norm((got.double() - expected.double()).flatten(1), dim=1)
    return float((apart / torch.linalg.vector_norm(expected.double().flatten(1), dim=1)).max())


class Checked(NamedTuple):
    """Models whose logits are right, and why others are not among them."""

    models: dict[Key, Timed]  # to be timed
    apart: dict[Key, float]  # differences of logits; there is none of a model as PyTorch runs it
    refused: dict[Key, tuple[str, bool]]  # the reason, and whether the logits were wrong


def checked(
    models: Mapping[str, ModelProvider], modes: Sequence[str], case: Case, progress: Progress = no_progress
) -> Checked:
    """Compare each model in each mode with the same weights on the reference backend, run eagerly.

    Args:
        models: by provider; ``dense`` is among them.
        modes: some of ``MODES``.
        case: the sizes that will be timed.
        progress: called after each model.
    """
    found = Checked({}, {}, {})
    expected: dict[str, Tensor] = {}
    tolerance = TOLERANCE[models[DENSE].model.dtype]
    keys = [Key(name, mode) for mode in modes for name in models]
    for done, key in enumerate(keys, start=1):
        timed, weights = Timed.of(models[key.provider], key.mode), weights_of(key.provider)
        if weights not in expected:
            backend = REFERENCE if weights == COMPRESSED else None
            expected[weights] = Timed(ModelProvider(models[weights].model, backend)).logits(case)
        reason, wrong = None, False
        if key.provider not in (DENSE, REMOVED) or key.mode == COMPILED:
            try:
                apart = found.apart[key] = difference(timed.logits(case), expected[weights])
            except TorchDynamoException as error:
                reason = f"torch.compile does not take it: {one_line(error)}"
            else:
                wrong = not apart <= tolerance
                reason = f"logits are off by {apart:.1e}, expected at most {tolerance:.0e}" if wrong else None
        if reason is None:
            found.models[key] = timed
        else:
            found.refused[key] = reason, wrong
        progress(f"checking batch {case.batch_size}", done, len(keys))
    return found


class Turns(NamedTuple):
    """The generations of all models in turns."""

    times: dict[Key, list[GenerationTime]]  # by model, one per turn
    peaks: dict[Key, int | None]  # peak memory of the turn before, which warms up
    stopped: str  # why the turns ended, a name of ``STOPS``


def time_models(models: Mapping[Key, Generator], case: Case, stop: StopRule, progress: Progress = no_progress) -> Turns:
    """Time generations of all models in turns, after a turn that warms up, until ``stop`` ends them."""
    step = f"timing batch {case.batch_size}"
    progress(step, 0, 1)  # not at every turn: a moving bar would slow down the timed model
    orders = rounds(list(models))
    generate = {key: partial(timed.generate, case) for key, timed in models.items()}
    peaks = {key: peak_bytes_above_now(generate[key], models[key].device) for key in next(orders, ())}
    times: dict[Key, list[GenerationTime]] = {key: [] for key in models}
    stopped, start = "", time.perf_counter()
    for turn, order in enumerate(orders, start=1):
        for key in order:
            times[key].append(generate[key]())
        if (reason := stop.reason(turn, time.perf_counter() - start, partial(_precision, times))) is not None:
            stopped = reason
            break
    progress(step, 1, 1)
    return Turns(times, peaks, stopped)


def _precision(times: Mapping[Key, Sequence[GenerationTime]]) -> float:
    """The precision of the worst median, of the first token and of all steps; infinite with too few turns."""
    samples = [
        part for same in times.values() for part in ([t.first_token_s for t in same], [t.decode_s for t in same])
    ]
    precisions = [Percentiles.of(sample).precision for sample in samples]
    return max(math.inf if precision is None else precision for precision in precisions)


def floors(
    model: PreTrainedModel, card: Card, batch_size: int, prompt_tokens: int, cache_bytes: int
) -> tuple[float, ...]:
    """Least seconds of the prefill and of a decoding step: matrix products and the bytes they read, without attention.

    Empty for a mixture of experts, where a token does not use the whole model. A step reads ``cache_bytes`` of the KV
    cache.
    """
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in _EXPERTS):
        return ()
    kinds = (nn.Linear, Conv1D, LowRankLinear, QuantizedLowRankLinear, QuantizedLinear)
    linears = nn.ModuleList(module for module in model.modules() if isinstance(module, kinds))
    head = model.get_output_embeddings()
    parameters, size = parameter_count(linears), sum(p.numel() * p.element_size() for p in linears.parameters())
    once = parameter_count(head) if isinstance(head, nn.Module) else 0
    prefill = 2 * batch_size * ((parameters - once) * prompt_tokens + once)
    return (
        max(size / card.bandwidth, prefill / card.flops),
        max((size + cache_bytes) / card.bandwidth, 2 * batch_size * parameters / card.flops),
    )
