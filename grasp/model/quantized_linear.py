"""Linears and embeddings with int8, int4 or fp8 weights, low-rank or dense. The layout is that of ``grasp_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint
from transformers import Conv1D

from grasp.errors import UnsupportedModelError
from grasp.method.storage import OUTPUTS, Storage
from grasp.model.dense import DenseLinear, dense_shape
from grasp.model.lowrank_linear import LowRankLinear, Pivotable
from grasp_kernels import Factors, lowrank_linear
from grasp_kernels.dispatch import CPU_ROWS_QUANTIZED
from grasp_kernels.quantized import dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self  # typing has it from Python 3.11 on

_PLAIN = ("FalconLinear", "KernelLinear")  # subclasses of ``nn.Linear`` that compute the same in a forward of their own
VALUES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}  # by the dtype of a file


def _takes_gradient(scales: Tensor) -> bool:
    """Whether a call of now must be differentiable with respect to scales, which the kernels are not."""
    return scales.requires_grad and torch.is_grad_enabled()


def _fixed(*shape: int, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)


class _Quantized(nn.Module):
    """A module whose fp8 values ``Module.to`` does not cast, although they are floating to PyTorch.

    Attributes:
        storage: of its matrices.
        counts: the number of values in each of them.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.counts: dict[str, int] = {}

    def _add(self, name: str, rows: int, depth: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Register a quantised matrix, (rows, depth), without values, and its scales of a dtype."""
        self.counts[name] = rows * depth
        stored = self.storage.columns(depth)
        self.register_parameter(name, _fixed(rows, stored, dtype=VALUES[self.storage.dtype], device=device))
        scales = _fixed(rows, self.storage.scales(depth), dtype=dtype, device=device)
        self.register_parameter(f"{name}_scales", scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            cast = tensor.dtype == torch.float8_e4m3fn and new.dtype != tensor.dtype
            return tensor.to(new.device) if cast else new

        return super()._apply(keep, recurse)


class QuantizedLowRankLinear(_Quantized, Pivotable):
    """A ``LowRankLinear`` whose factors are quantised.

    The parameters are U and Vh, with ``U_scales`` and ``Vh_scales``, and bias (N,) or ``None``. Gradients flow to the
    input, and to scales that require them. The buffer ``order`` is that of a pivoted layer.

    Args:
        layer: gives shape, rank, form, bias and dtype of the scales; its factors are not read.
        storage: of both factors.
        device: of the parameters.

    Example:
        >>> layer = QuantizedLowRankLinear(LowRankLinear(16, 8, 3), Storage(8))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 8])
    """

    U_scales: nn.Parameter
    Vh_scales: nn.Parameter

    def __init__(self, layer: LowRankLinear, storage: Storage, device: torch.device | str | None = None) -> None:
        super().__init__(storage)
        self.in_features, self.out_features, self.rank = layer.in_features, layer.out_features, layer.rank
        self.backend = layer.backend
        self._add("U", layer.U.shape[0], self.rank, layer.U.dtype, device)
        self._add("Vh", self.rank, self.in_features, layer.U.dtype, device)
        bias = None if layer.bias is None else _fixed(self.out_features, dtype=layer.U.dtype, device=device)
        self.register_parameter("bias", bias)
        order = None if layer.order is None else torch.arange(self.out_features, dtype=torch.int32, device=device)
        self.register_buffer("order", order)

    @property
    def factors(self) -> Factors:
        """The arguments of the ops."""
        return Factors(self.U, None, self.Vh, self.bias, self.order, self.U_scales, self.Vh_scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        _check_input(x, self.in_features, "U_scales", self.U_scales)
        if _takes_gradient(self.U_scales) or _takes_gradient(self.Vh_scales):
            return checkpoint(self._differentiable, x, use_reentrant=False)
        return lowrank_linear(x, *self.factors, backend=self.backend)

    def _differentiable(self, x: Tensor) -> Tensor:
        return lowrank_linear(x, *self.factors.dequantized(self.in_features, x.dtype), backend=self.backend)

    def dequantized(self) -> LowRankLinear:
        """The layer with floating factors, in the dtype of the scales."""
        U, _, Vh, _, order = self.factors.dequantized(self.in_features, self.U_scales.dtype)[:5]
        layer = LowRankLinear(
            *(self.in_features, self.out_features, self.rank, self.bias is not None),
            pivoted=order is not None,
            device=U.device,
            dtype=U.dtype,
        )
        layer.set_factors_(U, Vh, order)
        if layer.bias is not None and self.bias is not None:
            layer.bias.data.copy_(self.bias)
        return layer.train(self.training)

    def dense_weight(self) -> Tensor:
        """The weight, (N, K) in fp32 (fp64 for fp64)."""
        return self.dequantized().dense_weight()

    def extra_repr(self) -> str:
        """Shape, rank, form and bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, {'pivoted, ' * (self.order is not None)}{_described(self.storage)}"
        )


# Rows of x up to which a kernel reads the quantised weight. More are multiplied by a dequantised copy, which moves at
# least five times the bytes. 16 rows are one tile of a GPU's kernel; not measured on one.
KERNEL_ROWS = {"cpu": CPU_ROWS_QUANTIZED, "cuda": dict.fromkeys(CPU_ROWS_QUANTIZED, 16)}
MOST_ELEMENTS = 2**31  # of a weight on a GPU: offsets in Triton's kernels have 32 bits


def quantized_product(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, others: Tensor, order: Tensor
) -> Tensor:
    """``x @ W.mT + bias``, (..., N), of a quantised weight: the Vh of pivoted factors of full rank.

    Args:
        x: (..., K), floating.
        weight: (N, K), as ``grasp_kernels.quantized`` stores it.
        scales: (N, groups).
        bias: (N,).
        others: (0, N), the rows that are no pivots.
        order: 0, 1, …, N − 1 in int32.
    """
    fits = x.is_cpu or weight.numel() < MOST_ELEMENTS
    # An exported program has one path for any number of rows; the op chooses when it is called.
    if fits and (is_exporting() or x.numel() <= x.shape[-1] * KERNEL_ROWS.get(x.device.type, {}).get(x.dtype, 0)):
        others = others if others.dtype == x.dtype else others.to(x.dtype)  # the scales may have another dtype by now
        return lowrank_linear(x, others, None, weight, bias, order, None, scales)
    return F.linear(x, dequantize(weight, scales, x.shape[-1], x.dtype), bias)


class QuantizedLinear(_Quantized):
    """A dense linear whose weight is quantised.

    The parameters are weight, (N, K) int8 or (N, ⌈K / 2⌉) uint8, ``weight_scales``, and bias (N,) or ``None``.
    Gradients flow to the input, and to scales that require them. Few rows are multiplied by the kernel of the low-rank
    linears, see ``quantized_product``.

    Args:
        linear: gives shape, bias and dtype of the scales; its weight is not read.
        storage: of the weight.
        device: of the parameters.

    Example:
        >>> layer = QuantizedLinear(nn.Linear(16, 8), Storage(4, 32))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 8])
    """

    weight: nn.Parameter
    weight_scales: nn.Parameter
    bias: nn.Parameter | None
    others: Tensor  # U, (0, N)
    order: Tensor  # (N,) int32

    def __init__(self, linear: DenseLinear, storage: Storage, device: torch.device | str | None = None) -> None:
        super().__init__(storage)
        self.out_features, self.in_features = dense_shape(linear)
        scales = linear.weight.dtype
        self._add("weight", self.out_features, self.in_features, scales, device)
        bias = None if linear.bias is None else _fixed(self.out_features, dtype=scales, device=device)
        self.register_parameter("bias", bias)
        self.register_buffer("others", torch.empty(0, self.out_features, dtype=scales, device=device), persistent=False)
        order = torch.arange(self.out_features, dtype=torch.int32, device=device)
        self.register_buffer("order", order, persistent=False)

    def renew_buffers_(self) -> None:
        """Fill the buffers that no checkpoint has, where they are; the parameters may be offloaded."""
        self.order = torch.arange(self.out_features, dtype=torch.int32, device=self.order.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        _check_input(x, self.in_features, "weight_scales", self.weight_scales)
        if _takes_gradient(self.weight_scales):
            return checkpoint(self._differentiable, x, use_reentrant=False)
        return quantized_product(x, self.weight, self.weight_scales, self.bias, self.others, self.order)

    def _differentiable(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize(self.weight, self.weight_scales, self.in_features, x.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight, (N, K) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.weight_scales.dtype, torch.float32)
        return dequantize(self.weight, self.weight_scales, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{_described(self.storage)}"
        )


def quantized_rows(ids: Tensor, weight: Tensor, scales: Tensor, depth: int) -> Tensor:
    """The rows of a quantised matrix with ``depth`` columns: (...) int64 → (..., depth) in the dtype of the scales."""
    stored, of_rows = (F.embedding(ids.flatten(), tensor) for tensor in (weight, scales))
    return dequantize(stored, of_rows, depth, scales.dtype).view(*ids.shape, depth)


class QuantizedEmbedding(_Quantized):
    """An embedding with int8 or int4 rows. An output layer may share its tensors.

    Args:
        embedding: gives the shape, the dtype of the result and, as Gemma's do, a factor ``embed_scale``.
        storage: of the rows; integers.
        device: of the parameters.
    """

    weight: nn.Parameter
    weight_scales: nn.Parameter

    def __init__(self, embedding: nn.Embedding, storage: Storage, device: torch.device | str | None = None) -> None:
        super().__init__(storage)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self._add("weight", self.num_embeddings, self.embedding_dim, embedding.weight.dtype, device)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 → (..., embedding_dim) in the dtype of the scales."""
        rows = quantized_rows(ids, self.weight, self.weight_scales, self.embedding_dim)
        return rows if self.factor == 1.0 else rows * rows.new_tensor(self.factor)

    def dense_weight(self) -> Tensor:
        """The weight, (V, K) in fp32 (fp64 for fp64), without the factor."""
        dtype = torch.promote_types(self.weight_scales.dtype, torch.float32)
        return dequantize(self.weight, self.weight_scales, self.embedding_dim, dtype)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {_described(self.storage)}"


QuantizedModule = QuantizedLowRankLinear | QuantizedLinear | QuantizedEmbedding
QUANTIZED = (QuantizedLowRankLinear, QuantizedLinear, QuantizedEmbedding)


def is_linear(module: nn.Module) -> TypeGuard[DenseLinear]:
    """Whether a dense module returns ``x @ weight.mT + bias``; a subclass may do more, such as a router of experts."""
    if not isinstance(module, (nn.Linear, Conv1D)) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # the last is of ``nn.MultiheadAttention``, which reads its weight
    kind = type(module)
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _PLAIN


def quantized_like(
    module: nn.Module, storage: Storage, device: torch.device | str | None = None
) -> QuantizedModule | None:
    """A quantised module without values that can replace ``module``, or ``None`` if there is none for its class.

    Embeddings of other classes, such as OPT's of positions, change the ids. They have none. None has floats of 8 bits.
    """
    if isinstance(module, LowRankLinear):
        return QuantizedLowRankLinear(module, storage, device)
    if is_linear(module):
        return QuantizedLinear(module, storage, device)
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")):
        return QuantizedEmbedding(module, OUTPUTS if storage.kind == "fp" else storage, device)
    return None


def storage_outside(model: PreTrainedModel, module: nn.Module, linears: Storage) -> Storage:
    """How a linear or embedding outside of the decoder layers is stored if their linears have a storage.

    It has 8 bits and one scale per row. An embedding of the input has the 4 bits of the linears, unless the output
    layer shares it: on Qwen2.5-1.5B that costs 0.001 nats, 4 bits for the output layer cost 0.038.
    """
    if linears.bits != 4 or module is not model.get_input_embeddings():
        return OUTPUTS
    output = model.get_output_embeddings()
    shared = output is not None and output.get_parameter("weight") is module.get_parameter("weight")
    return OUTPUTS if shared else linears


def is_quantized(model: nn.Module) -> bool:
    """Whether a module of the model is."""
    return any(isinstance(module, QUANTIZED) for module in model.modules())


def require_floating_factors(model: nn.Module) -> None:
    """Refuse a model with quantised low-rank linears.

    Raises:
        UnsupportedModelError: if there is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLowRankLinear):
            raise UnsupportedModelError(
                f"the factors of {name} are quantised; expected floating ones. Take the checkpoint that `grasp "
                "quantize` was given"
            )


def _check_input(x: Tensor, in_features: int, name: str, scales: Tensor) -> None:
    """Refuse an input that does not suit a layer, as ``nn.Linear`` does; packed weights do not show their width.

    Raises:
        ValueError: if the width differs, or the dtype outside of autocast.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x must be (..., {in_features}), got {tuple(x.shape)}")
    if x.dtype != scales.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x must have the dtype of {name}, {scales.dtype}, got {x.dtype}")


def _described(storage: Storage) -> str:
    return f"bits={storage.option}" + (f", group={storage.group}" if storage.group else "")
