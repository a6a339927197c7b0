"""How much memory a compression may take, and the spans that fit into it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from grasp.compression.layer_cost import tracer_for
from grasp.compression.memory import forward_bytes, span_memory
from grasp.compression.span_plan import PlannedSpan, SpanMemory
from grasp.config import GraspConfig
from grasp.environment import free_bytes
from grasp.errors import UnsupportedModelError
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.offload import fetched_bytes
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder
from grasp.statistics.processes import ALONE, Processes

FREE_FRACTION = 0.9  # of the memory that is free once the model is loaded, if no budget is given


def check_budgets(memory: int | None, host_memory: int | None, *, on_cpu: bool) -> None:
    """Refuse budgets that are not positive, and one for the CPU memory beside a device if the model is on the CPU.

    Raises:
        ValueError: in these cases.
    """
    for name, value in (("memory", memory), ("host_memory", host_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a positive number of bytes, got {value}")
    if on_cpu and host_memory is not None:
        raise ValueError("host_memory is for CPU memory beside a GPU, but the model is on the CPU; give memory")


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a compression may take above the loaded model."""

    # ``span_memory`` of this model; ``None`` if it cannot run without data, then all layers are one span
    needed: Callable[..., SpanMemory] | None
    device: int  # bytes for a span, on the device of the model
    hidden_states: int | None  # bytes of CPU memory for hidden states; ``None`` for any number

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        targets: Collection[Target],
        *,
        memory: int | None,
        host_memory: int | None,
        processes: Processes = ALONE,
    ) -> MemoryBudget:
        """The budget for a loaded model; ``None`` is 0.9 of what is free. Processes divide free CPU memory.

        All processes get the smallest of their budgets for the device, so that they plan the same spans.

        On a CPU, hidden states have what the largest span leaves.

        Raises:
            OutOfMemoryError: if it is too small.
            ValueError: if ``host_memory`` is given and the model is on the CPU.
            UnsupportedModelError: if ``memory`` is given and the model cannot run without data.
        """
        device = first_device(model)
        on_cpu = device.type == "cpu"
        check_budgets(memory, host_memory, on_cpu=on_cpu)
        is_given = memory is not None
        if memory is None:
            memory = int(FREE_FRACTION * free_bytes(device) / (processes.size if on_cpu else 1))
        memory = processes.least(memory)
        if host_memory is None and not on_cpu:
            host_memory = int(FREE_FRACTION * free_bytes(torch.device("cpu")) / processes.size)
        rows, lengths = zip(*(batch.input_ids.shape for batch in batches), strict=True)
        longest, shortest = max(lengths), min(lengths)
        largest, tokens = max(batch.input_ids.numel() for batch in batches), sum(batch.num_tokens for batch in batches)
        shapes = [
            (-(-largest // longest), longest),
            (max(count for count, length in zip(rows, lengths, strict=True) if length == shortest), shortest),
        ]
        try:
            tracers = [
                tracer_for(
                    model.config,
                    dtype=model.dtype if config.sweep_dtype is None else getattr(torch, config.sweep_dtype),
                    device=device,
                    batch_size=count,
                    seq_len=length,
                    model_class=type(model),  # transformers may not know it
                )
                for count, length in dict.fromkeys(shapes)
            ]
        except UnsupportedModelError:
            if is_given:
                raise
            return cls(None, memory, host_memory)
        # Attention takes more for long sequences, layers that pad to a multiple of some tokens for short ones.
        tracer = max(tracers, key=lambda each: forward_bytes(each, range(0), model.dtype))
        extra = fetched_bytes(model)
        needed = partial(
            span_memory,
            tracer,
            config=config,
            tokens=tokens,
            dtype=model.dtype,
            extra=extra,
            fetched=extra > 0,
        )
        linears = [target for target in targets if config.layers is None or target.layer in config.layers]
        # Too little memory is refused before the block influence is measured. The sweep that needs most says how much.
        needs = sorted(map(needed, plan_sweeps(linears, config.schedule)), key=SpanMemory.least, reverse=True)
        if config.layers is None and config.scope != "model":  # the layers below those that it finds run in copies
            copies = forward_bytes(tracer, range(len(decoder(model).layers) - 1), model.dtype)
            needs = [replace(spans, other=max(spans.other, copies)) for spans in needs]
        peaks = [spans.most_of(spans.plan(memory)) for spans in needs]
        if not on_cpu or not peaks:
            return cls(needed, memory, host_memory)
        return cls(needed, max(peaks), memory - max(peaks))

    def spans(
        self, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
    ) -> list[PlannedSpan]:
        """Divide layers into spans, see ``SpanMemory.plan``."""
        if self.needed is None:
            return [PlannedSpan(layers, (tuple(targets),))]
        return self.needed(targets, ranks=ranks or {}).plan(self.device)
