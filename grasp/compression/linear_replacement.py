"""A contiguous block of layers replaced by a linear map, which the last linear of the layer before it takes in.

This is our own implementation of the idea of ReplaceMe (arXiv 2505.02819).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grasp.checkpoint.compression_report import ModuleReport
from grasp.checkpoint.run_state import Decision
from grasp.compression.budget import Plan, required_saving
from grasp.compression.candidates import Candidate
from grasp.compression.run import Run
from grasp.errors import UnsupportedModelError
from grasp.formatting import layer_ranges
from grasp.method.least_squares import linear_map
from grasp.model.hooks import hooked
from grasp.model.last_added import last_added, merge_map_
from grasp.model.layer_removal import can_remove
from grasp.model.running import hidden_output
from grasp.model.targets import decoder
from grasp.statistics.redundancy import block_influence
from grasp.statistics.sweep import Prefix, Rows, alone, capture_prefix, run_layers
from grasp_kernels.reference import accumulation_dtype

TAKES_MAP = "stays dense, and takes the linear map of the removed layers"
_MAP = "map"


def linear_replacement(run: Run, plan: Plan) -> list[Candidate]:
    """Fit a linear map in the place of the block that changes the hidden states least, of the fewest layers that do.

    Everything else stays dense. There is no candidate if the budget needs all layers but the first, if the remaining
    layers could not be renumbered, or if no linear can take in the map, as in Gemma-3, which has a norm after the MLP.
    """
    blocks = _blocks(run, plan)
    if not any(_takes_map(run, block.start - 1) for block in [*blocks[:1], *blocks[-1:]]):
        return []
    scores = block_influence(run.model, run.batches, span=len(blocks[0]), processes=run.processes)
    block = min(blocks, key=lambda block: scores[block.start])
    before = block.start - 1
    if not can_remove(run.model, block) or (added := _takes_map(run, before)) is None:
        return []
    with run.processes.fail_together():
        prefix = capture_prefix(
            *(run.model, run.processes.local_batches(run.batches), {before}),
            dtype=run.config.sweep_dtype,
            scratch=run.scratch,
        )
        sums = _map_sums(prefix, range(before, block.stop), run.model.get_submodule(added))
    run.processes.sum_(sums)
    ((_, file),) = run.processes.map_divided([block], lambda _: run.state.write(_MAP, {_MAP: linear_map(*sums)}))
    return [Candidate(f"layers {layer_ranges(block)} replaced by a linear map", tuple(block), {}, file)]


@contextmanager
def with_map(run: Run, file: str, layer: int) -> Iterator[None]:
    """Apply the map in a file to what a layer adds last, until the block ends; no weight is changed."""
    T = run.state.read(file)[0][_MAP]

    def apply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output @ T.to(output.device, output.dtype).mT

    with hooked(run.model.get_submodule(last_added(run.model, layer).module), after=apply):
        yield


def merge_(run: Run, decision: Decision, reports: Sequence[ModuleReport]) -> list[ModuleReport]:
    """Merge the map of a decision, if it has one, into the model; the reports with the linear that takes it in."""
    if not decision.map:
        return list(reports)
    target = last_added(run.model, decision.removed[0] - 1).linear
    assert target is not None
    merge_map_(run.model, target, run.state.read(decision.map)[0][_MAP])
    return [replace(report, reason=TAKES_MAP) if report.name == target.name else report for report in reports]


def _takes_map(run: Run, layer: int) -> str | None:
    """The path of the module whose output a map would be applied to; ``None`` if no linear can take the map in."""
    try:
        added = last_added(run.model, layer)
    except UnsupportedModelError:
        return None
    return None if added.linear is None else added.module


def _blocks(run: Run, plan: Plan) -> list[range]:
    """The shortest blocks that meet the budget; none if all layers but the first would have to go."""
    saving, depth, allowed = required_saving(run.prices, plan), len(decoder(run.model).layers), {*plan.layers}
    if saving <= 0:
        return []
    for count in range(1, depth):
        blocks = [
            range(start, start + count)
            for start in range(1, depth - count + 1)
            if allowed.issuperset(range(start - 1, start + count))
            and math.fsum(map(run.prices.layer, range(start, start + count))) >= saving
        ]
        if blocks:
            return blocks
    return []


@torch.no_grad()
def _map_sums(prefix: Prefix, layers: range, added: nn.Module) -> tuple[Tensor, Tensor]:
    """``Σ y yᵀ`` and ``Σ z yᵀ`` over the tokens, without padding; the first layer returns r + y, the last r + z.

    Args:
        prefix: hidden states at the first of the layers.
        layers: contiguous; a map of y is to replace all but the first.
        added: the module of the first layer whose output is y.

    Returns:
        Two tensors, (H, H) in fp32 (fp64 for fp64), on the device of y. Hidden states of one batch are in memory.
    """
    first, outputs = decoder(prefix.model).layers[layers.start], dict[nn.Module, Tensor]()
    sums: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs[module] = hidden_output(output)

    with alone(prefix, layers), hooked(first, added, after=keep):
        for index, batch in enumerate(prefix.batches):
            rows = Rows(batch)
            end = rows.of(run_layers(prefix, layers, index, prefix.hidden[layers.start][index]))
            y, start = (rows.of(outputs[module]) for module in (added, first))
            dtype = accumulation_dtype(y.dtype)
            y, start, end = (states.to(y.device, dtype) for states in (y, start, end))
            sums = sums or [y.new_zeros(y.shape[1], y.shape[1]) for _ in range(2)]
            sums[0].addmm_(y.mT, y)
            sums[1].addmm_((end - start + y).mT, y)
    gram, cross = sums
    return gram, cross
