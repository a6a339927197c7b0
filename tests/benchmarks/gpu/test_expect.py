from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


from benchmarks.gpu import expect
from benchmarks.gpu.aot_cases import CARDS
from benchmarks.gpu.check import HIGH_RANK, LINEARS, layer
from benchmarks.gpu.check_report import ProviderTime
from benchmarks.gpu.expect import RATES, Prediction, Resources, call, page, predict, products, resident_programs
from grasp_kernels.launch_configs import choose
from grasp_kernels.roofline import Cost
from grasp_kernels.shapes import parse_shape
from grasp_kernels.triton.launch import Gpu, Launch
from tests.command_line import run_script

H100 = RATES[90]
GPU = CARDS[90]
FEW = Resources(registers=64, shared=16 << 10, ahead=12 << 10, requested=8 << 10)


def few(launch: Launch, gpu: Gpu) -> Resources:
    return FEW


def launch(**changes: Any) -> Launch:
    arguments = {"DEPENDENT": True, **changes}
    return Launch(None, (1,), arguments, {"num_warps": 4, "launch_pdl": changes.get("pdl", False)})


@pytest.mark.parametrize(
    ("resources", "warps", "programs"),
    [
        (Resources(128, 0, 0), 4, 4),  # 65536 / (128 * 128)
        (Resources(121, 0, 0), 4, 4),  # registers come in steps of 8
        (Resources(32, 75 << 10, 0), 4, 3),  # 228 KB / (75 + 1)
        (Resources(16, 0, 0), 4, 16),  # 2048 threads
        (Resources(16, 0, 0), 1, 32),
        (Resources(255, 227 << 10, 0), 8, 1),
    ],
)
def test_programs_of_a_processor_by_hand(resources: Resources, warps: int, programs: int) -> None:
    assert resident_programs(resources, warps, H100) == programs


def test_the_slowest_limit_counts() -> None:
    start = H100.gap + H100.ramp

    def seconds(cost: Cost, cache: int, programs: int = 132, ahead: int = 1 << 30) -> float:
        return predict(cost, cache, programs, 0, launch(), Resources(32, 0, ahead), GPU).seconds - start

    large = 300_000_000
    assert seconds(Cost(large, 0), large) == pytest.approx(large / H100.memory)
    assert seconds(Cost(0, 0), 10 * large) == pytest.approx(10 * large / H100.cache)
    assert seconds(Cost(0, 10**12), large) == pytest.approx(10**12 / H100.flops)
    # 1 MB for each of 132 programs that have 1 KB in flight: 1024 round trips.
    assert seconds(Cost(0, 0), 132 << 20, ahead=1 << 10) == pytest.approx(1024 * H100.latency)
    assert seconds(Cost(0, 0), 132) == pytest.approx(H100.latency)
    # Ten of 132 processors read 1 MB each.
    assert seconds(Cost(0, 0), 10 << 20, programs=10) == pytest.approx((1 << 20) / H100.port)


def test_h_is_in_the_cache_and_is_requested_beside_the_factor() -> None:
    def waiting(hidden: int, held: int = 0) -> expect.Prediction:
        resources = Resources(32, 0, 0, requested=1 << 10)
        bytes_of_u = 132 << 10  # 1 KB for each program, requested at once
        return predict(
            *(Cost(0, 0), bytes_of_u + hidden, 132, 1 << 10, launch(pdl=True), resources, GPU),
            hidden_bytes=hidden,
            held_bytes=held,
        )

    few, many = waiting(132 << 10), waiting(132 << 14)  # 1 and 16 times what a program requests at once
    assert few.seconds == pytest.approx(H100.dependent + H100.latency)
    assert many.seconds == pytest.approx(H100.dependent + 16 * H100.hit)
    assert waiting(132 << 14, 132 << 10).chained == pytest.approx(H100.dependent + 16 * H100.hit)


def test_a_dependent_expand_requests_u_while_the_shrink_works() -> None:
    shrink, expand = (Prediction(1, 1, 1, 1, seconds, 3e-6, 1e-6) for seconds in (4e-6, 5e-6))
    start = H100.gap + H100.ramp
    assert expect.pair(shrink, expand, H100) == pytest.approx(start + 3e-6 + 3e-6)  # memory
    assert expect.pair(shrink._replace(seconds=9e-6), expand, H100) == pytest.approx(10e-6)
    assert expect.pair(shrink, expand, RATES[80]) == pytest.approx(9e-6)


def test_a_dependent_launch_starts_earlier() -> None:
    plain, dependent = (predict(Cost(1, 1), 1, 1, 0, this, FEW, GPU).seconds for this in (launch(), launch(pdl=True)))
    assert plain - dependent == pytest.approx(H100.gap + H100.ramp - H100.dependent)


def test_a_chain_by_hand() -> None:
    parts = [Prediction(1, 1, 1, 1, 9e-6, fetched, chained) for fetched, chained in ((1e-6, 2e-6), (3e-6, 1e-6))]
    # While the first works for 2, the factor of the second takes 3; while the second works for 1, that of the first 1.
    assert expect.chain(parts) == pytest.approx(4e-6)


def test_a_chained_launch_finds_its_factor_in_the_cache_or_in_registers() -> None:
    large = 300_000_000
    cost = Cost(large, 0)
    part = predict(cost, large, 132, 0, launch(pdl=True), Resources(32, 0, 1 << 30), GPU)
    assert part.fetched == pytest.approx(large / H100.memory)
    assert part.chained == pytest.approx(H100.dependent + large / H100.cache)
    held = predict(cost, large, 132, 0, launch(pdl=True), Resources(32, 0, 1 << 30), GPU, held_bytes=large)
    assert held.chained == pytest.approx(H100.dependent + H100.hit)
    # Three waves: memory has not been asked for the factor of the programs of two.
    later = predict(cost, large, 132 * 3 * 16, 1 << 30, launch(pdl=True), Resources(32, 0, 0), GPU, held_bytes=large)
    assert later.waves == 3
    assert later.chained == pytest.approx(H100.dependent + 2 / 3 * large / H100.memory)


def test_matrix_products_by_hand() -> None:
    shape = parse_shape("4096x4096r256+4096x4096r256")
    start, rate = H100.gap + H100.ramp, H100.memory * H100.products
    x, h = 4096 * 2, 256 * 2
    each = 256 * 4096 * 2 + x + h
    assert each / rate > H100.latency
    assert products(shape, 1, H100) == pytest.approx(4 * start + 4 * each / rate)
    assert products(shape, 1, H100, stacked=True) == pytest.approx(3 * start + (4 * each - x) / rate)
    small = parse_shape("256x256r16")
    assert products(small, 1, H100) == pytest.approx(2 * (start + H100.latency))  # as long as a load takes


@pytest.mark.parametrize("reduce", [False, True])
def test_a_shrink_reads_x_once_per_tile(reduce: bool) -> None:
    arguments = {"DEPENDENT": False, "REDUCE": reduce, "BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 128}
    this = Launch(None, (13, 8, 1), arguments, {"num_warps": 4})
    shape = parse_shape("4096x1024r208")
    part = expect.shrink(this, shape, 16, FEW, GPU)
    assert part.programs == 13 * 8
    partial = 8 * 16 * 208 * 4
    reduced = partial + 16 * 208 * 2 if reduce else 0
    assert part.cache_bytes == 208 * 4096 * 2 + 13 * 16 * 4096 * 2 + partial + reduced
    if not reduce:
        other = expect.shrink(this._replace(arguments={**arguments, "REDUCE": True}), shape, 16, FEW, GPU)
        assert other.seconds - part.seconds == pytest.approx(H100.reduction + 8 * 16 * 16 * 4 / H100.port, rel=0.05)


@pytest.mark.parametrize(("reduce", "element"), [(False, 2 * 4), (True, 2)])
def test_an_expand_reads_h_once_per_tile(reduce: bool, element: int) -> None:
    blocks = {"BLOCK_N": 32, "BLOCK_R": 128, "TILES": 1, "LOOPED": True}
    arguments = {"DEPENDENT": False, "SPLITS": 2, "REDUCE": reduce, **blocks}
    this = Launch(None, (32 + 16, 1), arguments, {"num_warps": 4})
    part = expect.expand(this, parse_shape("4096x1024r208+4096x512r80"), 16, FEW, GPU)
    factors, y = (1024 * 208 + 512 * 80) * 2, 16 * (1024 + 512) * 2
    assert part.cache_bytes == factors + y + 16 * element * (32 * 208 + 16 * 80)


def test_the_floor_is_that_of_the_factors_and_vectors() -> None:
    row = call(parse_shape("4096x4096r208"), 1, GPU, few)
    assert row.path == "pair"
    assert row.floor == pytest.approx((2 * 4096 * 208 + 2 * 4096) * 2 / H100.memory * 1e6)
    assert row.expected > row.floor


@pytest.mark.parametrize("M", [1, 16, 2048])
def test_pivoted_factors_of_a_high_rank_are_expected_to_take_less_time(M: int) -> None:
    wide = Resources(registers=102, shared=144 << 10, ahead=96 << 10)
    row = call(parse_shape("4096x4096r1638"), M, GPU, (lambda *_: wide) if M == 2048 else resources_of)
    saved = 1638**2 * (2 * M / H100.flops if M == 2048 else 2 / H100.memory)
    assert row.floor - row.pivoted_floor == pytest.approx(saved * 1e6)
    assert row.pivoted_floor < row.pivoted < row.expected


def resources_of(launch: Launch, gpu: Gpu) -> Resources:
    """About those of the compiled binaries, whose real ones are in the committed table."""
    arguments, stages, warps = launch.arguments, launch.options["num_stages"], launch.options["num_warps"]
    if "TILES" in arguments:
        tile = arguments["BLOCK_N"] * arguments["BLOCK_R"] * 2
        held = arguments["TILES"] * tile + arguments["BLOCK_M"] * arguments["BLOCK_N"] * 4
        copied = stages * tile if arguments["LOOPED"] else 0
        return Resources(min(255, 64 + held // (128 * warps)), 16384 + copied, copied, requested=3072 * warps)
    rows = arguments["BLOCK_R"] + (arguments["BLOCK_M"] if arguments["BLOCK_M"] >= 16 else 0)
    tile = rows * arguments["BLOCK_K"] * 2
    return Resources(110, stages * tile, (stages - 1) * tile)


@pytest.mark.parametrize("architecture", RATES)
@pytest.mark.parametrize("text", [*LINEARS, HIGH_RANK, *(part for part in layer(1).label.split() if "+" in part)])
def test_no_call_is_expected_to_be_slower_than_two_matrix_products(text: str, architecture: int) -> None:
    for M in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192):
        shape, gpu, rates = parse_shape(text), CARDS[architecture], RATES[architecture]
        path, parts, seconds = expect._expected(shape, expect._factors(shape), M, gpu, resources_of)
        assert seconds <= products(shape, M, rates) / 0.97, (M, path, parts)


@pytest.mark.parametrize("architecture", RATES)
@pytest.mark.parametrize("text", [HIGH_RANK, *(part for part in layer(1).label.split() if "+" in part)])
def test_no_call_with_pivoted_factors_is_expected_to_be_slower_than_on_another_path(
    text: str, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, gpu = parse_shape(text), CARDS[architecture]
    for M in (1, 4, 16, 64):
        call = (shape, expect._factors(shape, pivoted=True), M, gpu, resources_of)
        path, _, seconds = expect._expected(*call)
        for other in ("pair", "gemms"):
            monkeypatch.setattr(expect, "choose", lambda *key, other=other: replace(choose(*key), path=other))
            assert seconds <= expect._expected(*call)[2] / 0.97, (M, path, other)
        monkeypatch.undo()


def test_long_inputs_are_matrix_products() -> None:
    row = call(parse_shape("4096x4096r204+4096x4096r204"), 2048, GPU, few)
    assert (row.path, row.parts) == ("gemms", [])
    assert row.expected < row.products  # one product for both Vh


@pytest.fixture(scope="module")
def rows() -> list[str]:
    times = {("4096x4096r204", 16): 1234.5, (layer(16).label, 16): 77.7}
    return "\n".join(page([90], few, times)).splitlines()


def test_the_page_has_every_shape_the_layer_and_what_was_measured(rows: list[str]) -> None:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert {row[0] for row in cells} > {"4096x4096r204", "4096x11008r298", "4096x1024r81", "4096x14336r318"}
    assert sum(row[0] == "4096x4096r204" for row in cells) == len(expect.ROWS)
    assert [row[-1] for row in cells if row[:2] == ["4096x4096r204", "16"]] == ["1234.5"]
    sums = [row for row in cells if len(row) == len(expect.LAYER_HEADINGS) and row[0] in ("1", "16")]
    assert [row[-1] for row in sums] == ["", "77.7"]
    (first,) = (row for row in cells if row[:2] == ["4096x11008r298+4096x11008r298", "1"])
    assert first[2] == "pair"
    assert any("Commit" in row for row in rows)


@pytest.mark.parametrize("architecture", RATES)
def test_all_architectures_have_rates_and_a_card(architecture: int) -> None:
    assert CARDS[architecture].dependent_launch == (RATES[architecture].dependent < 1)
    assert call(parse_shape("4096x1024r81"), 1, CARDS[architecture], few).expected > 0


def test_a_file_of_the_check_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ProviderTime("lowrank_linear", "4096x4096r204", 1, "bfloat16", "triton", 5.5, 0, 1, 1, 1, 1, 1, 20)
    other = replace(line, case="lowrank_linear, eager", median_us=99.0)
    lines = [{"kind": "time", "task": "t", **asdict(this)} for this in (line, other)]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    seen: list[Any] = []
    monkeypatch.setattr(expect.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(expect, "page", lambda *arguments: seen.append(arguments) or ["page"])
    done = run_script(expect.main, "--measured", tmp_path / "lines", "--architecture", 90)
    assert done.exit_code == 0, done.output
    assert seen[0][0] == [90]
    assert seen[0][2] == {("4096x4096r204", 1): 5.5}
