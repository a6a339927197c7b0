"""The compiled modules: why one is missing, how the CUDA module gets its tensors, and where the C header is."""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

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


def in_place(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix, copied if the kernels cannot read it in place, and the stride of its rows in elements.

    They need rows that are contiguous and do not overlap.
    """
    if not matrix.is_contiguous():
        row, element = matrix.stride()
        if element == 1 and row >= matrix.shape[1]:
            return matrix, row
        matrix = matrix.contiguous()
    return matrix, matrix.shape[1]


def pointers(factors: Factors, output: Tensor) -> tuple[tuple[int, ...], Factors]:
    """A group as the CUDA module takes it (see csrc/groups.h), and the tensors it points to, to be kept alive."""
    U, s, Vh, bias, order, *_ = factors
    N, R = factors.out_features, U.shape[1]
    U, U_stride = in_place(U)
    Vh, Vh_stride = in_place(Vh)
    s_data = bias_data = s_dtype = order_data = 0
    if s is not None:
        s = s.contiguous()
        s_data, s_dtype = s.data_ptr(), DTYPE_CODES[s.dtype]
    if bias is not None:
        bias = bias.contiguous()
        bias_data = bias.data_ptr()
    if order is not None:
        order = order.contiguous()
        order_data = order.data_ptr()
    addresses = (U.data_ptr(), s_data, Vh.data_ptr(), bias_data, output.data_ptr())
    sizes = (U_stride, Vh_stride, output.stride(0), N, R, s_dtype)
    return (*addresses, *sizes, order_data), Factors(U, s, Vh, bias, order)
