"""Counters, and the memory that calls keep, on a simulated GPU: its tensors are on the CPU, and nothing is launched."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import cudagraph_trees
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grasp.bench.tuning import SHAPES
from grasp_kernels import Factors, cuda, dispatch
from grasp_kernels import counters as module
from grasp_kernels.counters import counters
from grasp_kernels.shapes import parse_shape
from tests.ops.inputs import factors, normal, seeded

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROWS = {"cuda": (1, 2, 4, 16), "triton": (1, 2, 4, 16, 64)}
PATHS = {  # of Triton; all but "chosen" with counters
    "lowrank_linear": ("chosen", "pair", "fused"),
    "lowrank_linear_grouped": ("chosen", "pair", "fused"),
    "lowrank_glu": ("chosen", "pair"),
    "singular_value_grad": ("chosen",),
}


class Card:
    """The state of the simulated GPU."""

    stream = 7
    capturing = False


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    def current_stream(*_: object) -> SimpleNamespace:
        return SimpleNamespace(device_index=0, cuda_stream=card.stream, synchronize=lambda: None)

    def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *sizes, device=None, **options: make(*sizes, **options)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: card.stream, raising=False)
    monkeypatch.setattr(torch, "empty", on_cpu(torch.empty))
    monkeypatch.setattr(torch, "zeros", on_cpu(torch.zeros))
    monkeypatch.setattr(module, "_of_stream", {})
    monkeypatch.setattr(module, "_reserve", {})
    return card


# --- counters ---------------------------------------------------------------------------------------------------------


def test_counters_start_at_zero() -> None:
    assert counters(CPU, 5).tolist() == [0] * 5


def test_launches_on_a_stream_share_counters(card: Card) -> None:
    first = counters(GPU, 5)
    assert counters(GPU, module.STREAM_COUNTERS) is first
    card.stream = 8
    second = counters(GPU, 5)
    larger = counters(GPU, 2 * module.RESERVE)
    assert counters(GPU, 5) is larger
    assert larger.numel() == 2 * module.RESERVE
    card.stream = 7
    assert counters(GPU, 5) is first
    for number, tensor in enumerate((first, second, larger)):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in (first, second, larger)] == [[0], [1], [2]]


def test_captured_launches_never_share_counters(card: Card) -> None:
    taken = [counters(GPU, 20)]
    card.capturing = True
    taken += [counters(GPU, count) for count in (1, 32, 33, 20)]
    assert [tensor.numel() for tensor in taken[1:]] == [32, 32, 64, 32]
    for number, tensor in enumerate(taken):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in taken] == [[0], [1], [2], [3], [4]]


def test_a_capture_without_unused_counters_warns_and_zeroes(card: Card) -> None:
    card.capturing = True
    with pytest.warns(RuntimeWarning, match="run the model once outside the capture"):
        assert counters(GPU, 7).tolist() == [0] * 7
    card.capturing = False
    counters(GPU, 7)
    card.capturing = True
    counters(GPU, module.CAPTURE)
    with pytest.warns(RuntimeWarning, match=f"cuda:0 has no {module.CAPTURE + 32} unused"):
        counters(GPU, module.CAPTURE + 1)


@pytest.mark.filterwarnings("error")
def test_any_number_of_graphs_gets_counters_if_a_call_precedes_each(card: Card) -> None:
    for _ in range(20):
        card.capturing = False
        counters(GPU, 1)
        card.capturing = True
        for _ in range(128):
            assert not counters(GPU, module.CAPTURE // 128).any()


def test_no_default_tuning_measurement_needs_more_counters_than_a_call_leaves() -> None:
    pytest.importorskip("triton")
    from grasp_kernels import autotune
    from grasp_kernels.launch_configs import LaunchKey, rule_of_thumb
    from grasp_kernels.triton import lowrank_linear as linear
    from grasp_kernels.triton.launch import Gpu

    most, gpu = 0, Gpu("NVIDIA H100 80GB HBM3", 132, 90)
    smallest = {name: min(autotune.STEPS["pair"][name]) for name in ("block_m", "shrink_block_r")}
    for members in map(parse_shape, SHAPES):
        M, K = 512, members[0].K
        x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
        group = [Factors(x.new_empty(N, R), None, x.new_empty(R, K)) for N, _, R in members]
        key = LaunchKey.of(M, sum(N for N, _, _ in members), K, sum(R for _, _, R in members), x.dtype, len(members))
        config = replace(rule_of_thumb("lowrank_linear", key, gpu), path="pair", reduce=True, **smallest)
        hidden = linear.new_hidden(x, group, config)
        count = linear.shrink_launch(x, group, hidden, config, gpu).arguments["counter_ptr"].numel()
        size = sum(tensor.nbytes for one in group for tensor in (one.U, one.Vh))
        calls = max(autotune.MIN_CALLS, -(-autotune.COLD_BYTES // size))
        most = max(most, calls * (count + module.ALIGNMENT))
    assert 10_000 < most <= module.CAPTURE


# --- the memory that calls keep ---------------------------------------------------------------------------------------


class Pool(TorchDispatchMode):
    """A memory pool to which the allocations of this thread go, as in the warm-up of a CUDA graph tree."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = _storages([args, kwargs])
        self.allocated += [
            StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves(result) if _storages(leaf) - known
        ]
        return result

    def kept(self, outputs: object) -> list[StorageWeakRef]:
        """The allocations that are alive and no outputs."""
        known = _storages(outputs)
        alive = [storage for storage in self.allocated if not storage.expired() and storage.cdata not in known]
        if alive:
            gc.collect()  # takes half a second
        return [storage for storage in alive if not storage.expired()]


def _storages(tree: object) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _arguments(op: str, rows: int) -> Sequence[Any]:
    """Arguments of a backend's function: bf16, ranks that are no multiple of 16, an s that must be converted."""
    generator = seeded()
    x = normal((rows, 1024), generator, dtype=torch.bfloat16)
    first, second = (
        factors(256, 1024, R, generator, s=True, bias=True, dtype=torch.bfloat16, layout="transposed") for R in (48, 20)
    )
    if op == "singular_value_grad":
        return x, normal((rows, 256), generator, dtype=torch.bfloat16), first.U, first.Vh, None, False, "token", None
    return {
        "lowrank_linear": (x, [first]),
        "lowrank_linear_grouped": (x, [first, second]),
        "lowrank_glu": (x, first, second, "silu"),
    }[op]


def _calls() -> Iterator[tuple[str, str, int, str]]:
    for row in dispatch.BACKENDS:
        for op in row.functions:
            for rows in ROWS.get(row.name, ()):
                for path in PATHS[op] if row.name == "triton" else ("dependent", "cooperative"):
                    yield row.name, op, rows, path


@pytest.fixture
def stubbed_cuda(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend with a compiled module that does nothing."""
    monkeypatch.setattr(cuda, "_module", lambda: SimpleNamespace(run=lambda *_: None))
    monkeypatch.setattr(cuda, "_load_kernels", lambda _: None)
    monkeypatch.setattr(cuda, "_workspace_bytes", lambda *_: 1 << 16)
    monkeypatch.setattr(cuda, "counters", lambda _, count: counters(GPU, count))


@pytest.fixture
def stubbed_triton(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend, with launches that do nothing."""
    pytest.importorskip("triton")
    from grasp_kernels.triton import launch, lowrank_glu, lowrank_linear, singular_value_grad

    gpu = launch.Gpu("NVIDIA H100 80GB HBM3", 132, 90)
    monkeypatch.setattr(launch.Launch, "run", lambda _: None)
    for user in (lowrank_linear, lowrank_glu, singular_value_grad):
        monkeypatch.setattr(user, "gpu_of", lambda _: gpu)
    monkeypatch.setattr(lowrank_linear, "counters", lambda _, count: counters(GPU, count))


@pytest.mark.usefixtures("stubbed_cuda", "stubbed_triton")
@pytest.mark.parametrize(("backend", "op", "rows", "path"), list(_calls()))
def test_a_call_keeps_no_memory_of_a_pool(
    monkeypatch: pytest.MonkeyPatch, backend: str, op: str, rows: int, path: str
) -> None:
    from grasp_kernels.triton import lowrank_glu, lowrank_linear

    function = dispatch._load(next(row for row in dispatch.BACKENDS if row.name == backend).functions[op])
    if backend == "cuda":
        function = partial(function, path=path)
    elif path != "chosen":
        for user in (lowrank_linear, lowrank_glu):
            config = partial(replace, path=path, reduce=True, splits=4)
            monkeypatch.setattr(user, "choose", lambda *key, choose=user.choose, config=config: config(choose(*key)))
    arguments = _arguments(op, rows)
    with Pool() as pool:
        outputs = function(*arguments)
    assert pool.allocated
    assert pool.kept(outputs) == []
    del outputs
    assert pool.kept(()) == []
    assert bool(module._of_stream) >= (path in ("pair", "fused", "cooperative"))


def test_pytorch_redirects_the_allocations_of_one_thread_to_a_pool() -> None:
    for redirect in (cudagraph_trees._use_cuda_memory_pool_manager, torch.cuda.memory.use_mem_pool):
        assert "_cuda_beginAllocateCurrentThreadToPool" in inspect.getsource(redirect)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory pools need a CUDA GPU")
def test_on_a_card_counters_lie_in_no_pool() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside, zeros = torch.zeros(64, device="cuda"), module._zeros(torch.cuda.current_device(), 64)
    assert not zeros.any()
    segments = [range(segment["address"], segment["address"] + segment["total_size"]) for segment in pool.snapshot()]
    assert [any(t.data_ptr() in segment for segment in segments) for t in (inside, zeros)] == [True, False]
