from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels import cuda, dispatch
from grasp_kernels.dispatch import BACKENDS, OpCall
from tests.ops.cuda_cases import CASES, inputs
from tests.ops.inputs import DTYPES, factors, normal, pivoted, seeded
from tests.ops.linears import check_linears
from tests.pairwise import Case, label

pytestmark = pytest.mark.gpu
ROW = next(row for row in BACKENDS if row.name == "cuda")


@pytest.fixture
def card() -> torch.device:
    """The current CUDA device; skips the test where the row has an objection."""
    if (reason := dispatch.backend_missing("cuda")) is not None:
        pytest.skip(f"cuda: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := ROW.refuses(OpCall("lowrank_linear", device, torch.bfloat16, 1, 1))) is not None:
        pytest.skip(f"cuda: {reason}")
    return device


def paths(card: torch.device) -> list[str]:
    capable = torch.cuda.get_device_capability(card) >= (9, 0)
    return ["pair", "cooperative", *(["dependent"] if capable else [])]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_card_agrees_with_float64(card: torch.device, case: Case) -> None:
    x, group = inputs(case, device=str(card))
    check_linears(cuda.run(x, [group], path=case["path"] if case["path"] in paths(card) else "auto"), x, [group])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_card_runs_agree_bit_for_bit_on_every_path(card: torch.device, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((7, 4096), generator, dtype=dtype, device=str(card))
    options = {"bias": True, "dtype": dtype, "device": str(card)}
    groups = [factors(N, 4096, 208, generator, s=True, **options) for N in (4096, 999)]
    groups.append(pivoted(1000, 4096, 208, generator, **options))
    first = cuda.run(x, groups)
    check_linears(first, x, groups)
    for _ in range(50):
        for path in paths(card):
            assert all(map(torch.equal, cuda.run(x, groups, path=path), first))


def test_graphs_replay_side_by_side_with_inputs_that_changed(card: torch.device) -> None:
    generator = seeded()
    dtype = torch.bfloat16
    for path in paths(card):
        calls = []
        for _ in range(2):
            x = normal((4, 2048), generator, dtype=dtype, device=str(card))
            group = factors(1024, 2048, 96, generator, s=False, bias=True, dtype=dtype, device=str(card))
            cuda.run(x, [group], path=path)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                (y,) = cuda.run(x, [group], path=path)
            calls.append((graph, torch.cuda.Stream(), x, group, y))
        for _ in range(20):
            for _, _, x, _, y in calls:
                x.copy_(normal((4, 2048), generator, dtype=dtype))
                y.fill_(torch.nan)
            torch.cuda.synchronize()
            for graph, stream, *_ in calls:
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for _, _, x, group, y in calls:
                check_linears([y], x, [group])


def test_streams_do_not_share_memory(card: torch.device) -> None:
    generator = seeded()
    group = factors(4096, 4096, 208, generator, s=False, bias=False, dtype=torch.bfloat16, device=str(card))
    xs = [normal((16, 4096), generator, dtype=torch.bfloat16, device=str(card)) for _ in range(4)]
    expected = [cuda.run(x, [group])[0] for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[] for _ in xs]
    for _ in range(50):
        for x, stream, results in zip(xs, streams, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(cuda.run(x, [group])[0])
    torch.cuda.synchronize()
    for results, y in zip(got, expected, strict=True):
        assert all(torch.equal(result, y) for result in results)
