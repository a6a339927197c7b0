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
from grasp.model.targets import Target, decoder
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
    """Fit U of every low-rank linear to the outputs of the dense one, in the order of the calls.

    Two streams of hidden states go through the layers: one with the dense linears, one with the low-rank linears fitted
    so far. So each linear compensates for the errors of the linears before it. The inputs of the dense linears of one
    layer are stored on the CPU, for all batches.

    Args:
        model: with the low-rank linears in place; only their ``U`` changes.
        batches: calibration batches.
        targets: the dense linears. A target that no low-rank linear replaces is skipped.
        removed: layers that will be removed; they are still dense here.
        dtype: run both streams in this dtype, see ``casting``. Sums and solutions have the dtype of the model, at least
            fp32.
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
        for target, U in fitted.items():  # ``casting`` has restored the factors from before
            replaced[target].U.copy_(U)


class _Exact(NamedTuple):
    """A linear and its factors in the dtype of the model."""

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
        dense_inputs, dense = run.inputs_and_outputs(dense, {target: target.module for target in members})
        _put(model, members, dense=False)
        for group in run.groups(members, low[0]):
            cross, inputs = run.covariances(group, members, dense_inputs, low)
            for target in group:
                factors = exact.get(target) or _exact(target, members[target])
                fitted[target] = least_squares(factors.U, factors.Vh, factors.weight, cross, inputs)
                members[target].U.copy_(fitted[target])
        if layer + 1 in layers:
            low = low if layer in removed else run.outputs(low)
        progress("refit", layer - layers.start + 1, len(layers))


class _ReachedError(Exception):
    """Ends a forward pass early."""


class _Layer:
    """One decoder layer, run alone on stored hidden states."""

    def __init__(
        self, model: PreTrainedModel, layer: int, batches: Sequence[CalibrationBatch], returns_tuple: bool
    ) -> None:
        self._model, self._batches, self._returns_tuple = model, batches, returns_tuple
        modules = list(decoder(model).layers)
        self._module, self._others = modules[layer], modules[:layer] + modules[layer + 1 :]

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        with (
            hooked(self._module, after=lambda *call: outputs.append(hidden_output(call[3]))),
            passing_through(self._others, self._returns_tuple),
            entering_with(self._module, hidden),
        ):
            backbone(self._model)(**batch_inputs(self._model, self._batches[index]), use_cache=False)
        return outputs[0]

    def outputs(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the layer for the hidden states of every batch, on the CPU."""
        return [self._run(index, states).cpu() for index, states in enumerate(hidden)]

    def inputs_and_outputs(
        self, hidden: Sequence[Tensor], modules: Mapping[Target, nn.Module]
    ) -> tuple[list[dict[Target, Tensor]], list[Tensor]]:
        """For every batch the inputs of the linears, and the output of the layer, on the CPU."""
        inputs, outputs = list[dict[Target, Tensor]](), list[Tensor]()
        for index, states in enumerate(hidden):
            with self._recording(index, modules) as recorded:
                outputs.append(self._run(index, states).cpu())
            copies = {id(x): x.cpu() for x in recorded.values()}  # one copy of an input that several linears share
            inputs.append({target: copies[id(x)] for target, x in recorded.items()})
        return inputs, outputs

    @contextmanager
    def _recording(self, index: int, modules: Mapping[Target, nn.Module]) -> Iterator[dict[Target, Tensor]]:
        """Record the input of each linear, without padding, in the order of the calls."""
        rows, recorded = Rows(self._batches[index]), dict[Target, Tensor]()
        targets = {module: target for target, module in modules.items()}

        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            recorded.setdefault(targets[module], rows.of_input(args[0]))

        with hooked(*targets, before=record):
            yield recorded

    def _input(self, index: int, hidden: Tensor, module: nn.Module) -> Tensor:
        """The input of one linear, without padding; the rest of the layer does not run."""
        inputs: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(Rows(self._batches[index]).of(args[0]))
            raise _ReachedError

        with suppress(_ReachedError), hooked(module, before=stop):
            self._run(index, hidden)
        return inputs[0]

    def groups(self, members: Mapping[Target, LowRankLinear], hidden: Tensor) -> list[list[Target]]:
        """The linears that share an input, in the order of the calls."""
        groups: dict[int, list[Target]] = {}
        with self._recording(0, members) as recorded:
            self._run(0, hidden)
        for target, x in recorded.items():
            groups.setdefault(id(x), []).append(target)
        return list(groups.values())

    def covariances(
        self,
        group: Collection[Target],
        members: Mapping[Target, LowRankLinear],
        dense_inputs: Sequence[Mapping[Target, Tensor]],
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
            x = dense_inputs[index][target].to(device)
            with exact_bf16(x, seen):
                x, seen = widen(x, cross.dtype), widen(seen, cross.dtype)
                add_product_(cross, x.mT, seen)
                add_product_(inputs, seen.mT, seen)
        return cross, inputs


def _put(model: PreTrainedModel, members: Mapping[Target, LowRankLinear], *, dense: bool) -> None:
    for target, module in members.items():
        model.set_submodule(target.name, target.module if dense else module)
