"""The size of a model: parameters and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Size:
    """Logical parameters and bytes; a tied weight counts once."""

    parameters: int
    bytes: int
    decoder_parameters: int  # those inside the decoder layers


def model_size(model: PreTrainedModel) -> Size:
    """Count the parameters and bytes of a model; a shared parameter counts once, also if it is offloaded.

    A quantised value is one parameter. Scales and the ``order`` of pivoted layers are none, but have bytes.

    Raises:
        UnsupportedModelError: if the model has no decoder layers that grasp knows.
    """
    from grasp.model.targets import decoder  # brings torch, like ``QUANTIZED``: the readers of reports need ``Size``

    parameters, orders = _stored(model)
    counts = _counts(model)
    return Size(
        parameters=sum(counts[id(p)] for p in parameters),
        bytes=sum(tensor.nbytes for tensor in (*parameters, *orders)),
        decoder_parameters=parameter_count(decoder(model).layers),
    )


def bytes_by_dtype(model: PreTrainedModel) -> dict[str, int]:
    """The bytes of ``model_size`` by the type of the numbers, most first: ``int8``, ``int4``, ``fp8``, ``bfloat16``…

    Scales of quantised weights are floating, and ``order`` is ``int32``.
    """
    from grasp_kernels.quantized import KINDS

    result: Counter[str] = Counter()
    for tensor in chain(*_stored(model)):
        result[KINDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))] += tensor.nbytes
    return dict(result.most_common())


def _stored(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters, a shared one once, and the ``order`` of pivoted layers."""
    tied = getattr(model, "all_tied_weights_keys", {})  # offloading splits a tied parameter into two on the meta device
    parameters: list[Tensor] = [
        p
        for name, p in model.named_parameters()  # torch omits duplicates
        if not (p.is_meta and name in tied)
    ]
    orders = [buffer for name, buffer in model.state_dict(keep_vars=True).items() if name.endswith(".order")]
    return parameters, orders


def parameter_count(module: nn.Module) -> int:
    """The parameters of a module as ``model_size`` counts them."""
    return sum(_counts(module).values())


def _counts(module: nn.Module) -> dict[int, int]:
    """The number of parameters in each tensor, by its id."""
    from grasp.model.quantized_linear import QUANTIZED

    counts = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for part in module.modules():
        if isinstance(part, QUANTIZED):
            tensors = part.named_parameters(recurse=False)
            values = {name: part.counts.get(name, 0) for name, _ in tensors if name != "bias"}
            counts |= {id(getattr(part, name)): count for name, count in values.items()}
    return counts
