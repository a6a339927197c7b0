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
    Config,
    LaunchKey,
    distance,
    estimate,
    products_estimate,
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


@pytest.mark.parametrize("capability", [80, 90])
def test_factors_of_full_rank_without_other_rows_have_a_configuration(capability: int) -> None:
    gpu = CARD._replace(capability=capability)
    assert rule_of_thumb("lowrank_linear", KEY._replace(rank=KEY.width, pivots=KEY.width), gpu).path == "pair"


def test_saved_configurations_are_chosen(configs: Path) -> None:
    choose(KEY)  # a cached answer that saving must drop
    path = save("lowrank_linear", CARD.name, {KEY: (CONFIG, 3.21)}, configs)
    assert path == configs / "lowrank_linear,device_name=Test_Card_80GB.json"
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
        {"pivots": 204},
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
                assert config.path == "gemms" or few
                assert config.path == "pair" or rows > 2
                assert 1 <= config.splits <= 16
                assert config.splits * config.shrink_block_k < in_features + 2 * config.shrink_block_k


GATE_UP = KEY._replace(width=2 * 11008, rank=2 * 304, groups=2)
BLOCKS = replace(
    CONFIG,
    path="pair",
    shrink_block_r=32,
    shrink_block_k=128,
    stages=3,
    splits=4,
    reduce=True,
    expand_block_n=32,
    expand_warps=4,
)
L2 = 132 * 42_000


def alone(key: LaunchKey, config: Config, gpu: Gpu = CARD) -> float:
    return estimate(key, config, gpu, 1).alone


def test_the_estimate_by_hand() -> None:
    """64 rows, 4096 x 4096, rank 208: 28 programs shrink and 128 expand, so a processor has one of each."""
    key = KEY._replace(rows=64)
    sums = 64 * 32 * 4
    trips = 4096 / 4 / (2 * 128) * 0.8  # four tiles of Vh, two of them in flight: longer than its bytes take
    assert ((32 + 64) * 1024 * 2 + sums) / 95_000 < trips
    shrink = trips + 2.0 + 4 * sums / 95_000  # and the last program adds up the partial sums
    h = 64 * 208 * 2
    starts = 2.3 + 0.7
    assert alone(key, BLOCKS) == pytest.approx(starts + shrink + max(128 * h / L2, h / (80 * 128) * 0.3))
    # 11 programs on each processor that read h, of 4096 * 88 outputs, take longer than to wait for it.
    wide = alone(key._replace(width=4096 * 11), BLOCKS)
    assert wide == pytest.approx(starts + shrink + 11 * 128 * h / L2, rel=0.1)
    assert alone(key, BLOCKS, Gpu("", 132, 80)) > alone(key, BLOCKS) + 1.5  # a whole start, and U is not fetched before


def test_memory_is_a_limit_that_no_configuration_passes() -> None:
    for rows in (1, 16, 64):
        key = GATE_UP._replace(rows=rows)
        memory = (4096 * 608 + 22016 * 304) * 2 / (132 * 22_700)
        blocks = rule_of_thumb("lowrank_linear", key, CARD)
        assert estimate(key, blocks, CARD, 2).alone >= 2.3 + memory


@pytest.mark.parametrize(("rows", "reduce"), [(1, False), (2, False), (4, False), (16, False), (32, True)])
def test_few_rows_are_not_reduced_because_the_tail_takes_longer_than_to_read_their_sums(
    rows: int, reduce: bool
) -> None:
    config = rule_of_thumb("lowrank_linear", GATE_UP._replace(rows=rows, width=2 * 4096), CARD)
    assert config.path == "pair"
    assert config.reduce == (reduce and config.splits > 1)
    assert config.splits > 1


@pytest.mark.parametrize("rows", [16, 64])
def test_the_rule_fetches_more_of_vh_at_once_than_three_stages_do(rows: int) -> None:
    key = GATE_UP._replace(rows=rows)
    chosen = rule_of_thumb("lowrank_linear", key, CARD)
    assert chosen.stages > 3
    shallow = replace(chosen, stages=3)
    both = [estimate(key, this, CARD, 2) for this in (chosen, shallow)]
    assert both[0].chained <= both[1].chained
    assert both[0].alone < both[1].alone or rows == 16  # where memory hides the rest


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_tiles_of_a_shrink_fit_the_shared_memory_of_the_gpu(capability: int) -> None:
    limit = {80: 163, 90: 227, 120: 99}[capability] << 10
    for rows in (1, 4, 16, 32, 64):
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            config = rule_of_thumb("lowrank_linear", GATE_UP._replace(rows=rows, dtype=dtype), Gpu("", 132, capability))
            tile = (config.shrink_block_r + (0 if rows <= 2 else max(16, rows))) * config.shrink_block_k * size
            assert config.path == "gemms" or config.stages * tile <= limit


def test_pivoted_factors_have_fewer_rows_of_u_to_read() -> None:
    """1638 of 4096 outputs are those of h. At one row memory is the limit."""
    key = KEY._replace(rows=1, width=2 * 4096, rank=2 * 1648, groups=2)
    pivoted = key._replace(pivots=2 * 1638)
    blocks = rule_of_thumb("lowrank_linear", pivoted, CARD)
    saved = estimate(key, blocks, CARD, 2).alone - estimate(pivoted, blocks, CARD, 2).alone
    assert saved == pytest.approx(2 * 1638 * 1648 * 2 / (132 * 22_700))


def test_matrix_products_of_pivoted_factors_end_with_a_slower_expand() -> None:
    key, b200 = KEY._replace(rank=1648), Gpu("", 148, 100)
    pivoted = key._replace(pivots=1638)
    trips = 1648 / (2 * 64) * 0.8  # of the expand, which has two tiles in flight: longer than its bytes take
    first = 2.3 + (4096 * 1648 + 4 * (4096 + 1648)) * 2 / (148 * 47_300 * 0.85)
    assert products_estimate(pivoted, b200) == pytest.approx(first + 2.3 + trips)
    assert [rule_of_thumb("lowrank_linear", this, b200).path for this in (key, pivoted)] == ["gemms", "pair"]


def test_a_small_linear_of_many_rows_is_matrix_products() -> None:
    key = KEY._replace(rows=64, width=1024, rank=96)
    assert rule_of_thumb("lowrank_linear", key, CARD).path == "gemms"
    assert rule_of_thumb("lowrank_linear", key._replace(rows=1), CARD).path == "pair"
    pair = min(alone(key, replace(BLOCKS, shrink_block_r=block_r, stages=6)) for block_r in (16, 32, 64))
    assert products_estimate(key, CARD) == pytest.approx(2 * (2.3 + 0.8))
    assert pair > products_estimate(key, CARD)


@pytest.mark.parametrize(("rank", "path"), [(1024, "pair"), (1040, "gemms")])
def test_matrix_products_begin_at_fewer_rows_if_the_rank_is_large(rank: int, path: str) -> None:
    key = KEY._replace(width=3 * 4096, groups=3)
    assert rule_of_thumb("lowrank_linear", key._replace(rows=64, rank=3 * rank), CARD).path == path
    assert rule_of_thumb("lowrank_linear", key._replace(rows=32, rank=3 * rank), CARD).path == "pair"


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
