"""Least squares of the left factors on the dense outputs, given the inputs that the compressed model produces."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.architecture import (
    Target,
    backbone,
    batch_inputs,
    decoder,
    entering_with,
    evaluating,
    hidden_output,
    passing_through,
    replace_module_,
)
from grasp.calibration import CalibrationBatch
from grasp.modules import LowRankLinear, dense_weight
from grasp.offload import execution_device
from grasp.progress import Progress, silent
from grasp.sweep import Rows, capture_prefix

RIDGE = 1e-3  # of the mean diagonal of the projected inputs' covariance: how strongly U is held where it is


def least_squares(U: Tensor, Vh: Tensor, weight: Tensor, cross: Tensor, inputs: Tensor) -> Tensor:
    """The U that minimises ``Σ ‖W x − U Vh x̂‖² + λ ‖U − U₀‖²``, (N, R) in the dtype of ``U``; solved in fp64.

    Args:
        U: U₀, (N, R).
        Vh: (R, K).
        weight: W, (N, K).
        cross: ``Σ x x̂ᵀ``, (K, K): inputs in the dense model by those in the compressed one.
        inputs: ``Σ x̂ x̂ᵀ``, (K, K).
    """
    left, right, exact = U.double(), Vh.double(), weight.double()
    gram = right @ inputs.double() @ right.mT
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    wanted = exact @ cross.double() @ right.mT + left @ ridge
    return torch.linalg.solve(gram + ridge, wanted, left=False).to(U.dtype)


@torch.no_grad()
def refit_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Iterable[Target],
    *,
    removed: Collection[int] = (),
    progress: Progress = silent,
) -> None:
    """Fit U of every replaced linear, in the order in which the model calls them, to what the dense model computes.

    Two streams of hidden states go through the layers, one with the dense linears and one with the low-rank ones as
    they are by then, so that each linear makes up for what those before it have changed.

    Args:
        model: with the low-rank linears in place; only their ``U`` changes.
        batches: calibration batches.
        targets: the dense linears; those in whose places no low-rank ones stand are passed over.
        removed: layers that the compressed model is going to do without, still dense here.
        progress: called after each layer.
    """
    present = {target: model.get_submodule(target.name) for target in targets}
    replaced = {target: module for target, module in present.items() if isinstance(module, LowRankLinear)}
    if not replaced:
        return
    layers = sorted({target.layer for target in replaced})
    span = range(min([layers[0], *removed]), layers[-1] + 1)
    try:
        with evaluating(model):
            _refit_layers(model, batches, replaced, span, removed, progress)
    finally:
        _put(model, replaced, dense=False)


def _refit_layers(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    replaced: Mapping[Target, LowRankLinear],
    layers: range,
    removed: Collection[int],
    progress: Progress,
) -> None:
    prefix = capture_prefix(model, batches, {layers.start}, progress=progress)
    dense = low = prefix.hidden[layers.start]
    for layer in layers:
        run = _Layer(model, layer, batches, prefix.returns_tuple)
        members = {target: module for target, module in replaced.items() if target.layer == layer}
        for group in run.groups(members, dense[0]):
            cross, inputs = run.covariances(group, members, dense, low)
            for target in group:
                U, Vh = members[target].U, members[target].Vh
                U.copy_(least_squares(U, Vh, dense_weight(target.module), cross, inputs))
        if layer + 1 in layers:
            _put(model, members, dense=True)
            dense = run.outputs(dense)
            _put(model, members, dense=False)
            low = low if layer in removed else run.outputs(low)
        progress("refit", layer - layers.start + 1, len(layers))


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
        handle = self._module.register_forward_hook(lambda *call: kept.append(hidden_output(call[2])))
        try:
            with passing_through(self._others, self._returns_tuple), entering_with(self._module, hidden):
                backbone(self._model)(**batch_inputs(self._model, self._batches[index]), use_cache=False)
        finally:
            handle.remove()
        return kept[0]

    def outputs(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the layer makes of the hidden states of every batch, on the CPU."""
        return [self._run(index, states).cpu() for index, states in enumerate(hidden)]

    def _inputs(self, index: int, hidden: Tensor, modules: Mapping[Target, nn.Module]) -> dict[Target, Tensor]:
        """What enters each linear, padding left out, in the order of the calls."""
        rows, found = Rows(self._batches[index]), dict[Target, Tensor]()

        def note(target: Target) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                found.setdefault(target, rows.of_input(args[0]))

            return hook

        handles = [module.register_forward_pre_hook(note(target)) for target, module in modules.items()]
        try:
            self._run(index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def groups(self, members: Mapping[Target, LowRankLinear], hidden: Tensor) -> list[list[Target]]:
        """Linears that are given one input, in the order of the calls."""
        groups: dict[int, list[Target]] = {}
        found = self._inputs(0, hidden, members)
        for target, x in found.items():
            groups.setdefault(id(x), []).append(target)
        return list(groups.values())

    def covariances(
        self,
        group: Collection[Target],
        members: Mapping[Target, LowRankLinear],
        dense: Sequence[Tensor],
        low: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``Σ x x̂ᵀ`` and ``Σ x̂ x̂ᵀ`` of the input that a group shares, in fp32 (fp64 for fp64)."""
        target = next(iter(group))
        dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
        width = members[target].in_features
        device = execution_device(target.module)
        cross, inputs = (torch.zeros(width, width, device=device, dtype=dtype) for _ in range(2))
        for index in range(len(self._batches)):
            _put(self._model, members, dense=True)
            x = self._inputs(index, dense[index], {target: target.module})[target].to(dtype)
            _put(self._model, members, dense=False)
            seen = self._inputs(index, low[index], {target: members[target]})[target].to(dtype)
            cross += x.mT @ seen
            inputs += seen.mT @ seen
        return cross, inputs


def _put(model: PreTrainedModel, members: Mapping[Target, LowRankLinear], *, dense: bool) -> None:
    for target, module in members.items():
        replace_module_(model, target.name, target.module if dense else module)
