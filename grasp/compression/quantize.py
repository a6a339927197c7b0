"""Quantise the linears and embeddings of a model, layer by layer, on what the quantised layers before produce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError
from grasp.method.blocks import fp64_device, to_double
from grasp.method.least_squares import Moments, fit_weight
from grasp.method.rounding import Rounded, round_nearest, round_to_outputs
from grasp.method.storage import OUTPUTS, Storage
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.grouping import group_linears_
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import (
    QuantizedLowRankLinear,
    QuantizedModule,
    is_linear,
    quantized_like,
    storage_outside,
)
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.hidden_states import Scratch
from grasp.statistics.one_layer import OneLayer
from grasp.statistics.sweep import capture_prefix, propagate
from grasp_kernels.quantized import pack_int4

# In 4 bits a low-rank linear with more numbers than this fraction of the dense weight is stored dense. Its factors save
# little and lose much: rows given by U are sums of many stored rows, with the rounding errors of all.
DENSE_FROM = 0.8
_UNREPAIRED = 0.2  # of the errors that Vh makes in the outputs of U; the fit of U makes up for the rest


@torch.no_grad()
def quantize_(
    model: PreTrainedModel,
    storage: Storage | Callable[[nn.Module], Storage],
    batches: Sequence[CalibrationBatch] = (),
    *,
    scratch: Scratch | None = None,
    progress: Progress = no_progress,
) -> None:
    """Quantise every linear and embedding of a causal language model in place, low-rank or dense.

    With ``batches`` the linears of the decoder layers are fitted to the outputs of the unquantised model, given the
    inputs that the quantised linears before them produce (``fit_weight``), and rounded such that their outputs change
    least (``round_to_outputs``); left factors are fitted to the rounded right ones before they are rounded. Without
    batches every entry is rounded to the nearest value.
    Embeddings and the output layer are rounded to the nearest value, for their storage see ``storage_outside``.

    In 4 bits low-rank linears that have nearly as many parameters as the dense weight become dense ones.

    Args:
        model: on one device, unquantised, dense or with low-rank linears.
        storage: of the linears in the decoder layers and of the embedding, or a function that tells that of each.
        batches: calibration batches.
        scratch: where hidden states are kept; ``None``: in memory.
        progress: called after each decoder layer.

    Raises:
        NonFiniteError: if a weight or an input has NaN or infinite entries; the message names the layer.
        UnsupportedModelError: if the decoder layers cannot be found.
    """
    layers = decoder(model).layers
    group_linears_(model, enabled=False)
    names = {module: name for name, module in model.named_modules()}
    model.config._is_quantized = True  # layers that read the weight of a linear call the linear then
    try:
        streams = _Streams(model, batches, scratch) if batches else None
        for index, layer in enumerate(layers):
            linears = [module for module in layer.modules() if _is_linear(module)]
            stored = {names[linear]: storage if isinstance(storage, Storage) else storage(linear) for linear in linears}
            _expand_(model, layer, names, stored)
            linears = [module for module in layer.modules() if _is_linear(module)]
            passing = streams.through(index, linears) if streams is not None else [(linears, None)]
            for members, sums in passing:
                for linear in members:
                    _replace_(model, names[linear], linear, stored[names[linear]], sums)
                del sums  # before the next are added up
            progress("quantising", index + 1, len(layers))
        _quantize_rest_(model, names, storage)
    finally:
        group_linears_(model)
        mark_compressed(model)


def bytes_saved(model: PreTrainedModel, linears: Storage, embedding: Storage) -> tuple[int, list[int]]:
    """The bytes that ``quantize_`` saves of a dense model, and of each of its decoder layers, given their storages."""
    layers = [_bytes_saved(dict.fromkeys(layer.modules(), linears)) for layer in decoder(model).layers]
    inside = set(decoder(model).layers.modules())
    rest = {m: storage_outside(model, m, embedding) for m in model.modules() if m not in inside}
    return sum(layers) + _bytes_saved(rest), layers


def _bytes_saved(modules: Mapping[nn.Module, Storage]) -> int:
    saved: dict[int, int] = {}  # by the first parameter: shared ones count once
    for module, storage in modules.items():
        if (quantized := quantized_like(module, storage, "meta")) is not None:
            before, after = (
                sum(p.nbytes for name, p in each.named_parameters() if name != "bias") for each in (module, quantized)
            )
            saved[id(next(module.parameters()))] = before - after
    return sum(saved.values())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LowRankLinear) or is_linear(module)


def _expand_(model: nn.Module, layer: nn.Module, names: dict[nn.Module, str], stored: Mapping[str, Storage]) -> None:
    """Put dense linears in the place of those low-rank ones of 4 bits that have nearly as many parameters."""
    for module in [module for module in layer.modules() if isinstance(module, LowRankLinear)]:
        shape = (module.in_features, module.out_features)
        parameters = module.U.numel() + module.Vh.numel()
        if stored[names[module]].bits != 4 or parameters <= DENSE_FROM * math.prod(shape):
            continue
        dense = nn.Linear(*shape, bias=module.bias is not None, device="meta", dtype=module.U.dtype)
        dense.weight = nn.Parameter(module.dense_weight().to(module.U.dtype))
        dense.register_parameter("bias", module.bias)
        names[dense] = names[module]
        model.set_submodule(names[module], dense.train(module.training))


class _Streams:
    """The hidden states of the unquantised model and of the quantised one, which pass the layers together."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[CalibrationBatch], scratch: Scratch | None) -> None:
        self._prefix = capture_prefix(model, batches, {0}, scratch=scratch)
        self._unquantised = self._quantised = self._prefix.hidden.pop(0)
        self._tokens = sum(batch.num_tokens for batch in batches)

    def through(self, layer: int, linears: Sequence[nn.Module]) -> Iterator[tuple[list[nn.Module], Moments | None]]:
        """The linears of a layer that share their inputs, in the order of their calls, then those that are not called.

        The caller quantises the linears of one step before it takes the next step.
        """
        run, left = OneLayer(self._prefix, layer), list(linears)
        inputs, self._unquantised = run.inputs_and_outputs(self._unquantised, linears)
        for members, calls in run.groups(linears, self._quantised[0]):
            left = [linear for linear in left if linear not in members]
            before, *_ = [inputs.pop(member, ()) for member in members]  # the same of all
            yield members, self._sums(run, members[0], calls, before)
        yield left, None
        self._quantised = propagate(self._prefix, range(layer, layer + 1), self._quantised)

    def _sums(self, run: OneLayer, linear: nn.Module, calls: int, before: Sequence[Tensor]) -> Moments:
        right = linear.Vh if isinstance(linear, LowRankLinear) else dense_weight(linear)  # type: ignore[arg-type]
        width, device = right.shape[1], right.device
        sums = Moments.zeros(width, device, torch.float32, calls * self._tokens)
        run.add_covariances_(sums, linear, calls, before, self._quantised)
        return sums


def _fitted(weight: Tensor, sums: Moments | None) -> Tensor:
    """A weight, or Vh, that makes up for the changes of its inputs."""
    return weight if sums is None else fit_weight(weight.float(), sums)


def _rounded(matrix: Tensor, moment: Tensor | None, storage: Storage, metric: Tensor | None = None) -> Rounded:
    """Round a matrix, given ``Σ x̂ x̂ᵀ`` of its inputs, or to the nearest value. For ``metric`` see the callee."""
    if moment is None:
        return round_nearest(matrix, storage)
    return round_to_outputs(matrix, moment, storage, metric)


def _replace_(
    model: nn.Module, name: str, linear: nn.Module, storage: Storage, sums: Moments | None
) -> QuantizedModule:
    """Put the quantised module in the place of a linear or an embedding."""
    parameters = list(linear.parameters())
    for what, tensors in (("inputs", [] if sums is None else [sums.cross, sums.inputs]), ("weights", parameters)):
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise NonFiniteError(f"{name} cannot be quantised: its {what} have NaN or infinite entries")
    module, moment = quantized_like(linear, storage, parameters[0].device), None if sums is None else sums.inputs
    assert module is not None
    if isinstance(linear, LowRankLinear):
        assert isinstance(module, QuantizedLowRankLinear)
        Vh = _fitted(linear.Vh, sums)
        rounded = _rounded(Vh, moment, storage, _metric(linear))
        _store_(module, "Vh", rounded)
        _store_(module, "U", _rounded_left(linear.U, Vh, rounded.matrix, moment, storage))
        module.order = None if linear.order is None else linear.order.clone()
    else:
        weight = linear.weight if isinstance(linear, nn.Embedding) else dense_weight(linear)  # type: ignore[arg-type]
        _store_(module, "weight", _rounded(_fitted(weight, sums), moment, storage))
    if getattr(linear, "bias", None) is not None:
        module.bias.data.copy_(linear.bias)  # type: ignore[union-attr, operator, arg-type]
    model.set_submodule(name, module.train(linear.training))
    return module


def _metric(layer: LowRankLinear) -> Tensor:
    """What errors of the rows of Vh do to the outputs, once U is fitted to them."""
    U = layer.U.float()
    metric = _UNREPAIRED * U.mT @ U
    if layer.order is not None:
        metric.diagonal().add_(1.0)  # the rows of Vh are outputs too
    return metric


def _rounded_left(U: Tensor, Vh: Tensor, rounded: Tensor, moment: Tensor | None, storage: Storage) -> Rounded:
    """Round U, fitted to the rounded Vh.

    The fit minimises the errors that the rounding of U will make as well, which grow with U: a ridge.
    """
    if moment is None:
        return round_nearest(U, storage)
    place = fp64_device(U.device)
    right = to_double(rounded, place).mT
    projected = to_double(moment, place) @ right  # Σ x̂ ĥᵀ
    gram = right.mT @ projected  # Σ ĥ ĥᵀ
    ridge = 4.0**-storage.bits / 4 * float(gram.diagonal().mean())
    if ridge == 0:
        return round_to_outputs(U, gram, storage)
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    target = to_double(U, place) @ (to_double(Vh, place) @ projected)
    fitted = torch.linalg.solve(damped, target, left=False).float()
    return round_to_outputs(fitted.to(U.device), gram, storage)


def _store_(module: nn.Module, name: str, rounded: Rounded) -> None:
    values, scales = getattr(module, name), getattr(module, f"{name}_scales")
    values.copy_(pack_int4(rounded.values) if values.dtype == torch.uint8 else rounded.values)
    scales.copy_(rounded.scales)


def _quantize_rest_(
    model: PreTrainedModel, names: Mapping[nn.Module, str], storage: Storage | Callable[[nn.Module], Storage]
) -> None:
    """Quantise embeddings and the linears outside of the decoder layers. Modules with one weight share the result."""
    stored = {
        module: storage_outside(model, module, storage if isinstance(storage, Storage) else storage(module))
        for module in model.modules()
        if quantized_like(module, OUTPUTS, "meta") is not None
    }
    made: dict[int, QuantizedModule] = {}
    for module, own in stored.items():
        key = id(getattr(module, "weight", module))
        new = _replace_(model, names[module], module, own, None)
        if key in made:
            for name in ("weight", "weight_scales"):
                setattr(new, name, getattr(made[key], name))
        made.setdefault(key, new)
