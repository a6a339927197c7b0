from __future__ import annotations

import pytest

from speedgate import timing
from speedgate.timing import CpuBatch, CudaBatch, Rotation, batch, using_threads


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1e-4)


def test_a_rotation_goes_on_where_the_last_one_stopped() -> None:
    rotation = Rotation("abc")
    assert rotation.take(2) == ["a", "b"]
    assert rotation.take(3) == ["c", "a", "b"]


def test_providers_of_one_rotation_never_meet_on_the_operands_just_read() -> None:
    rotation = Rotation(range(1000))
    seen: list[int] = []
    batches = [CpuBatch(seen.append, rotation, calls=10) for _ in range(2)]
    seen.clear()
    for timed in batches:
        timed.seconds()
    assert len(seen) == len(set(seen)) == 20


def test_a_cpu_batch_makes_the_calls_it_was_told_to() -> None:
    seen: list[int] = []
    timed = batch("cpu", seen.append, Rotation(range(100)), calls=7)
    seen.clear()
    assert timed.calls == 7
    assert timed.seconds() > 0
    assert len(seen) == 7


def test_a_cpu_batch_never_reads_an_operand_twice() -> None:
    assert batch("cpu", lambda _: None, Rotation(range(5))).calls == 5


@pytest.mark.gpu
def test_a_cuda_batch_replays_all_its_calls() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    total = torch.zeros(1, device="cuda")
    timed = batch("cuda", total.add_, Rotation([torch.ones(1, device="cuda")]), calls=25)
    torch.cuda.synchronize()
    total.zero_()
    timed.seconds()
    assert isinstance(timed, CudaBatch)
    assert total.item() == 25
    assert timed.seconds() > 0


def test_the_number_of_threads_is_set_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
