from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from grasp_kernels import launch_configs
from grasp_kernels.launch_configs import (
    Blocks,
    Config,
    LaunchKey,
    distance,
    microseconds,
    rule_of_thumb,
    save,
    serves,
)
from grasp_kernels.triton.launch import Gpu

CARD = Gpu("Test Card/80GB", 132, 90)
KEY = LaunchKey(rows=4, width=4096, in_features=4096, rank=208, dtype="bfloat16", groups=1)
CONFIG = replace(rule_of_thumb("lowrank_linear", KEY, CARD), path="fused", splits=7)


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the package's; clears the cached answers after the test."""
    monkeypatch.setattr(launch_configs, "CONFIGS", tmp_path)
    yield tmp_path
    launch_configs.load.cache_clear()
    launch_configs._choose.cache_clear()


def choose(key: LaunchKey) -> Config:
    return launch_configs.choose("lowrank_linear", CARD, key)


def test_a_card_without_measurements_gets_the_rule_of_thumb_and_the_status_says_so() -> None:
    assert choose(KEY) == rule_of_thumb("lowrank_linear", KEY, CARD)
    assert "no configurations measured on Test Card/80GB" in launch_configs.status("lowrank_linear", CARD)


def test_saved_configurations_are_chosen(configs: Path) -> None:
    choose(KEY)  # a cached answer that saving must drop
    path = save("lowrank_linear", CARD.name, {KEY: (CONFIG, 3.21)}, configs)
    assert path == configs / "lowrank_linear.Test_Card_80GB.json"
    assert choose(KEY) == CONFIG
    assert launch_configs.status("lowrank_linear", CARD) == "1 configurations measured on Test Card/80GB"
    entry = json.loads(path.read_text())["entries"][0]
    assert entry["microseconds"] == 3.21


def test_configurations_are_used_only_for_their_own_kernel(configs: Path) -> None:
    save("lowrank_linear", CARD.name, {KEY: (CONFIG, 1.0)}, configs)
    assert launch_configs.choose("lowrank_glu", CARD, KEY) == rule_of_thumb("lowrank_glu", KEY, CARD)


@pytest.mark.parametrize("stamp", ["triton", "source"])
def test_a_file_with_another_stamp_is_ignored_and_the_status_says_so(configs: Path, stamp: str) -> None:
    path = save("lowrank_linear", CARD.name, {KEY: (CONFIG, 1.0)}, configs)
    path.write_text(json.dumps(json.loads(path.read_text()) | {stamp: "0.0"}))
    assert choose(KEY) == rule_of_thumb("lowrank_linear", KEY, CARD)
    status = launch_configs.status("lowrank_linear", CARD)
    assert f"ignored: measured with {stamp} 0.0" in status
    assert "grasp bench tune" in status


def test_the_source_stamp_follows_every_file_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = {launch_configs.source_stamp(kernel) for kernel in launch_configs.SOURCES}
    assert len(stamps) == len(launch_configs.SOURCES)
    copy = tmp_path / "tiles.py"
    original = Path(launch_configs.__file__).parent / launch_configs.SOURCES["lowrank_linear"][-1]
    files = (*launch_configs.SOURCES["lowrank_linear"][:-1], str(copy))
    monkeypatch.setitem(launch_configs.SOURCES, "lowrank_linear", files)
    copy.write_bytes(original.read_bytes())
    assert launch_configs.source_stamp("lowrank_linear") in stamps
    copy.write_bytes(original.read_bytes() + b"\n")
    assert launch_configs.source_stamp("lowrank_linear") not in stamps


def test_the_configuration_of_the_nearest_key_is_used(configs: Path) -> None:
    near, far = replace(CONFIG, splits=2), replace(CONFIG, splits=3)
    measured = {KEY: (near, 1.0), KEY._replace(rows=16): (far, 1.0)}
    save("lowrank_linear", CARD.name, measured, configs)
    assert choose(KEY._replace(rank=204, width=5000)) == near
    assert choose(KEY._replace(rows=16, rank=120)) == far
    assert choose(KEY._replace(rows=32)) == far


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"groups": 3},
        {"rows": 2},  # scalar arithmetic
        {"rows": 128},
        {"width": 4096 * 5},
        {"rank": 16},
    ],
)
def test_a_key_far_from_all_measured_keys_gets_the_rule_of_thumb(configs: Path, change: dict[str, object]) -> None:
    save("lowrank_linear", CARD.name, {KEY: (CONFIG, 1.0)}, configs)
    key = KEY._replace(**change)  # type: ignore[arg-type]
    assert choose(key) == rule_of_thumb("lowrank_linear", key, CARD)


def test_a_configuration_that_cannot_run_the_call_is_not_used(configs: Path) -> None:
    save("lowrank_linear", CARD.name, {KEY._replace(rows=64): (CONFIG, 1.0)}, configs)
    assert choose(KEY._replace(rows=64)).path == "fused"
    assert choose(KEY._replace(rows=128)).path == "gemms"
    assert serves(replace(CONFIG, path="pair"), KEY._replace(rows=512))
    assert not serves(replace(CONFIG, path="pair"), KEY._replace(rows=1024))
    assert not serves(CONFIG, KEY._replace(dtype="float32"))


def test_distance_is_zero_for_equal_keys_and_weighs_rows_most() -> None:
    assert distance(KEY, KEY) == 0
    assert distance(KEY, KEY._replace(rows=8)) > distance(KEY, KEY._replace(width=8192)) > 0


def test_rows_are_rounded_up_to_a_power_of_two() -> None:
    rounded = [LaunchKey.of(rows, 8, 8, 8, torch.float16, 1).rows for rows in (0, 1, 2, 3, 33, 64)]
    assert rounded == [1, 1, 2, 4, 64, 64]
    assert LaunchKey.of(1, 8, 8, 8, torch.float16, 1).dtype == "float16"


@pytest.mark.parametrize("kernel", ["lowrank_linear", "lowrank_glu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_rule_of_thumb_is_valid_at_any_size(kernel: str, dtype: str, capability: int) -> None:
    card = Gpu("any", 132, capability)
    for rows in (1, 2, 4, 16, 64, 128, 512, 1024, 8192):
        for width, in_features, rank in ((16, 16, 1), (1024, 4096, 81), (28672, 4096, 318), (4096, 14336, 4096)):
            for groups in (1, 2, 3):
                key = LaunchKey(rows, width, in_features, rank, dtype, groups)
                config = rule_of_thumb(kernel, key, card)
                blocks = (config.block_m, config.shrink_block_r, config.shrink_block_k)
                blocks += (config.expand_block_n, config.expand_block_r)
                assert all(block & (block - 1) == 0 and block >= 8 for block in blocks), config
                assert serves(config, key)
                few = rows <= (16 if dtype == "float32" else 64) and rows * rank <= 65536 * groups
                assert config.path == ("pair" if few else "gemms")
                assert 1 <= config.splits <= 16
                assert config.splits * config.shrink_block_k < in_features + 2 * config.shrink_block_k


GATE_UP = KEY._replace(width=2 * 11008, rank=2 * 304, groups=2)


def blocks(config: Config) -> Blocks:
    return Blocks(config.shrink_block_r, config.splits, config.reduce, config.expand_block_n)


def estimate(key: LaunchKey, shape: Blocks, members: int = 1) -> float:
    return microseconds(key, shape, 128, 3, CARD.processors, members)


def test_the_estimate_is_the_bytes_of_the_busiest_processor() -> None:
    """64 rows, 4096 x 4096, rank 208: 28 programs shrink and 128 expand, so a processor has one of each."""
    shrink = (32 + 64) * 4096 / 4 * 2 + 64 * 32 * 4 * (1 + 4)  # Vh, x and partial sums
    expand = 32 * 208 * 2 + 64 * 208 * 2  # U and h
    assert max(7 * 4, 4096 // 32) <= CARD.processors
    shape = Blocks(block_r=32, splits=4, reduce=True, block_n=32)
    assert estimate(KEY._replace(rows=64), shape) == pytest.approx((shrink + expand) / 42_000 + 2.0)
    # Twice as many programs for the expand: a processor has two.
    wide = estimate(KEY._replace(rows=64, width=8192), shape)
    assert wide == pytest.approx((shrink + 2 * expand) / 42_000 + 2.0)


def test_readers_that_add_up_partial_sums_read_them_once_for_each_split_in_fp32() -> None:
    key = KEY._replace(rows=64)
    reduced, unreduced = (estimate(key, Blocks(32, 4, reduce, 32)) for reduce in (True, False))
    sums = 64 * 32 * 4 * 4  # read by the last program of a tile
    assert unreduced - reduced == pytest.approx((64 * 208 * (4 * 4 - 2) - sums) / 42_000 - 2.0)


@pytest.mark.parametrize(("rows", "reduce"), [(1, False), (2, False), (4, False), (8, False), (32, True), (64, True)])
def test_a_reduction_must_save_more_than_its_tail_costs(rows: int, reduce: bool) -> None:
    config = rule_of_thumb("lowrank_linear", KEY._replace(rows=rows), CARD)
    assert config.splits > 1
    assert config.reduce == reduce


@pytest.mark.parametrize(("rows", "share"), [(32, 0.82), (64, 0.71)])
def test_more_rows_get_larger_blocks_and_read_x_and_h_less_often(rows: int, share: float) -> None:
    key = GATE_UP._replace(rows=rows)
    chosen = blocks(rule_of_thumb("lowrank_linear", key, CARD))
    assert (chosen.block_r, chosen.block_n) == (32, 64)
    assert estimate(key, chosen, 2) <= share * estimate(key, Blocks(16, 4, True, 32), 2)


def test_few_outputs_keep_small_blocks_so_that_no_processor_is_idle() -> None:
    assert rule_of_thumb("lowrank_linear", KEY._replace(rows=64), CARD).expand_block_n == 32


@pytest.mark.parametrize(("rank", "path"), [(1024, "pair"), (1040, "gemms")])
def test_matrix_products_begin_at_fewer_rows_if_the_rank_is_large(rank: int, path: str) -> None:
    assert rule_of_thumb("lowrank_linear", KEY._replace(rows=64, rank=rank), CARD).path == path
    assert rule_of_thumb("lowrank_linear", KEY._replace(rows=32, rank=rank), CARD).path == "pair"


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_changing_the_path_keeps_what_splits_the_shrink(rows: int) -> None:
    key = KEY._replace(rows=rows)
    start = rule_of_thumb("lowrank_linear", key, CARD)
    for path in launch_configs.PATHS:
        config = launch_configs.on_path(start, path, key)
        assert (config.path, config.splits, config.shrink_block_k) == (path, start.splits, start.shrink_block_k)
    fused = launch_configs.on_path(start, "fused", key)
    assert (fused.expand_block_n < start.expand_block_n) == (rows > 2)


def test_files_shipped_with_the_package_are_readable_and_current() -> None:
    folder = Path(launch_configs.__file__).parent / "configs"
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        assert path == launch_configs.config_path(content["kernel"], content["card"], folder)
        entries, status = launch_configs.read_entries(content["kernel"], content["card"], folder)
        assert entries, status
