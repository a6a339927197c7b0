"""CPU: the compiled kernels of csrc/cpu, ``((x @ Vh.mT) * s) @ U.mT + bias`` for few rows, and the gated linear unit.

They run on PyTorch's own OpenMP threads; ``torch.get_num_threads()`` is their number.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .extension import DTYPE_CODES, scales_alike
from .reference import ACTIVATIONS, Factors

# grasp_isa in csrc/lowrank.h
INSTRUCTION_SETS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx": 5}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # grasp_activation
_UNGATED = -1


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """``act(gate(x)) * up(x)``, in one parallel region unless factors are pivoted; x is (M, K)."""
    if gate.order is None and up.order is None:
        return run(x, (gate, up), activation=activation)[0]
    gate_y, up_y = run(x, (gate, up))
    return ACTIVATIONS[activation].forward(gate_y) * up_y


def run(
    x: Tensor,
    factors: Sequence[Factors],
    outputs: Sequence[Tensor] | None = None,
    *,
    activation: str | None = None,
    instruction_set: str = "auto",
) -> list[Tensor]:
    """Several low-rank linears of one input in one parallel region, or their gated linear unit.

    Args:
        x: (M, K); fp32, fp16 or bf16 on the CPU.
        factors: dtype of x, int8 or int4; s and scales may be fp32. Tensors that the kernels cannot read in place are
            copied first.
        outputs: filled if given, (M, N_i).
        activation: if given, ``factors`` are the gate and the up projection, and there is one output.
        instruction_set: one of ``INSTRUCTION_SETS``; ``"auto"`` is the best one for the call.

    Raises:
        RuntimeError: if this processor or this build lacks the instruction set.
    """
    if outputs is None:
        outputs = [x.new_empty(x.shape[0], group.out_features) for group in factors[: 1 if activation else None]]
    code = _UNGATED if activation is None else _ACTIVATIONS[activation]
    _run(x, tuple(factors), tuple(outputs), code, INSTRUCTION_SETS[instruction_set])
    return list(outputs)


def _run(
    x: Tensor, groups: tuple[Factors, ...], outputs: tuple[Tensor, ...], activation: int, instruction_set: int
) -> None:
    arguments = (outputs, activation, torch.get_num_threads(), instruction_set)
    if _module().run(x, groups, *arguments):
        return
    if not _module().run(x.contiguous(), tuple(map(_contiguous, groups)), *arguments):
        raise RuntimeError("the kernel cannot read copies of the tensors; please report this bug of grasp")


def _contiguous(group: Factors) -> Factors:
    tensors = (*group[:-2], *scales_alike(group))
    return Factors(*(None if tensor is None else tensor.contiguous() for tensor in tensors))  # type: ignore[arg-type]


def open_direct_path(
    types: tuple[type[Tensor], ...], watchers: tuple[Callable[[], object], ...], auto_rows: Mapping[torch.dtype, int]
) -> dict[str, Callable[..., Any]]:
    """The compiled ops of csrc/direct.h, by name. Their limits hold for the whole process until the next call of this.

    Args:
        types: the exact types of tensors that they accept; ``torch.Tensor`` is the first.
        watchers: functions without arguments; a true answer means that a mode, a transform or a tracer is active.
        auto_rows: most rows of x for ``"auto"``, by dtype.
    """
    module = _module()
    rows = tuple(auto_rows[dtype] for dtype in DTYPE_CODES)
    module.set_up(
        *(types, watchers, vars(forward_ad), Tensor.is_neg, torch.is_grad_enabled, torch.get_num_threads, rows)
    )
    return {"lowrank_linear": module.lowrank_linear, "lowrank_linear_grouped": module.lowrank_linear_grouped}


def supports(instruction_set: str) -> bool:
    """Whether this build has an instruction set and this processor runs it."""
    return bool(_module().supports(INSTRUCTION_SETS[instruction_set]))


@functools.cache
def _module() -> Any:
    return importlib.import_module("._cpu", __package__)
