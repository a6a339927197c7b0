from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import DistributedError, NonFiniteError
from grasp.method.schedules import SCHEDULES
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import decoder, layer_targets
from grasp.statistics import processes as distributed
from grasp.statistics.gradients import gather_gradients
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.redundancy import block_influence
from grasp.statistics.sweep import capture_prefix
from tests.interrupted import compress_until_killed, compress_with_a_bad_sweep
from tests.many_processes import Outcome, run
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

pytestmark = pytest.mark.long

CONFIG, BEST = GraspConfig(layers=(0, 2), retain_ratio=0.4), GraspConfig.best(compression_ratio=0.1)


def calibration(kind: str) -> list[CalibrationBatch]:
    """Batches that two processes cannot share evenly."""
    if kind == "ragged":
        long, short = tiny_batches(1, 2, 12)[0], tiny_batches(1, 1, 7, seed=2)[0]
        mask = torch.arange(12) >= torch.tensor([[0], [5]])  # padding on the left
        return [CalibrationBatch(long, mask), CalibrationBatch(short), CalibrationBatch(long.flip(1), mask.flip(1))]
    return [CalibrationBatch(tokens) for tokens in tiny_batches(int(kind))]


def sums(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], processes: Processes = ALONE
) -> dict[str, Tensor]:
    """∂L/∂σ of all linears of one layer, summed over the batches."""
    targets, own = layer_targets(model, 1)[0], processes.local_batches(batches)
    prefix = capture_prefix(model, own, [1])
    gathered = gather_gradients(prefix, targets, processes=processes)
    return {target.name: total.result(dense_weight(target.module))[1] for target, total in gathered.items()}


def gather(processes: Processes, family: str, kind: str) -> tuple[dict[str, Tensor], list[float]]:
    model, batches = tiny_model(family, torch.float64), calibration(kind)
    return sums(model, batches, processes), block_influence(model, batches, processes=processes)


@pytest.mark.parametrize("kind", ["3", "1", "ragged"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sums_of_two_processes_are_those_of_one_and_the_same_in_both(family: str, kind: str) -> None:
    expected, influence = gather(ALONE, family, kind)
    first, second = (outcome.value for outcome in run(gather, family, kind))
    assert first[0].keys() == expected.keys()
    for name, total in first[0].items():
        assert (total - expected[name]).norm() <= 1e-9 * expected[name].norm(), name
        assert torch.equal(total, second[0][name])
    assert first[1] == pytest.approx(influence, rel=1e-12)
    assert first[1] == second[1]


def compress(processes: Processes, family: str) -> list[tuple[CompressionReport, dict[str, Tensor]]]:
    """Every schedule, and a threshold, whose ranks are found on the way; batches for one process and a half."""
    results = []
    configs = [replace(CONFIG, schedule=name) for name in SCHEDULES if name != "progressive"]
    configs += [GraspConfig.best(layers=CONFIG.layers), replace(CONFIG, threshold_ratio=0.6)]
    for config in configs:
        model = tiny_model(family, torch.float64)
        results.append((compress_(model, calibration("3"), config, processes=processes), model.state_dict()))
    return results


def dense(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors by their product: the sign of a singular group depends on rounding."""
    products = {name: U @ state[f"{name[:-2]}.Vh"] for name, U in state.items() if name.endswith(".U")}
    return products | {name: value for name, value in state.items() if not name.endswith((".U", ".Vh"))}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_processes_choose_what_one_chooses_and_end_with_the_same_model(family: str) -> None:
    outcomes = run(compress, family)
    for alone, first, second in zip(compress(ALONE, family), *(outcome.value for outcome in outcomes), strict=True):
        assert [module.indices for module in first[0].modules] == [module.indices for module in alone[0].modules]
        assert first[0].modules == second[0].modules
        assert (first[0].after, first[0].calibration) == (alone[0].after, alone[0].calibration)
        assert first[1].keys() == second[1].keys() == alone[1].keys()
        assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
        torch.testing.assert_close(dense(first[1]), dense(alone[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_batch_goes_to_one_process_and_all_take_as_many_steps(count: int) -> None:
    batches = calibration(str(count))
    shares = [Processes(rank, 3).local_batches(batches) for rank in range(3)]
    assert {len(share) for share in shares} == {-(-count // 3)}
    real = [batch for share in shares for batch in share if batch.num_tokens]
    assert sorted(map(id, real)) == sorted(map(id, batches))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batches_that_fill_up_a_share_count_nothing(family: str) -> None:
    model, batches = tiny_model(family, torch.float64), calibration("1")
    filled = [*batches, *Processes(1, 2).local_batches(batches)]
    assert len(filled) == 2
    expected = sums(model, batches)
    for name, total in sums(model, filled).items():
        torch.testing.assert_close(total, expected[name], rtol=1e-12, atol=0)
    assert block_influence(model, filled) == block_influence(model, batches)


def add(processes: Processes) -> list[Tensor]:
    distributed.BUCKET_BYTES = 100
    rank = processes.rank + 1
    tensors = [torch.full((3, 4), 1.5 * rank), torch.arange(4) * rank, torch.ones(40).double() * rank, torch.empty(0)]
    tensors += [torch.full((20,), float(rank))]
    processes.sum_(tensors)
    return [*tensors, torch.tensor(processes.least(-rank))]


def test_tensors_of_any_size_and_dtype_are_added_up() -> None:
    expected = [torch.full((3, 4), 4.5), torch.arange(4) * 3, torch.full((40,), 3.0).double(), torch.empty(0)]
    expected += [torch.full((20,), 3.0), torch.tensor(-2)]
    for outcome in run(add):
        torch.testing.assert_close(outcome.value, expected, rtol=0, atol=0)


def reduce_to_owners(processes: Processes) -> list[Tensor]:
    distributed.BUCKET_BYTES = 100
    rank = processes.rank + 1
    tensors = [torch.full((7, 9), 1.5 * rank), torch.arange(4) * rank, torch.eye(5)[:, ::2] * rank, torch.tensor(rank)]
    owners: list[Sequence[int]] = [[1], [0], [0], range(2)]
    processes.reduce_(list(zip(tensors, owners, strict=True)))
    return [tensor for tensor, ranks in zip(tensors, owners, strict=True) if processes.rank in ranks]


def test_tensors_are_added_up_for_the_processes_that_need_them() -> None:
    first, second = run(reduce_to_owners)
    expected = [torch.arange(4) * 3, torch.eye(5)[:, ::2] * 3, torch.tensor(3)]
    torch.testing.assert_close(first.value, expected, rtol=0, atol=0)
    torch.testing.assert_close(second.value, [torch.full((7, 9), 4.5), torch.tensor(3)], rtol=0, atol=0)


def divide(processes: Processes, fail: bool) -> list[tuple[int, dict[str, list[float]]]]:
    def square(item: int) -> dict[str, Tensor]:
        if fail and item == 3:
            raise ValueError("three is too much")
        return {"square": torch.tensor([item**2.0]), "by": torch.tensor([processes.rank])} if item else {}

    results = processes.map_divided(range(5), square)
    return [(item, {name: tensor.tolist() for name, tensor in found.items()}) for item, found in results]


def test_work_is_divided_and_all_get_every_result() -> None:
    expected = [(0, {}), *((item, {"square": [item**2.0], "by": [item % 2]}) for item in range(1, 5))]
    assert [outcome.value for outcome in run(divide, False)] == [expected, expected]


def divide_texts(processes: Processes) -> list[tuple[int, str]]:
    return list(processes.map_divided(range(3), lambda item: f"only-σ-{item} of {processes.rank}"))


def test_texts_survive_their_way_to_another_process() -> None:
    expected = [(item, f"only-σ-{item} of {item % 2}") for item in range(3)]
    assert [outcome.value for outcome in run(divide_texts)] == [expected, expected]


def divide_what_is_fetched(processes: Processes, sharded: bool) -> list[Any]:
    fetched: list[int] = []
    worked: list[int] = []

    def fetch(item: int) -> Tensor:
        fetched.append(item)
        total = torch.tensor([float(item)])
        if sharded:
            processes.sum_([total])  # all processes take part, as they do to gather a weight
        return total

    def work(item: int, value: Tensor) -> dict[str, Tensor]:
        worked.append(item)
        return {"value": value, "whole": torch.eye(2, dtype=torch.bool), "half": value.bfloat16(), "none": value[:0]}

    results = replace(processes, sharded=sharded).map_divided(range(5), work, fetch=fetch)
    return [[result for _, result in results], fetched, worked, [processes.owner(item) for item in range(5)]]


@pytest.mark.parametrize("sharded", [False, True])
def test_what_an_item_needs_is_fetched_by_its_owner_or_by_all(sharded: bool) -> None:
    for rank, outcome in enumerate(run(divide_what_is_fetched, sharded)):
        results, fetched, worked, owners = outcome.value
        for item, result in enumerate(results):
            value = torch.tensor([item * (1.0 + sharded)])
            expected = {"value": value, "whole": torch.eye(2).bool(), "half": value.bfloat16(), "none": value[:0]}
            torch.testing.assert_close(dict(result), expected, rtol=0, atol=0)
        assert fetched == (list(range(5)) if sharded else worked)
        assert worked == [item for item in range(5) if owners[item] == rank]


def test_an_error_in_one_process_is_told_to_all() -> None:
    first, second = run(divide, True)
    assert isinstance(second.error, ValueError)
    assert isinstance(first.error, DistributedError)
    assert str(first.error) == "process 1 of 2 failed: three is too much"


def test_a_loss_that_is_no_number_in_one_process_ends_all() -> None:
    first, second = run(compress_with_a_bad_sweep)
    assert isinstance(second.error, NonFiniteError)
    assert isinstance(first.error, DistributedError)
    assert "process 1 of 2 failed: the loss of calibration batch" in str(first.error)


def compress_with_bad_states(processes: Processes) -> None:
    model = tiny_model("llama")
    if processes.rank == 1:
        decoder(model).layers[1].register_forward_hook(lambda _, args, output: output * float("inf"))
    compress_(model, calibration("3"), CONFIG, processes=processes)


def test_hidden_states_that_are_no_numbers_in_one_process_are_found_by_all() -> None:
    for outcome in run(compress_with_bad_states):
        assert isinstance(outcome.error, NonFiniteError)
        assert "hidden states of layers [1, 2]" in str(outcome.error)


def compress_something_else(processes: Processes) -> None:
    compress_(tiny_model("llama"), calibration("3")[processes.rank :], CONFIG, processes=processes)


def test_processes_that_were_given_different_batches_are_told_so() -> None:
    for outcome in run(compress_something_else):
        assert isinstance(outcome.error, DistributedError)
        assert "the request differs from that of process 0" in str(outcome.error)


def die(processes: Processes, calls: int) -> None:
    """One process is killed when its first layer has been called so many times."""
    model = tiny_model("llama")
    left = iter(range(calls))

    def count(*_: Any) -> None:
        if processes.rank == 1 and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    decoder(model).layers[0].register_forward_hook(count)
    compress_(model, calibration("3"), CONFIG, processes=processes)


def assert_lost(survivor: Outcome, dead: Outcome) -> None:
    assert dead.exit_code == -signal.SIGKILL
    assert survivor.exit_code == 0
    assert isinstance(survivor.error, DistributedError)
    message = str(survivor.error)
    assert "process 0 of 2 has lost the others: one of them has ended" in message
    assert "start all of them again" in message
    assert "\n" not in message


@pytest.mark.parametrize("calls", [1, 4, 9])  # block influence, prefix, a sweep
def test_a_process_that_dies_ends_the_others_with_a_clear_error(calls: int) -> None:
    assert_lost(*run(die, calls))


def wait_for_one_that_sleeps(processes: Processes) -> None:
    if processes.rank == 1:
        time.sleep(8)
        return
    processes.sum_([torch.ones(1)])


def shorten(processes: Processes, patience: float) -> str:
    """Join once more, with less patience."""
    torch.distributed.destroy_process_group()
    distributed.TIMEOUT = timedelta(seconds=patience)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    with distributed.joined(torch.device("cpu")) as again:
        wait_for_one_that_sleeps(again)
    return "done"


def test_a_process_that_hangs_is_given_up_after_the_timeout() -> None:
    first, second = run(shorten, 5.0)
    assert second.value == "done"
    assert isinstance(first.error, DistributedError)
    assert "more than 0:00:05 (h:mm:ss) behind" in str(first.error)


def test_a_run_of_two_processes_continues_after_one_was_killed(tmp_path: Path) -> None:
    arguments = (BEST, "covariances")
    assert_lost(*run(compress_until_killed, tmp_path / "kept", *arguments, 2))
    alone = compress_(tiny_model("llama", torch.float64), calibration("3"), BEST)
    expected = [module.indices for module in alone.modules]
    weights = run(compress_until_killed, tmp_path / "whole", *arguments, None)[0].value[2]
    results = run(compress_until_killed, tmp_path / "kept", *arguments, None)
    assert [result.value for result in results] == 2 * [[["covariances, 3 layers"], expected, weights]]
    assert not (tmp_path / "kept").exists()
