from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from grasp.errors import CostTableError, GraspError
from grasp.method.cost_table import LAUNCH, CostTable, LinearSeconds, find_card, from_roofline
from grasp.method.ranks import Shape, break_even_rank
from grasp.method.storage import Storage, choose_storage

SMALL, WIDE = (64, 32), (96, 64)
ROW = {"out_features": 4, "in_features": 4, "storage": None, "dense": 1.0, "ranks": [1], "seconds": [1.0]}
TABLE = CostTable(
    device="a processor",
    source="measured",
    dtype="bfloat16",
    linears={
        (SMALL, None): LinearSeconds(8e-6, (16, 32), (2e-6, 4e-6)),
        (WIDE, None): LinearSeconds(9e-6, (16,), (3e-6,)),
        (SMALL, Storage(8)): LinearSeconds(5e-6, (16,), (1e-6,)),
    },
    layer=5e-6,
    rest=1e-3,
    layer_quantized=4e-6,
    rest_quantized=7e-4,
    threads=2,
    versions={"torch": "2.0"},
)


@pytest.mark.parametrize(
    ("rank", "seconds"), [(1, 2e-6), (16, 2e-6), (20, 2.5e-6), (24, 3e-6), (32, 4e-6), (40, 4e-6), (None, 8e-6)]
)
def test_ranks_lie_on_the_line_between_those_measured_and_beyond_them_cost_the_same(
    rank: int | None, seconds: float
) -> None:
    assert TABLE.linear(SMALL, rank) == pytest.approx(seconds)


def test_a_model_takes_what_its_linears_its_layers_and_the_rest_take() -> None:
    assert TABLE.predict([(SMALL, None), (SMALL, 16), (WIDE, 16)], layers=3) == pytest.approx(
        1e-3 + 3 * 5e-6 + 8e-6 + 2e-6 + 3e-6
    )
    stored = [(SMALL, None, Storage(8)), (SMALL, 16, Storage(8)), (WIDE, None)]
    assert TABLE.predict(stored, layers=1, quantized=True) == pytest.approx(7e-4 + 4e-6 + 5e-6 + 1e-6 + 9e-6)


def test_round_trip_through_a_file_of_which_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.json"
    TABLE.save(path)
    assert CostTable.load(path) == TABLE
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(("rank", "seconds"), [(None, 9.0), (16, 4.5), (24, 6.0)])
@pytest.mark.parametrize(
    ("shape", "narrow", "between"), [((96, 32), (48, 32), (72, 32)), ((32, 96), (32, 48), (32, 72))]
)
def test_a_narrowed_linear_is_on_the_line_between_the_whole_and_the_narrowest(
    shape: Shape, narrow: Shape, between: Shape, rank: int | None, seconds: float
) -> None:
    wide, small = LinearSeconds(12.0, (16, 32), (6.0, 10.0)), LinearSeconds(6.0, (16, 24), (3.0, 4.0))
    linears = {(shape, None): wide, (narrow, None): small, ((72, 72), None): wide, (between, Storage(8)): wide}
    table = dataclasses.replace(TABLE, linears=linears)
    assert table.linear(between, rank) == pytest.approx(seconds)
    assert table.linear(narrow, rank) == (small.at(rank) if rank else small.dense)
    for beyond in (16, 120):  # no guess
        with pytest.raises(CostTableError, match="no linear of"):
            table.linear((beyond, 32) if between[1] == 32 else (32, beyond), rank)
    with pytest.raises(CostTableError, match="no linear of"):
        table.require([between], "bfloat16", "factored")


def test_missing_bits_are_named_with_the_command_that_measures_them() -> None:
    floating = {key: linear for key, linear in TABLE.linears.items() if key[1] is None}
    table = dataclasses.replace(TABLE, linears=floating)
    remedy = r"no int4/64 linears, only bfloat16\. Measure them: grasp bench costs MODEL --bits 4 -o"
    with pytest.raises(CostTableError, match=remedy):
        table.require({SMALL}, "bfloat16", "factored", [choose_storage(4)])
    with pytest.raises(CostTableError, match=r"no fp8 linears.* --bits fp8 -o"):
        table.require({SMALL}, "bfloat16", "factored", [choose_storage("fp8")])


def test_a_file_that_cannot_be_written_or_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraspError, match=r"file/costs\.json"):
        TABLE.save(tmp_path / "file" / "costs.json")
    with pytest.raises(CostTableError, match=r"there is no file .*absent\.json"):
        CostTable.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "has format_version 1, not 2; expected a table of costs"),
        ({"format_version": None}, "has format_version None, not 2"),
        ({"dtype": None}, "missing 1 required positional argument: 'dtype'"),
        ({"linears": []}, "it has no linears"),
        ({"rest_quantized": None}, "layer_quantized and rest_quantized belong to quantised linears, got (4e-06, None)"),
        ({"linears": [{**ROW, "storage": "int3"}]}, "storage must be one of int8, int8/32, "),
        ({"layer": -1e-6}, "times must be positive numbers of seconds, got -1e-06"),
        ({"rest": "1"}, "times must be positive numbers of seconds, got '1'"),
        ({"linears": [{**ROW, "dense": 0.0}]}, "got 0.0"),
        ({"linears": [{**ROW, "ranks": [], "seconds": []}]}, "must ascend"),
        ({"linears": [{**ROW, "ranks": [2, 1], "seconds": [1.0, 1.0]}]}, "ranks must ascend"),
        ({"linears": [{**ROW, "out_features": 0}]}, "sizes and ranks must be positive integers"),
        ({"linears": [{"out_features": 4}]}, "'ranks'"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "costs.json"
    TABLE.save(path)
    values = {**json.loads(path.read_text()), **change}
    absent = {key for key in ("format_version", "dtype") if values[key] is None}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in absent}))
    with pytest.raises(CostTableError, match=re.escape(message)) as caught:
        CostTable.load(path)
    assert "grasp bench costs MODEL -o costs.json" in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CostTableError, match=r"is not UTF-8 .*; expected a table of costs"):
        CostTable.load(tmp_path / "costs.json")


def test_another_models_costs_are_refused() -> None:
    TABLE.require({SMALL, WIDE}, "bfloat16", "factored")
    with pytest.raises(CostTableError, match="of 16 inputs and 64 outputs, only 64x32, 96x64"):
        TABLE.require({SMALL, (64, 16)}, "bfloat16", "factored")
    with pytest.raises(CostTableError, match="for bfloat16 weights, the model has float32 ones"):
        TABLE.require({SMALL}, "float32", "factored")
    with pytest.raises(CostTableError, match=r"for factored linears, .* pivoted ones; measure those with .* --form"):
        TABLE.require({SMALL}, "bfloat16", "pivoted")


def test_a_cards_costs_are_its_bytes_at_its_bandwidth_and_one_launch_for_each_linear() -> None:
    card = find_card("h100")
    weights = {"dtype": "bfloat16", "itemsize": 2, "head": (128256, 4096)}
    table = from_roofline(card, [(4096, 4096)], form="factored", **weights)
    activations = 2 * 2 * 4096
    for rank in (1, 100, 1000, break_even_rank((4096, 4096), "factored")):
        moved = 2 * rank * 2 * 4096 + activations
        assert table.linear((4096, 4096), rank) == pytest.approx(moved / card.bandwidth + LAUNCH)
    assert table.linear((4096, 4096)) == pytest.approx((2 * 4096**2 + activations) / card.bandwidth + LAUNCH)
    assert table.rest == pytest.approx(2 * 128256 * 4096 / card.bandwidth + LAUNCH, rel=1e-3)
    pivoted = from_roofline(card, [(4096, 4096)], form="pivoted", **weights)
    moved = 2 * 2048 * (2 * 4096 - 2048) + activations
    assert pivoted.linear((4096, 4096), 2048) == pytest.approx(moved / card.bandwidth + LAUNCH, rel=2e-3)
    stored = from_roofline(card, [(4096, 4096)], form="pivoted", storages=[Storage(8)], **weights)
    moved = 2048 * (2 * 4096 - 2048) + 2 * 4096 + activations
    assert stored.linear((4096, 4096), 2048, Storage(8)) == pytest.approx(moved / card.bandwidth + LAUNCH, rel=2e-3)
    assert stored.rest_quantized == pytest.approx(128256 * 4096 / card.bandwidth + LAUNCH, rel=1e-2)


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CostTableError, match=r"a card \(A100, H100, .*, got 'H9000'"):
        find_card("H9000")


def test_a_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.layer = 0.0  # type: ignore[misc]
