from __future__ import annotations

import pytest
import torch

from grasp.bench import timing
from grasp.bench.timing import CpuBatch, CudaBatch, Rotation, Sample, batch, interleave, using_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1e-4)


class Clock:
    """A batch whose times are given, and which notes when it is asked for one."""

    calls = 1

    def __init__(self, name: str, times: list[float], order: list[str]) -> None:
        self._name, self._times, self._order = name, iter(times), order

    def seconds(self) -> float:
        """The next of the given times."""
        self._order.append(self._name)
        return next(self._times)


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
    timed = batch(CPU, seen.append, Rotation(range(100)), calls=7)
    seen.clear()
    assert timed.calls == 7
    assert timed.seconds() > 0
    assert len(seen) == 7


def test_a_cpu_batch_never_reads_an_operand_twice() -> None:
    assert batch(CPU, lambda _: None, Rotation(range(5))).calls == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_batch_replays_all_its_calls() -> None:
    total = torch.zeros(1, device="cuda")
    timed = batch(torch.device("cuda"), total.add_, Rotation([torch.ones(1, device="cuda")]), calls=25)
    torch.cuda.synchronize()
    total.zero_()
    timed.seconds()
    assert isinstance(timed, CudaBatch)
    assert total.item() == 25
    assert timed.seconds() > 0


def test_providers_take_turns_and_each_begins_in_turn() -> None:
    order: list[str] = []
    clocks = {name: Clock(name, [1.0, 2.0, 3.0], order) for name in "abc"}
    samples = interleave(clocks, 3)
    assert "".join(order) == "abcbcacab"
    assert samples["a"] == Sample((1.0, 2.0, 3.0))


def test_median_and_spread() -> None:
    sample = Sample((1.0, 2.0, 3.0, 4.0, 50.0))
    assert sample.median == 3
    assert sample.spread == pytest.approx((4 - 2) / 3)
    assert Sample((1.0,)).spread == 0


def test_a_slow_spell_of_the_machine_cancels_in_the_speedup() -> None:
    ours, theirs = Sample((1.0, 10.0, 1.0)), Sample((2.0, 20.0, 2.0))
    assert ours.speedup_over(theirs) == 2
    assert theirs.speedup_over(ours) == 0.5


def test_the_number_of_threads_is_set_back() -> None:
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
