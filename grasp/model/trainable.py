"""The parameters of a compressed model that can be trained while all others stay: factors, or scales."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import is_quantized, require_floating_factors
from grasp.model.targets import decoder


def trained_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What ``recover_`` trains, by path: factors, or the scales, norms and biases in the layers of a quantised model.

    Raises:
        UnsupportedModelError: if the model is neither low-rank nor quantised, or they are offloaded.
    """
    if not is_quantized(model):
        return trainable_factors(model)
    layers = decoder(model)
    named = {f"{layers.path}.{name}": parameter for name, parameter in layers.layers.named_parameters()}
    parameters = {name: p for name, p in named.items() if name.endswith("_scales") or p.dim() == 1}
    _require_at_hand(parameters)
    return parameters


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors U and Vh of all low-rank linears, by path.

    Raises:
        UnsupportedModelError: if there are none, or they are offloaded, quantised, or of no floating-point dtype.

    Example:
        >>> from torch import nn
        >>> from grasp import LowRankLinear
        >>> list(trainable_factors(nn.Sequential(LowRankLinear(8, 6, rank=2))))
        ['0.U', '0.Vh']
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    factors = {f"{path}.{name}": getattr(linear, name) for path, linear in linears.items() for name in ("U", "Vh")}
    require_floating_factors(model)
    if not factors:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no low-rank linears to train; expected a model in which grasp has replaced "
            "linears, not only removed layers"
        )
    _require_at_hand(factors)
    if whole := [name for name, factor in factors.items() if not factor.is_floating_point()]:
        raise UnsupportedModelError(
            f"{whole[0]} has the dtype {factors[whole[0]].dtype}; expected factors of a floating-point dtype"
        )
    return factors


def _require_at_hand(parameters: Mapping[str, nn.Parameter]) -> None:
    if offloaded := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise UnsupportedModelError(f"{offloaded[0]} is offloaded; load the model without offloading to train it")


@contextmanager
def requiring_gradients(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Parameters that require gradients until the block ends."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
