"""The compiled modules: why one is missing, how the CUDA module gets its tensors, and where the C header is."""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from .quantized import columns_per_scale
from .reference import Factors

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # grasp_dtype in csrc/lowrank.h


def module_missing(name: str, needs: str) -> str | None:
    """The reason why a compiled module cannot be used, or ``None`` if it loads.

    Args:
        name: the module's full name.
        needs: the requirements of its build, for the message.
    """
    if importlib.util.find_spec(name) is None:
        if foreign := _built_for_others(name):
            return f"its module is for {foreign}, and this is Python for {sysconfig.get_config_var('SOABI')}"
        return f"its module was not built; the build needs {needs} when the package is installed"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"its module does not load: {error}"
    return None


def _built_for_others(name: str) -> str:
    """The other Pythons and platforms that a compiled module beside this file was built for, from its files' names."""
    stem = name.rpartition(".")[2]
    builds = {path.name.split(".")[1] for path in Path(__file__).parent.glob(f"{stem}.*.so")}
    return " and ".join(sorted(builds - {sysconfig.get_config_var("SOABI")}))


def get_include() -> str:
    """The folder of ``lowrank.h``, the C interface of the kernels. The library to link is in the package's ``lib``.

    Example:
        >>> import os
        >>> from grasp_kernels import get_include
        >>> "lowrank.h" in os.listdir(get_include())
        True
    """
    package = Path(__file__).parent
    installed = package / "include"
    return str(installed if installed.is_dir() else package.parents[1] / "csrc")


BITS = {torch.int8: 8, torch.uint8: 4}  # of a quantised matrix; others have the dtype of x


def in_place(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix, copied if the kernels cannot read it in place, and the stride of its rows in stored elements.

    They need rows that are contiguous and do not overlap.
    """
    if not matrix.is_contiguous():
        row, element = matrix.stride()
        if element == 1 and row >= matrix.shape[1]:
            return matrix, row
        matrix = matrix.contiguous()
    return matrix, matrix.shape[1]


def pointers(factors: Factors, output: Tensor, in_features: int) -> tuple[tuple[int, ...], Factors]:
    """A group as csrc/bindings_cuda.cpp takes it, and the tensors it points to, to be kept alive."""
    N, R = factors.out_features, factors.Vh.shape[0]
    U, U_stride = in_place(factors.U)
    Vh, Vh_stride = in_place(factors.Vh)
    vectors = (factors.s, factors.bias, factors.order, *scales_alike(factors))
    s, bias, order, U_scales, Vh_scales = (None if vector is None else vector.contiguous() for vector in vectors)
    scales = Vh_scales if U_scales is None else U_scales
    addresses = (U.data_ptr(), _address(s), Vh.data_ptr(), _address(bias), output.data_ptr())
    sizes = (U_stride, Vh_stride, output.stride(0), N, R, _code(s), _address(order))
    bits = (BITS.get(U.dtype, 0), BITS.get(Vh.dtype, 0))
    groups = (columns_per_scale(U_scales, R), columns_per_scale(Vh_scales, in_features))
    quantized = (_address(U_scales), _address(Vh_scales), _code(scales), *bits, *groups)
    return (*addresses, *sizes, *quantized), Factors(U, s, Vh, bias, order, U_scales, Vh_scales)


def scales_alike(factors: Factors) -> tuple[Tensor | None, Tensor | None]:
    """The scales of U and Vh in one dtype, which the kernels expect."""
    U, Vh = factors.U_scales, factors.Vh_scales
    return (U, Vh) if U is None or Vh is None or U.dtype == Vh.dtype else (U.float(), Vh.float())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]
