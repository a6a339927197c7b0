"""Dense quantised parts of vLLM's linears in vLLM's own weight-only kernels, such as Marlin and Machete."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from grasp.method.storage import Storage
from grasp.serving.parts import Part

logger = init_logger(__name__)

# By the dtype of stored values: unsigned, with 128 and 8 for zero.
_WEIGHT_TYPES = {"I8": scalar_types.uint8b128, "U8": scalar_types.uint4b8}
_DTYPES = (torch.bfloat16, torch.float16)  # Marlin does not check the dtype


class DenseKernel:
    """A kernel of vLLM with a quantised weight: ``x @ weight.mT``.

    Args:
        kind: the class of the kernel.
        config: for which it was chosen.
        values: (N, K) int8, or (N, K / 2) uint8 with two int4 each; contiguous. The kernel may keep the memory.
        scales: (N, groups), in the dtype of the activations, contiguous. The kernel may keep the memory.
    """

    def __init__(self, kind: type[MPLinearKernel], config: MPLinearLayerConfig, values: Tensor, scales: Tensor) -> None:
        self.linear = _linear_of_vllm(config)
        layout = {"input_dim": 1, "output_dim": 0, "weight_loader": None}
        factor = Fraction(32, config.weight_type.size_bits)
        self.linear.weight_packed = PackedvLLMParameter(
            data=packed(values), packed_dim=1, packed_factor=factor, **layout
        )
        self.linear.weight_scale = GroupQuantScaleParameter(data=scales, **layout)
        self.kernel = kind(config, "weight_packed", "weight_scale", "weight_zero_point")
        self.kernel.process_weights_after_loading(self.linear)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)."""
        return self.kernel.apply_weights(self.linear, x)

    def copy_(self, other: DenseKernel) -> None:
        """Take the weight of another kernel; CUDA graphs still find the tensors where they were."""
        for name, parameter in self.linear.named_parameters():
            parameter.data.copy_(other.linear.get_parameter(name))


def _linear_of_vllm(config: MPLinearLayerConfig) -> Any:
    """A module for the tensors of a kernel, with the attributes of vLLM's linears that some kernels read.

    It has no bias, which some kernels would rearrange: the caller adds it.
    """
    linear: Any = nn.Module()
    columns, rows = config.partition_weight_shape
    linear.input_size_per_partition, linear.output_partition_sizes = columns, [rows]
    linear.params_dtype, linear.has_bias, linear.bias = config.act_type, False, None
    return linear


class Run(NamedTuple):
    """Neighbouring parts of a linear that are computed together, by a kernel of vLLM or else by an op of grasp."""

    parts: slice
    outputs: slice
    kernel: DenseKernel | None = None


def make_runs(parts: Sequence[Part], values: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> list[Run]:
    """Neighbours that are dense and quantised with one storage become one kernel of vLLM.

    Args:
        parts: of one linear. A dense quantised one holds ``weight_scales``.
        values: the ``weight`` of each part; that of other parts is not read.
        scales: the ``weight_scales`` of each part, likewise.
        dtype: of the activations.

    Returns:
        The runs. If vLLM lacks a kernel for a dense part, all parts are one run without a kernel.
    """
    runs, start = [], 0
    for storage, neighbours in itertools.groupby(parts, _dense_storage):
        stop = start + len(list(neighbours))
        run = one_run(parts, start, stop)
        if storage is not None:
            choice = choose_kernel(storage, run.outputs.stop - run.outputs.start, parts[start].width, dtype)
            if choice is None:
                return [one_run(parts)]
            kernel = DenseKernel(*choice, torch.cat(values[start:stop]), torch.cat(scales[start:stop]))
            run = run._replace(kernel=kernel)
        runs.append(run)
        start = stop
    return runs


def _dense_storage(part: Part) -> Storage | None:
    return part.local_storage if "weight_scales" in part.held else None


def one_run(parts: Sequence[Part], start: int = 0, stop: int | None = None) -> Run:
    """The parts from ``start`` to ``stop``, without a kernel of vLLM."""
    stop = len(parts) if stop is None else stop
    first, last = (sum(part.linear.rows for part in parts[:border]) for border in (start, stop))
    return Run(slice(start, stop), slice(first, last))


def renew_(before: Sequence[Run], runs: Sequence[Run]) -> Sequence[Run]:
    """The runs after weights were loaded: again into the kernels of those before, if they have some.

    CUDA graphs read the tensors of the first kernels.
    """
    if not any(run.kernel for run in before):
        return runs
    for old, new in zip(before, runs, strict=True):
        if old.kernel is not None and new.kernel is not None:
            old.kernel.copy_(new.kernel)
    return before


def choose_kernel(
    storage: Storage, rows: int, columns: int, dtype: torch.dtype
) -> tuple[type[MPLinearKernel], MPLinearLayerConfig] | None:
    """The class of vLLM's best kernel on this platform for a weight (rows, columns), and its configuration.

    Returns:
        ``None`` if vLLM has none; its log says why.
    """
    group = storage.group if storage.scales(columns) > 1 else None
    multiple = group or 32 // storage.bits
    reason = ""
    if storage.dtype not in _WEIGHT_TYPES:
        reason = "kernels are asked for integers only"
    elif dtype not in _DTYPES:
        reason = f"activations are {dtype}; expected bfloat16 or float16"
    elif columns % multiple:
        reason = f"it has {columns} columns; expected a multiple of {multiple}"
    else:
        shape = (columns, rows)
        config = MPLinearLayerConfig(shape, shape, _WEIGHT_TYPES[storage.dtype], dtype, group or -1, zero_points=False)
        try:
            return choose_mp_linear_kernel(config), config
        except ValueError as error:
            reason = str(error)
    logger.info_once("No kernel of vLLM takes a dense linear in %s, which every call dequantises: %s", storage, reason)
    return None


def packed(values: Tensor) -> Tensor:
    """Unsigned integers as GPTQ packs them, (N, K * bits / 32) int32: the first column is in the lowest bits.

    Args:
        values: (N, K) int8, to which 128 is added, or (N, K / 2) uint8 with two int4 each, which are unsigned already.

    Example:
        >>> packed(torch.tensor([[-128, -127, -128, -128]], dtype=torch.int8))
        tensor([[256]], dtype=torch.int32)
    """
    unsigned = values.view(torch.uint8) ^ 128 if values.dtype == torch.int8 else values
    return unsigned.view(torch.int32)
