from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import OutOfResources

from grasp_kernels import autotune, gradient_configs, launch_configs
from grasp_kernels.autotune import Workload, tune, workload_key
from grasp_kernels.gradient_configs import LARGE, SMALL, WIDE, Tile
from grasp_kernels.launch_configs import Config
from grasp_kernels.triton.launch import gpu_of
from grasp_kernels.triton.singular_value_grad import loadable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOAD = Workload(rows=4, in_features=64, members=((32, 8), (16, 5)), dtype=torch.float32)
FEW = {"pair": {"splits": (1, 2), "stages": (2, 4)}, "fused": {}, "gemms": {"stages": (2, 4)}}


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autotune, "STEPS", FEW)
    yield
    launch_configs.load.cache_clear()
    launch_configs._choose.cache_clear()
    gradient_configs._load.cache_clear()


def config_of(calls: Sequence[Callable[[], Any]]) -> Config:
    call = calls[0]
    assert isinstance(call, partial)
    return call.args[-1]


def by_config(cost: Callable[[Config], float]) -> autotune.Measure:
    return lambda calls: cost(config_of(calls))


def tuned(kernel: str, directory: Path, measure: autotune.Measure) -> Config:
    tune(kernel, [WORKLOAD if kernel == "lowrank_linear" else GLU], device=DEVICE, directory=directory, measure=measure)
    (config,) = launch_configs.load(kernel, gpu_of(DEVICE).name, directory).values()
    return config


GLU = WORKLOAD._replace(members=((32, 8), (32, 5)))


@pytest.mark.parametrize("path", launch_configs.PATHS[::2])
def test_the_fastest_path_is_kept(tmp_path: Path, path: str) -> None:
    config = tuned("lowrank_linear", tmp_path, by_config(lambda config: 1.0 if config.path == path else 2.0))
    assert config.path == path


def test_each_field_takes_its_fastest_value(tmp_path: Path) -> None:
    def cost(config: Config) -> float:
        return 9.0 if config.path != "pair" else 4.0 - config.splits + abs(config.stages - 2)

    config = tuned("lowrank_linear", tmp_path, by_config(cost))
    assert (config.path, config.splits, config.stages) == ("pair", 2, 2)


def test_a_difference_within_the_noise_changes_nothing(tmp_path: Path) -> None:
    costs = itertools.count(1000, -1)  # each measurement 0.1 % faster than the last
    start = launch_configs.rule_of_thumb("lowrank_linear", workload_key(WORKLOAD), gpu_of(DEVICE))
    config = tuned("lowrank_linear", tmp_path, lambda _: float(next(costs)))
    assert replace(config, path=start.path) == start


@pytest.mark.parametrize(("kernel", "workload"), [("lowrank_linear", WORKLOAD), ("lowrank_glu", GLU)])
def test_pivoted_factors_are_tuned_for_keys_of_their_own(tmp_path: Path, kernel: str, workload: Workload) -> None:
    pivoted = workload._replace(pivoted=True)
    assert [workload_key(this).pivots for this in (workload, pivoted)] == [0, 13]
    cost = by_config(lambda config: 1.0 if config.path == "pair" else 2.0)
    tune(kernel, [workload, pivoted], device=DEVICE, directory=tmp_path, measure=cost)
    assert set(launch_configs.load(kernel, gpu_of(DEVICE).name, tmp_path)) == set(
        map(workload_key, (workload, pivoted))
    )


def test_a_gated_unit_is_tuned_too(tmp_path: Path) -> None:
    config = tuned("lowrank_glu", tmp_path, by_config(lambda config: config.stages + 5 * (config.path == "gemms")))
    assert (config.path, config.stages) == ("pair", 2)


def test_a_configuration_that_does_not_fit_the_card_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = autotune._RUN["lowrank_linear"]

    def small_card(x: Any, factors: Any, config: Config) -> Any:
        if config.stages > 2 and config.path == "pair":
            raise OutOfResources(300_000, 101_376, "shared memory")
        return run(x, factors, config)

    monkeypatch.setitem(autotune._RUN, "lowrank_linear", small_card)
    config = tuned("lowrank_linear", tmp_path, by_config(lambda config: 1.0 if config.path == "pair" else 2.0))
    assert (config.path, config.stages) == ("pair", 2)


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = autotune._RUN["lowrank_linear"]

    def wrong(x: Any, factors: Any, config: Config) -> Any:
        return [y + 0.01 * (config.path == "pair") for y in run(x, factors, config)]

    monkeypatch.setitem(autotune._RUN, "lowrank_linear", wrong)
    with pytest.raises(RuntimeError, match="is off by"):
        tuned("lowrank_linear", tmp_path, lambda _: 1.0)


GRADIENT = Workload(rows=70, in_features=64, members=((32, 5),), dtype=torch.bfloat16)


def gradient(directory: Path, cost: Callable[[Tile | None], float]) -> gradient_configs.Measurement | None:
    """The saved measurement; ``cost`` of a tile is the kernel's time, and of ``None`` that of two matrix products."""

    def measure(calls: Sequence[Callable[[], Any]]) -> float:
        first, second = (call() for call in calls * 2)
        assert torch.equal(first[0], second[0])
        tile = calls[0].args[-1]  # type: ignore[attr-defined]
        return cost(tile if isinstance(tile, Tile) else None)

    tune("singular_value_grad", [GRADIENT], device=DEVICE, directory=directory, measure=measure)
    return gradient_configs.nearest(gpu_of(DEVICE), 70, 5, torch.bfloat16, directory)


def test_the_gradients_fastest_tile_is_kept_beside_the_time_of_matrix_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_configs, "CONFIGS", tmp_path)
    for products in (3.0, 1.0):
        found = gradient(tmp_path, {None: products, LARGE: 4.0, SMALL: 2.0, WIDE: 5.0}.__getitem__)
        assert found == gradient_configs.Measurement(70, 5, "bfloat16", SMALL, 2.0, products)
        slower = gradient_configs.slower(DEVICE, 70, 5, torch.bfloat16)
        assert (slower is None) == (products > 2.0)  # "auto" takes the kernel only where it was ahead


def test_a_tile_that_does_not_fit_the_card_is_skipped_and_a_wrong_one_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = autotune.run_gradient

    def small_card(*arguments: Any) -> Any:
        if arguments[-1] is not LARGE:
            raise OutOfResources(300_000, 101_376, "shared memory")
        return run(*arguments)

    monkeypatch.setattr(autotune, "run_gradient", small_card)
    found = gradient(tmp_path, lambda tile: 1.0 if tile is not LARGE else 2.0)
    assert found is not None
    assert found.tile == LARGE
    monkeypatch.setattr(autotune, "run_gradient", lambda *arguments: [1.1 * y for y in run(*arguments)])
    with pytest.raises(RuntimeError, match=r"Tile.* is off by"):
        gradient(tmp_path, lambda _: 1.0)


def test_a_graph_of_gradients_copies_no_factor(tmp_path: Path) -> None:
    """Rank 5 needs copies of both factors: a graph would make them in every replay."""

    def measure(calls: Sequence[Callable[[], Any]]) -> float:
        *tensors, tile = calls[0].args[:4] + calls[0].args[-1:]  # type: ignore[attr-defined]
        if isinstance(tile, Tile):
            U, Vh = tensors[2:]
            assert loadable(U, 1) is U
            assert loadable(Vh, 0) is Vh
        return 1.0

    tune("singular_value_grad", [GRADIENT], device=DEVICE, directory=tmp_path, measure=measure)


def test_tuning_is_refused_inside_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        tune("lowrank_linear", [WORKLOAD], directory=tmp_path, measure=lambda _: 1.0)


def test_unknown_kernels_and_no_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="lowrank_linear, lowrank_glu, singular_value_grad"):
        tune("lowrank_lienar", [WORKLOAD])
    with pytest.raises(ValueError, match="0"):
        tune("lowrank_linear", [])


def test_steps_name_fields_of_a_configuration() -> None:
    start = launch_configs.rule_of_thumb("lowrank_linear", workload_key(WORKLOAD), gpu_of(DEVICE))
    for path, steps in FULL_STEPS.items():
        assert path in launch_configs.PATHS
        for field, values in steps.items():
            for value in values:
                assert type(getattr(replace(start, **{field: value}), field)) is type(getattr(start, field))


FULL_STEPS = dict(autotune.STEPS)


@pytest.mark.gpu
def test_a_graph_of_calls_is_timed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    assert 1 < autotune.measure_graph([partial(torch.mm, x, x)] * 4) < 10_000
