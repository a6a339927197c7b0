"""Least squares of the left factors on the dense outputs, given the inputs that the compressed model produces."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.method.least_squares import least_squares
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.hooks import hooked
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import execution_device
from grasp.model.running import (
    backbone,
    batch_inputs,
    casting,
    entering_with,
    evaluating,
    hidden_output,
    passing_through,
)
from grasp.model.targets import Target, decoder, replace_module_
from grasp.progress import Progress, no_progress
from grasp.statistics.sweep import Rows, capture_prefix
from grasp_kernels.products import add_product_, exact_bf16, widen
from grasp_kernels.reference import accumulation_dtype


@torch.no_grad()
def refit_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Iterable[Target],
    *,
    removed: Collection[int] = (),
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Fit U of every replaced linear, in the order in which the model calls them, to what the dense model computes.

    Two streams of hidden states go through the layers, one with the dense linears and one with the low-rank ones as
    they are by then, so that each linear makes up for what those before it have changed. For all batches, the inputs
    of one layer's dense linears are kept on the CPU.

    Args:
        model: with the low-rank linears in place; only their ``U`` changes.
        batches: calibration batches.
        targets: the dense linears; those in whose places no low-rank ones stand are passed over.
        removed: layers that the compressed model is going to do without, still dense here.
        dtype: run both streams in it, see ``casting``; sums and solutions are in the model's own, fp32 at least.
        progress: called after each layer.
    """
    present = {target: model.get_submodule(target.name) for target in targets}
    replaced = {target: module for target, module in present.items() if isinstance(module, LowRankLinear)}
    if not replaced:
        return
    layers = sorted({target.layer for target in replaced})
    span = range(min([layers[0], *removed]), layers[-1] + 1)
    exact = {} if dtype is None else {target: _exact(target, module) for target, module in replaced.items()}
    fitted: dict[Target, Tensor] = {}
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(casting(model, dtype))
            _put(model, replaced, dense=True)
            stack.enter_context(casting(model, dtype))
            _put(model, replaced, dense=False)
            _refit_layers(model, batches, replaced, span, removed, exact, fitted, progress)
    finally:
        _put(model, replaced, dense=False)
        for target, U in fitted.items():  # ``casting`` has put back what was there before
            replaced[target].U.copy_(U)


class _Exact(NamedTuple):
    """A linear and its factors in the model's own dtype."""

    U: Tensor
    Vh: Tensor
    weight: Tensor


def _exact(target: Target, module: LowRankLinear) -> _Exact:
    return _Exact(module.U.detach(), module.Vh.detach(), dense_weight(target.module).detach())


def _refit_layers(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    replaced: Mapping[Target, LowRankLinear],
    layers: range,
    removed: Collection[int],
    exact: Mapping[Target, _Exact],
    fitted: dict[Target, Tensor],
    progress: Progress,
) -> None:
    prefix = capture_prefix(model, batches, {layers.start}, progress=progress)
    dense = low = prefix.hidden[layers.start]
    for layer in layers:
        run = _Layer(model, layer, batches, prefix.returns_tuple)
        members = {target: module for target, module in replaced.items() if target.layer == layer}
        _put(model, members, dense=True)
        wanted, dense = run.inputs_and_outputs(dense, {target: target.module for target in members})
        _put(model, members, dense=False)
        for group in run.groups(members, low[0]):
            cross, inputs = run.covariances(group, members, wanted, low)
            for target in group:
                factors = exact.get(target) or _exact(target, members[target])
                fitted[target] = least_squares(factors.U, factors.Vh, factors.weight, cross, inputs)
                members[target].U.copy_(fitted[target])
        if layer + 1 in layers:
            low = low if layer in removed else run.outputs(low)
        progress("refit", layer - layers.start + 1, len(layers))


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not needed."""


class _Layer:
    """One decoder layer, run by itself on kept hidden states."""

    def __init__(
        self, model: PreTrainedModel, layer: int, batches: Sequence[CalibrationBatch], returns_tuple: bool
    ) -> None:
        self._model, self._batches, self._returns_tuple = model, batches, returns_tuple
        modules = list(decoder(model).layers)
        self._module, self._others = modules[layer], modules[:layer] + modules[layer + 1 :]

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        kept: list[Tensor] = []
        with (
            hooked(self._module, after=lambda *call: kept.append(hidden_output(call[3]))),
            passing_through(self._others, self._returns_tuple),
            entering_with(self._module, hidden),
        ):
            backbone(self._model)(**batch_inputs(self._model, self._batches[index]), use_cache=False)
        return kept[0]

    def outputs(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the layer makes of the hidden states of every batch, on the CPU."""
        return [self._run(index, states).cpu() for index, states in enumerate(hidden)]

    def inputs_and_outputs(
        self, hidden: Sequence[Tensor], modules: Mapping[Target, nn.Module]
    ) -> tuple[list[dict[Target, Tensor]], list[Tensor]]:
        """For every batch what enters each linear, and what the layer returns, on the CPU."""
        inputs, outputs = list[dict[Target, Tensor]](), list[Tensor]()
        for index, states in enumerate(hidden):
            with self._noting(index, modules) as found:
                outputs.append(self._run(index, states).cpu())
            kept = {id(x): x.cpu() for x in found.values()}  # linears that share an input share its copy
            inputs.append({target: kept[id(x)] for target, x in found.items()})
        return inputs, outputs

    @contextmanager
    def _noting(self, index: int, modules: Mapping[Target, nn.Module]) -> Iterator[dict[Target, Tensor]]:
        """What enters each linear, padding left out, in the order of the calls."""
        rows, found = Rows(self._batches[index]), dict[Target, Tensor]()

        targets = {module: target for target, module in modules.items()}

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(targets[module], rows.of_input(args[0]))

        with hooked(*targets, before=note):
            yield found

    def _input(self, index: int, hidden: Tensor, module: nn.Module) -> Tensor:
        """What enters one linear, padding left out; the layer is run up to there."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            found.append(Rows(self._batches[index]).of(args[0]))
            raise _ReachedError

        with suppress(_ReachedError), hooked(module, before=stop):
            self._run(index, hidden)
        return found[0]

    def groups(self, members: Mapping[Target, LowRankLinear], hidden: Tensor) -> list[list[Target]]:
        """Linears that are given one input, in the order of the calls."""
        groups: dict[int, list[Target]] = {}
        with self._noting(0, members) as found:
            self._run(0, hidden)
        for target, x in found.items():
            groups.setdefault(id(x), []).append(target)
        return list(groups.values())

    def covariances(
        self,
        group: Collection[Target],
        members: Mapping[Target, LowRankLinear],
        wanted: Sequence[Mapping[Target, Tensor]],
        low: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``Σ x x̂ᵀ`` and ``Σ x̂ x̂ᵀ`` of the input that a group shares, in fp32 (fp64 for fp64)."""
        target = next(iter(group))
        width = members[target].in_features
        device = execution_device(target.module)
        cross, inputs = (
            torch.zeros(width, width, device=device, dtype=accumulation_dtype(target.module.weight.dtype))
            for _ in range(2)
        )
        for index in range(len(self._batches)):
            seen = self._input(index, low[index], members[target]).to(device)
            x = wanted[index][target].to(device)
            with exact_bf16(x, seen):
                x, seen = widen(x, cross.dtype), widen(seen, cross.dtype)
                add_product_(cross, x.mT, seen)
                add_product_(inputs, seen.mT, seen)
        return cross, inputs


def _put(model: PreTrainedModel, members: Mapping[Target, LowRankLinear], *, dense: bool) -> None:
    for target, module in members.items():
        replace_module_(model, target.name, target.module if dense else module)
