from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from grasp_kernels import dispatch, gradient_configs
from grasp_kernels.gradient_configs import (
    FULL_PRECISION,
    LARGE,
    SMALL,
    WIDE,
    Measurement,
    Tile,
    choose_tile,
    cost,
    save,
)
from grasp_kernels.routes import chunked
from grasp_kernels.triton.launch import Gpu
from grasp_kernels.triton.singular_value_grad import singular_value_grad

H100 = Gpu("Test H100", 132, 90)
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
MEASURED = Measurement(2048, 512, "bfloat16", SMALL, microseconds=40.0, matmul_microseconds=41.0)


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the package's, and a GPU that this machine lacks; clears cached answers."""
    monkeypatch.setattr(gradient_configs, "CONFIGS", tmp_path)
    monkeypatch.setattr(gradient_configs, "gpu_of", lambda _: H100)
    reasons = {"cuda": "not built", "triton": None, "cpu": "not built", "chunked": None, "reference": None}
    monkeypatch.setattr(dispatch, "backend_missing", reasons.__getitem__)
    monkeypatch.setattr(dispatch, "_card_refuses", lambda *_: None)
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)
    dispatch._select.cache_clear()
    yield tmp_path
    dispatch._select.cache_clear()
    gradient_configs._load.cache_clear()


def select(backend: str = "auto", rows: int = 2048, rank: int = 512, dtype: torch.dtype = BF16) -> object:
    return dispatch.select(backend, "singular_value_grad", CUDA, dtype, rows, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_a_gpu_without_measurements_takes_two_matrix_products(dtype: torch.dtype) -> None:
    for rows in (1, 512, 2048, 8192):
        for rank in (5, 208, 512, 4096):
            assert select("auto", rows, rank, dtype) is chunked
            assert select("triton", rows, rank, dtype) is singular_value_grad
    answers = dispatch.explain("singular_value_grad", rows=2048, rank=512, dtype=dtype, device="cuda")
    assert answers["chunked"] == "chosen"
    assert answers["triton"] == "no measurement on Test H100 shows that the kernel is faster than two matrix products"


def test_no_measurement_is_shipped() -> None:
    assert not list((Path(gradient_configs.__file__).parent / "configs").glob("singular_value_grad.*"))


def test_other_ops_keep_the_kernels() -> None:
    assert dispatch.explain("lowrank_linear", rows=4, rank=8, dtype=BF16, device="cuda")["triton"] == "chosen"


def test_a_kernel_that_was_measured_to_be_faster_is_taken_at_calls_of_that_size(configs: Path) -> None:
    save(H100.name, [MEASURED, MEASURED._replace(rank=4096, microseconds=99.0)], configs)
    assert select() is singular_value_grad
    assert select(rows=4096, rank=208) is singular_value_grad
    assert select(rank=4096) is chunked  # measured to be slower
    assert select(rows=64) is chunked  # too far away
    assert select(dtype=torch.float16) is chunked
    answers = dispatch.explain("singular_value_grad", rows=2048, rank=4096, dtype=BF16, device="cuda")
    assert answers["triton"] == "two matrix products took 41 µs on Test H100, the kernel 99 µs"


@pytest.mark.parametrize("stamp", ["triton", "source"])
def test_measurements_of_another_version_are_ignored(configs: Path, stamp: str) -> None:
    path = save(H100.name, [MEASURED], configs)
    assert path.name == "singular_value_grad,device_name=Test_H100.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {stamp: "0.0"}))
    assert select() is chunked
    assert choose_tile(H100, 2048, 512, BF16, described=True) is LARGE


def test_measurements_of_another_gpu_are_ignored(configs: Path) -> None:
    save("Other", [MEASURED], configs)
    assert select() is chunked


def test_a_measured_tile_is_taken(configs: Path) -> None:
    assert choose_tile(H100, 2048, 512, BF16, described=True) is LARGE
    save(H100.name, [MEASURED, MEASURED._replace(rank=64, tile=WIDE)], configs)
    assert choose_tile(H100, 2048, 512, BF16, described=True) == SMALL
    assert choose_tile(H100, 2048, 64, BF16, described=True) == WIDE
    assert choose_tile(H100, 2048, 64, BF16, described=False) == SMALL


# Tokens, rank, and the tiles on an H100, with descriptors and without. The comments have the number of programs of the
# large and of the small tile.
CHOICES = [
    (512, 4096, LARGE, LARGE),  # 128 on 132 processors, and 512: four waves of half the intensity
    (8192, 208, LARGE, LARGE),  # 128, and 512
    (2048, 512, LARGE, LARGE),  # 64, and 256: half the processors idle, but half the bytes from the L2 cache
    (8192, 512, WIDE, LARGE),  # 256, and 1024; 128 of the wide tile
    (2048, 4096, WIDE, LARGE),  # 512, and 2048
    (8192, 4096, WIDE, LARGE),  # 2048, and 8192
    (512, 512, SMALL, SMALL),  # 16, and 64
    (1024, 208, SMALL, SMALL),  # 16, and 64
    (64, 81, SMALL, SMALL),  # 1, and 2
]


@pytest.mark.parametrize(("tokens", "rank", "tile", "plain"), CHOICES)
def test_waves_and_intensity_choose_the_tile(tokens: int, rank: int, tile: Tile, plain: Tile) -> None:
    for dtype in (torch.float16, BF16):
        assert choose_tile(H100, tokens, rank, dtype, described=True) is tile
        assert choose_tile(H100, tokens, rank, dtype, described=False) is plain
        for capability in (80, 120):  # no TMA; too little shared memory
            assert choose_tile(H100._replace(capability=capability), tokens, rank, dtype, described=True) is plain
    assert choose_tile(H100, tokens, rank, torch.float32, described=True) is FULL_PRECISION


def test_the_cost_is_reads_of_a_full_gpu_and_products_of_an_empty_one() -> None:
    assert cost(LARGE, 132 * 128, 128, processors=132) == 256  # bytes
    assert cost(SMALL, 132 * 64, 64, processors=132) == 128
    assert cost(LARGE, 128, 128, processors=132) == 128 * 128 / gradient_configs.BALANCE
    assert cost(LARGE, 133 * 128, 128, processors=132) > cost(LARGE, 132 * 128, 128, processors=132)
