from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import reference, routes
from tests.numerics import assert_accurate

pytest.importorskip("triton")

from grasp_kernels.gradient_configs import FULL_PRECISION, LARGE, SMALL, WIDE, Tile
from grasp_kernels.triton import singular_value_grad as kernel

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One pair per line: tokens, in_features, out_features, rank, bounds of the samples.
SHAPES = {
    "one token": (1, 16, 63, 1, [0, 1]),
    "below a tile": (33, 63, 128, 8, [0, 7, 7, 33]),
    "samples end on tiles": (256, 64, 16, 32, [0, 128, 256]),
    "samples straddle tiles": (200, 128, 63, 5, [0, 0, 1, 150, 150, 200]),
    "several rank tiles": (150, 63, 64, 144, [0, 129, 150]),
}
MOMENTS = [
    (False, "none"),
    (False, "token"),
    (False, "sample"),
    (True, "none"),
    (True, "token"),
    (True, "sample"),
]


def inputs(tokens: int, K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + R)
    shapes = ((tokens, K), (tokens, N), (N, R), (R, K))
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)


def check(run: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Tensor, ...], *options: object) -> None:
    exact = reference.singular_value_grad(*(tensor.double() for tensor in tensors), *options)
    plain = reference.singular_value_grad(*tensors, *options)
    for got, plain_part, exact_part in zip(run(*tensors, *options), plain, exact, strict=True):
        assert_accurate("singular_value_grad", tensors[0].dtype, got, plain_part, exact_part)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("per_sample", "second_moment"), MOMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_moment_is_the_references(shape: str, per_sample: bool, second_moment: str) -> None:
    *sizes, bounds = SHAPES[shape]
    tensors = inputs(*sizes, torch.float32)
    mask = torch.arange(sizes[0], device=DEVICE) % 3 != 1
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    check(kernel.singular_value_grad, tensors, cu_seqlens, per_sample, second_moment, mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("tile", [LARGE, SMALL, FULL_PRECISION], ids=["large", "small", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_and_tile_is_the_references(dtype: torch.dtype, tile: Tile, masked: bool) -> None:
    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return kernel.run(*arguments, tile)

    mask = (torch.arange(130, device=DEVICE) % 4 != 0) if masked else None
    check(run, inputs(130, 128, 63, 8, dtype), None, False, "token", mask)


@pytest.mark.parametrize("bounds", [[0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("second_moment", ["none", "token", "sample"])
def test_no_tokens_give_zeros(bounds: list[int], second_moment: str) -> None:
    tensors = inputs(0, 16, 16, 5, torch.float32)
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    for per_sample in (False, True):
        first, second = kernel.singular_value_grad(*tensors, cu_seqlens, per_sample, second_moment, None)
        assert first.tolist() == torch.zeros(len(bounds) - 1, 5)[slice(None) if per_sample else 0].tolist()
        assert second.shape == (first.shape if second_moment != "none" else (0,))
        assert not second.any()


def test_bounds_outside_the_tokens_read_no_other_memory() -> None:
    """The op refuses such bounds, but it does not see the bounds of a CUDA graph that is replayed."""
    tensors = inputs(40, 16, 16, 5, torch.float32)
    whole = torch.tensor([0, 40, 40], device=DEVICE)
    far = torch.tensor([-(10**6), 10**6, 2 * 10**6], device=DEVICE)
    for run in (kernel.singular_value_grad, routes.chunked):
        for got, expected in zip(*(run(*tensors, b, True, "token", None) for b in (far, whole)), strict=True):
            assert torch.equal(got, expected)


def test_samples_in_32_bit_bounds() -> None:
    cu_seqlens = torch.tensor([0, 100, 150], dtype=torch.int32, device=DEVICE)
    check(kernel.singular_value_grad, inputs(150, 16, 16, 5, torch.float32), cu_seqlens, True, "token", None)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.T.contiguous().T,
    "every other column": lambda tensor: torch.stack([tensor, tensor * torch.nan], dim=2)[:, :, 0],
    "a row's part": lambda tensor: torch.cat([tensor, tensor * torch.nan], dim=1)[:, : tensor.shape[1]],
}


@pytest.mark.parametrize("position", range(4), ids=["x", "grad_y", "U", "Vh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str, position: int) -> None:
    tensors = list(inputs(40, 64, 48, 16, torch.float32))
    tensors[position] = LAYOUTS[layout](tensors[position])
    check(kernel.singular_value_grad, tuple(tensors), None, False, "none", None)


# Tokens, in_features, out_features, rank, bounds of the samples. 8 programs run all tiles, some of them several.
WIDE_SHAPES = {
    "one sample, tail of every dimension": (300, 72, 136, 150, None),
    "samples straddle tiles": (700, 64, 128, 40, [0, 0, 1, 300, 300, 700]),
    "more tiles than programs": (520, 64, 64, 270, [0, 519, 520]),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "column_major"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
def test_the_wide_tile_is_the_references(shape: str, column_major: bool, dtype: torch.dtype) -> None:
    *sizes, bounds = WIDE_SHAPES[shape]
    x, grad_y, U, Vh = inputs(*sizes, dtype)
    if column_major:
        U, Vh = U.mT.contiguous().mT, Vh.mT.contiguous().mT
    mask = torch.arange(sizes[0], device=DEVICE) % 3 != 1
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return kernel.run(*arguments, WIDE)

    check(run, (x, grad_y, U, Vh), cu_seqlens, bounds is not None, "token", mask)
    check(run, (x, grad_y, U, Vh), cu_seqlens, False, "none", None)


def test_layouts_that_a_descriptor_can_describe() -> None:
    matrix = torch.empty(6, 16, dtype=torch.bfloat16)
    assert kernel.describable(matrix)
    assert kernel.describable(matrix[:, :11])
    assert kernel.describable(matrix[1:])
    assert not kernel.describable(matrix[:, 1:])  # starts of rows
    assert not kernel.describable(matrix.mT)
    assert not kernel.describable(torch.empty(6, 12, dtype=torch.bfloat16))
    assert not kernel.describable(matrix[:1].expand(6, 16))


@pytest.mark.slow
def test_the_wide_tile_compiles_without_spills_to_tma_loads_and_tensor_cores(tmp_path: Path) -> None:
    """In another process: here Triton interprets its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.aot",
        "--only",
        "wide tile, samples, token squares, mask, bfloat16",
    ]
    command += ["--architecture", "90", "--output", str(tmp_path / "aot.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    row = next(row for row in rows if row["kernel"] == "_singular_value_grad_wide_kernel")
    assert row["complaints"] == []  # spills, tensor cores, TMA, shared memory
    assert row["shared"] >= WIDE.stages * (WIDE.block_t + WIDE.block_r) * WIDE.block_k * 2
    assert set(row["tensor_core"]) == {"HGMMA"}


def test_masked_tokens_may_be_nan() -> None:
    x, grad_y, U, Vh = inputs(20, 16, 16, 5, torch.float32)
    mask = torch.arange(20, device=DEVICE) != 7
    kept = kernel.singular_value_grad(x[mask], grad_y[mask], U, Vh, None, False, "token", None)
    x[7] = torch.nan
    for got, expected in zip(
        kernel.singular_value_grad(x, grad_y, U, Vh, None, False, "token", mask), kept, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_two_runs_agree_bit_for_bit() -> None:
    tensors = inputs(300, 64, 64, 70, torch.float32)
    cu_seqlens = torch.tensor([0, 140, 300], device=DEVICE)
    first_run, second_run = (kernel.singular_value_grad(*tensors, cu_seqlens, False, "sample", None) for _ in range(2))
    for one, other in zip(first_run, second_run, strict=True):
        assert torch.equal(one, other)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x, grad_y, U, Vh = inputs(200, 32, 32, 8, torch.float32)
    alone, _ = kernel.singular_value_grad(x[70:], grad_y[70:], U, Vh, None, False, "none", None)
    x[:70] = torch.nan
    cu_seqlens = torch.tensor([0, 70, 200], device=DEVICE)
    both, _ = kernel.singular_value_grad(x, grad_y, U, Vh, cu_seqlens, True, "none", None)
    assert torch.equal(both[1], alone)


@pytest.mark.parametrize("aligned", [(8, 64), (16, 32)])
def test_aligned_factors_are_not_copied(aligned: tuple[int, int]) -> None:
    factor = torch.randn(aligned)
    assert kernel.loadable(factor, 0) is factor
    assert kernel.loadable(transposed := factor.mT, 1) is transposed
    row_major_U = torch.randn(32, 16)
    assert kernel.loadable(row_major_U, 1) is row_major_U


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(7, 63), lambda: torch.randn(63, 7).T, lambda: torch.randn(65)[1:].view(4, 16)]
)
def test_other_factors_are_copied_to_aligned_rows(make: Callable[[], Tensor]) -> None:
    for rank_axis, factor in enumerate((make(), make().mT)):
        copy = kernel.loadable(factor, rank_axis)
        assert torch.equal(copy, factor)
        assert copy.stride(1 - rank_axis) == 1
        assert copy.stride(rank_axis) % kernel.ALIGNMENT == 0
        assert copy.data_ptr() % 16 == 0


class Copies(TorchDispatchMode):
    """Counts copies of tensors, and the tensors that calls allocate."""

    copies = allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func is torch.ops.aten.copy_.default
        self.allocations += "empty" in func.name()
        return func(*args, **(kwargs or {}))


def test_a_call_copies_no_factor_that_an_earlier_call_copied() -> None:
    tensors = inputs(40, 63, 48, 5, torch.float32)
    first = torch.empty(5)
    counts = []
    for _ in range(3):
        with Copies() as count:  # of a plan: the interpreter, which runs it, copies all tensors
            kernel.plan(*tensors, None, "none", None, (first, first[:0]), FULL_PRECISION)
        counts.append((count.copies, count.allocations))
    assert counts == [(2, 3), (0, 1), (0, 1)]  # the copies of both factors; in every call the sums of tiles
    check(kernel.singular_value_grad, tensors, None, False, "none", None)
    for factor in tensors[2:]:
        factor *= 2
    check(kernel.singular_value_grad, tensors, None, False, "none", None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(4096, 2048, 1024, 512), (300, 1024, 2048, 81)])
def test_a_gpu_agrees_at_real_sizes(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, sizes[0] // 3, sizes[0]], device=DEVICE)
    tensors = inputs(*sizes, dtype)
    for run in (kernel.singular_value_grad, routes.chunked):
        check(run, tensors, cu_seqlens, True, "token", None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_a_cuda_graph_replays_on_new_samples() -> None:
    tensors = inputs(512, 256, 256, 64, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 512], device=DEVICE)
    kernel.singular_value_grad(*tensors, cu_seqlens, True, "none", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, _ = kernel.singular_value_grad(*tensors, cu_seqlens, True, "none", None)
    cu_seqlens.copy_(torch.tensor([0, 301, 512]))
    tensors[0].normal_()
    graph.replay()
    expected, _ = kernel.singular_value_grad(*tensors, cu_seqlens, True, "none", None)
    assert torch.equal(first, expected)
