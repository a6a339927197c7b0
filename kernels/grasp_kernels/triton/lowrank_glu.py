"""Triton: ``act(gate(x)) * up(x)`` for two low-rank linears; one dual expand multiplies both in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grasp_kernels.launch_configs import Config, choose
from grasp_kernels.packing import RANK_MULTIPLE
from grasp_kernels.reference import ACTIVATIONS, Factors
from grasp_kernels.triton.launch import Gpu, Launch, gpu_of, run_all
from grasp_kernels.triton.lowrank_linear import (
    expand_gemm,
    hidden_gemm,
    launch_key,
    launch_options,
    max_rank,
    new_hidden,
    row_block,
    row_major,
    shrink_launch,
    tiles_ahead,
    unit_stride,
)
from grasp_kernels.triton.prepared import PREPARED, describe, prepare
from grasp_kernels.triton.tiles import expand_tile, load_bias, load_tiles, store_rows, wait_and_release


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation, in fp32."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit(do_not_specialize=["M"])
def _lowrank_glu_expand_kernel(
    gate_u_ptr,  # [N, gate_R]
    gate_s_ptr,  # [gate_R]
    gate_bias_ptr,  # [N]
    gate_h_ptr,  # [SPLITS, M, gate_R]
    up_u_ptr,  # [N, up_R]
    up_s_ptr,  # [up_R]
    up_bias_ptr,  # [N]
    up_h_ptr,  # [SPLITS, M, up_R]
    y_ptr,  # [M, N]
    M,
    N,
    gate_R,
    up_R,
    gate_stride_un,
    up_stride_un,
    gate_stride_hm,
    up_stride_hm,
    gate_stride_hs,
    up_stride_hs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALES: tl.constexpr,  # bit 0: gate has an s, bit 1: up has one
    BIASES: tl.constexpr,  # bit 0: gate has a bias, bit 1: up has one
    STAGES: tl.constexpr,
    TILES: tl.constexpr,  # of each U, loaded before the wait for h
    LOOPED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_u = load_tiles(gate_u_ptr, offs_n, N, gate_R, gate_stride_un, BLOCK_R, TILES)
    up_u = load_tiles(up_u_ptr, offs_n, N, up_R, up_stride_un, BLOCK_R, TILES)
    if DEPENDENT:
        wait_and_release()
    gate = expand_tile(
        *(gate_u, gate_u_ptr, gate_h_ptr, gate_s_ptr, gate_R, offs_m, offs_n, M, N, gate_R),
        *(gate_stride_un, gate_stride_hm, gate_stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, SCALES % 2 == 1, STAGES, LOOPED),
    )
    up = expand_tile(
        *(up_u, up_u_ptr, up_h_ptr, up_s_ptr, up_R, offs_m, offs_n, M, N, up_R),
        *(up_stride_un, up_stride_hm, up_stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, SCALES >= 2, STAGES, LOOPED),
    )
    gate += load_bias(gate_bias_ptr, N, offs_n, BIASES % 2 == 1)
    up += load_bias(up_bias_ptr, N, offs_n, BIASES >= 2)
    store_rows(y_ptr, _activate(gate, ACTIVATION) * up, offs_m, offs_n, M, N, N)


# --- launchers --------------------------------------------------------------------------------------------------------


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """``act(gate(x)) * up(x)``; x is (M, K). Arguments and result as in ``reference.lowrank_glu``."""
    factors = [gate, up]
    description, addresses = describe(x, factors, None)
    key = ("lowrank_glu", activation, description)
    pair = PREPARED.get(key)
    if pair is not None and (replayed := pair.replay(x, addresses, None)) is not None:
        return replayed[0]
    config = choose("lowrank_glu", gpu_of(x.device), launch_key(x, factors))
    output, launches, binaries = _run(x, gate, up, activation, config)
    if len(launches) == 2:
        prepare(key, addresses, [output], launches, binaries)
    return output


def run(x: Tensor, gate: Factors, up: Factors, activation: str, config: Config) -> Tensor:
    """Run a call with a given configuration: shrink by kernel (``pair``) or matrix product (``gemms``); dual expand."""
    return _run(x, gate, up, activation, config)[0]


def _run(
    x: Tensor, gate: Factors, up: Factors, activation: str, config: Config
) -> tuple[Tensor, list[Launch], list[Any]]:
    """The output of a call, its launches, and their binaries."""
    Vhs = [gate.Vh, up.Vh]
    output = x.new_empty(x.shape[0], gate.U.shape[0])
    if output.numel() == 0:
        return output, [], []
    if config.path == "gemms" and x.dtype == torch.float32:  # no tensor cores: the vendor's products are faster
        gate_y, up_y = (expand_gemm(h, group) for h, group in zip(hidden_gemm(x, Vhs), (gate, up), strict=True))
        return ACTIVATIONS[activation].forward(gate_y).mul_(up_y), [], []
    if config.path == "gemms":
        hidden = [h.unsqueeze(0) for h in hidden_gemm(x, Vhs)]
        launches = [expand_launch(row_major(gate), row_major(up), hidden, output, activation, config, dependent=False)]
    else:
        launches = plan(x, gate, up, activation, output, config, gpu_of(x.device))
    return output, launches, run_all(launches, x.device)


def plan(
    x: Tensor, gate: Factors, up: Factors, activation: str, output: Tensor, config: Config, gpu: Gpu
) -> list[Launch]:
    """The two launches of a call, in order; ``output`` is contiguous (M, N)."""
    x, gate, up = unit_stride(x), row_major(gate), row_major(up)
    hidden = new_hidden(x, [gate, up], config)
    read = hidden
    if config.reduce:
        read = hidden[-1:] if x.shape[0] <= 2 else hidden[-1:].view(x.dtype)
    column = triton.cdiv(gate.U.shape[1], RANK_MULTIPLE) * RANK_MULTIPLE
    halves = [read[:, :, :column], read[:, :, column:]]
    return [
        shrink_launch(x, [gate.Vh, up.Vh], hidden, config, gpu),
        expand_launch(gate, up, halves, output, activation, config, dependent=gpu.dependent_launch),
    ]


def expand_launch(
    gate: Factors,
    up: Factors,
    hidden: Sequence[Tensor],
    output: Tensor,
    activation: str,
    config: Config,
    *,
    dependent: bool,
) -> Launch:
    """The dual expand: ``hidden`` is h of gate and of up, (splits, M, at least R), fp32 or the dtype of the output.

    With ``dependent`` it starts before the previous launch ends, loads U and waits.
    """
    rows, width = output.shape
    block_m = row_block(rows, config)
    arguments: dict[str, Any] = {}
    for name, (U, s, _, bias, _), h in (("gate", gate, hidden[0]), ("up", up, hidden[1])):
        arguments |= {
            f"{name}_u_ptr": U,
            f"{name}_s_ptr": U if s is None else s,  # a placeholder that is not read
            f"{name}_bias_ptr": U if bias is None else bias,
            f"{name}_h_ptr": h,
            f"{name}_R": U.shape[1],
            f"{name}_stride_un": U.stride(0),
            f"{name}_stride_hm": h.stride(1),
            f"{name}_stride_hs": h.stride(0) if len(h) > 1 else 0,  # Triton compiles for its divisibility
        }
    rank = max_rank([gate, up])
    loaded = tiles_ahead(rows, [gate, up], config, count=2) if config.path == "pair" else 0
    return Launch(
        _lowrank_glu_expand_kernel,
        (triton.cdiv(width, config.expand_block_n), triton.cdiv(rows, block_m)),
        {
            **arguments,
            "y_ptr": output,
            "M": rows,
            "N": width,
            "BLOCK_M": block_m,
            "BLOCK_N": config.expand_block_n,
            "BLOCK_R": config.expand_block_r,
            "SPLITS": hidden[0].shape[0],
            "SCALES": (gate.s is not None) + 2 * (up.s is not None),
            "BIASES": (gate.bias is not None) + 2 * (up.bias is not None),
            "STAGES": config.stages,
            "TILES": loaded,
            "LOOPED": rank > loaded * config.expand_block_r,
            "DEPENDENT": dependent,
            "ACTIVATION": activation,
        },
        launch_options(config.expand_warps, config.stages, dependent),
    )
