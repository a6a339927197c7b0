"""Quantise the linears and embeddings of a model, layer by layer, on what the quantised layers before produce."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp.errors import NonFiniteError
from grasp.method.rounding import Rounded, round_nearest, round_to_outputs
from grasp.method.storage import Storage
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.grouping import group_linears_
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.hooks import hooked
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedLowRankLinear, QuantizedModule, quantized_like
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.sweep import Prefix, Rows, alone, capture_prefix, propagate, run_layers
from grasp_kernels.products import accumulate_gram_, mirror_
from grasp_kernels.quantized import pack_int4

_OUTPUTS = Storage(8)  # of embeddings and of the output layer


@torch.no_grad()
def quantize_(
    model: PreTrainedModel,
    storage: Storage,
    batches: Sequence[CalibrationBatch] = (),
    *,
    progress: Progress = no_progress,
) -> None:
    """Quantise every linear and embedding of a causal language model in place, low-rank or dense.

    With ``batches`` the linears of the decoder layers are rounded such that their outputs change least
    (``round_to_outputs``), given the inputs that the quantised layers before them produce; left factors are fitted to
    the rounded right ones before they are rounded. Without batches every entry is rounded to the nearest value.
    Embeddings and the output layer have 8 bits and one scale per row, rounded to the nearest value.

    Args:
        model: on one device, unquantised, dense or with low-rank linears.
        storage: of the linears in the decoder layers.
        batches: calibration batches.
        progress: called after each decoder layer.

    Raises:
        NonFiniteError: if a weight or an input has NaN or infinite entries; the message names the layer.
        UnsupportedModelError: if the decoder layers cannot be found.
    """
    layers = decoder(model).layers
    group_linears_(model, enabled=False)
    names = {module: name for name, module in model.named_modules()}
    try:
        prefix = capture_prefix(model, batches, {0}) if batches else None
        for index, layer in enumerate(layers):
            linears = [module for module in layer.modules() if _is_linear(module)]
            moments: Mapping[nn.Module, Tensor] = {}
            if prefix is not None:
                moments = _moments(prefix, index, linears)
            for linear in linears:
                _replace_(model, names[linear], linear, storage, moments.get(linear))
            if prefix is not None:
                hidden = propagate(prefix, range(index, index + 1), prefix.hidden.pop(index))
                prefix.hidden[index + 1] = hidden
            progress("quantising", index + 1, len(layers))
        _quantize_rest_(model, names)
    finally:
        group_linears_(model)
        mark_compressed(model)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (LowRankLinear, nn.Linear, Conv1D))


def _moments(prefix: Prefix, layer: int, linears: Sequence[nn.Module]) -> dict[nn.Module, Tensor]:
    """``Σ x xᵀ`` of the inputs of the linears of a layer; linears with one input share it."""
    moments: dict[nn.Module, Tensor] = {}
    with alone(prefix, range(layer, layer + 1)):
        for index in range(len(prefix.batches)):
            recorded = _inputs(prefix, layer, index, linears)
            if index == 0:
                shared: dict[tuple[int, ...], Tensor] = {}
                for module, inputs in recorded.items():
                    width = inputs[0].shape[1]
                    zeros = inputs[0].new_zeros(width, width, dtype=torch.float32)
                    moments[module] = shared.setdefault(tuple(map(id, inputs)), zeros)
            for module, inputs in {
                id(moments[module]): (module, inputs) for module, inputs in recorded.items()
            }.values():
                for x in inputs:
                    accumulate_gram_(moments[module], x)
    for moment in {id(moment): moment for moment in moments.values()}.values():
        mirror_(moment)
    return moments


def _inputs(prefix: Prefix, layer: int, index: int, linears: Sequence[nn.Module]) -> dict[nn.Module, list[Tensor]]:
    """The inputs of the linears of a layer in one batch, without padding; one tensor for linears that share it."""
    recorded: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)
    rows = Rows(prefix.batches[index])

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        recorded[module].append(rows.of_input(args[0]))

    with hooked(*linears, before=record):
        run_layers(prefix, range(layer, layer + 1), index, prefix.hidden[layer][index])
    return recorded


class _Factor(NamedTuple):
    """A matrix to round, with the second moment of its inputs; without one it is rounded to the nearest."""

    matrix: Tensor
    moment: Tensor | None

    def rounded(self, storage: Storage) -> Rounded:
        if self.moment is None:
            return round_nearest(self.matrix, *storage)
        return round_to_outputs(self.matrix, self.moment, *storage)


def _replace_(
    model: nn.Module, name: str, linear: nn.Module, storage: Storage, moment: Tensor | None
) -> QuantizedModule:
    """Put the quantised module in the place of a linear or an embedding."""
    tensors = [tensor for tensor in (*linear.parameters(), moment) if tensor is not None]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        what = "its weights have" if moment is None or moment.isfinite().all() else "its inputs have"
        raise NonFiniteError(f"{name} cannot be quantised: {what} NaN or infinite entries")
    module = quantized_like(linear, storage, tensors[0].device)
    assert module is not None
    if isinstance(linear, LowRankLinear):
        assert isinstance(module, QuantizedLowRankLinear)
        Vh = _Factor(linear.Vh, moment).rounded(storage)
        _store_(module, "Vh", Vh)
        _store_(module, "U", _left(linear, Vh.matrix, moment).rounded(storage))
        module.order = None if linear.order is None else linear.order.clone()
    else:
        weight = linear.weight if isinstance(linear, nn.Embedding) else dense_weight(linear)  # type: ignore[arg-type]
        _store_(module, "weight", _Factor(weight, moment).rounded(storage))
    if getattr(linear, "bias", None) is not None:
        module.bias.data.copy_(linear.bias)  # type: ignore[union-attr, operator, arg-type]
    model.set_submodule(name, module.train(linear.training))
    return module


def _left(layer: LowRankLinear, Vh: Tensor, moment: Tensor | None) -> _Factor:
    """U, fitted to the rounded Vh, and the second moment of its inputs."""
    if moment is None:
        return _Factor(layer.U, None)
    right, wide = Vh.double().mT, moment.double()
    projected = wide @ right  # Σ x ĥᵀ
    gram = right.mT @ projected  # Σ ĥ ĥᵀ
    damped = gram.clone()
    ridge = 1e-6 * float(gram.diagonal().mean())
    damped.diagonal().add_(ridge if ridge > 0 else 1.0)
    target = layer.U.double() @ (layer.Vh.double() @ projected) + ridge * layer.U.double()
    return _Factor(torch.linalg.solve(damped, target, left=False), gram)


def _store_(module: nn.Module, name: str, rounded: Rounded) -> None:
    values, scales = getattr(module, name), getattr(module, f"{name}_scales")
    values.copy_(pack_int4(rounded.values) if values.dtype == torch.uint8 else rounded.values)
    scales.copy_(rounded.scales)


def _quantize_rest_(model: PreTrainedModel, names: Mapping[nn.Module, str]) -> None:
    """Quantise embeddings and the linears outside of the decoder layers. Modules with one weight share the result."""
    rest = [module for module in model.modules() if quantized_like(module, _OUTPUTS, "meta") is not None]
    made: dict[int, QuantizedModule] = {}
    for module in rest:
        key = id(getattr(module, "weight", module))
        new = _replace_(model, names[module], module, _OUTPUTS, None)
        if key in made:
            for name in ("weight", "weight_scales"):
                setattr(new, name, getattr(made[key], name))
        made.setdefault(key, new)
