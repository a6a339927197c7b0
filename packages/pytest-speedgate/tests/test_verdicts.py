from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from speedgate import baselines, verdicts
from speedgate.verdicts import BaselineError, Change, Document, Entry, Where

HERE = Where("cpu", "AMD EPYC", 1)
STEADY = (1.0, 0.99, 1.01) * 7


def entry(
    ratio: float, *, spread: Sequence[float] = STEADY, yardstick: float = 1e-4, against: str = "unfused"
) -> Entry:
    return Entry("op 8x8r2 M=1 float32 cpu", against, tuple(ratio * yardstick * s for s in spread), (yardstick,) * 21)


def change(before: Entry, now: Entry, kind: str = "cpu", **threshold: float) -> Change:
    return next(verdicts.compare_entries(before, now, kind, **threshold))


def document(entries: dict[str, Entry], where: Where = HERE) -> dict[str, Any]:
    """As pytest-benchmark writes it."""
    benchmarks = [{"fullname": name, "extra_info": {"gate": vars(entry)}} for name, entry in entries.items()]
    return {
        "datetime": "2026-01-31T12:00:00+00:00",
        "commit_info": {"id": "0123456789abcdef"},
        "machine_info": {"gate": {**vars(where), "torch": "2.11.0"}},
        "benchmarks": [*benchmarks, {"fullname": "not gated", "extra_info": {}}],
    }


def saved(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_median_lies_between_two_order_statistics() -> None:
    values = list(range(1, 21))
    # P(Binomial(20, 1/2) <= 3) = 0.0013, and of <= 4 it is 0.0059: the fourth from either end.
    assert verdicts.median_interval(values) == (verdicts.Interval(4, 10.5, 17))
    assert verdicts.median_interval(values, confidence=0.95) == verdicts.Interval(6, 10.5, 15)
    assert verdicts.median_interval(range(1, 9)) == verdicts.Interval(1, 4.5, 8)


def test_the_interval_has_the_median_as_often_as_it_says_for_a_skewed_distribution() -> None:
    generator = random.Random(0)
    samples = [[generator.lognormvariate(0, 2) for _ in range(20)] for _ in range(3000)]
    covered = sum(interval.low <= 1 <= interval.high for interval in map(verdicts.median_interval, samples)) / len(
        samples
    )
    assert 0.99 <= covered < 1


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="7 values are too few"):
        verdicts.median_interval(range(7))


def test_an_interval_of_a_quantile_needs_enough_values() -> None:
    for fraction, fewest in ((0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)):
        values = list(map(float, range(fewest)))
        assert verdicts.quantile_interval(values[1:], fraction, 0.95) is None
        low, high = verdicts.quantile_interval(values, fraction, 0.95) or (0, 0)
        assert low < fraction * fewest < high == fewest - 1


def test_an_interval_covers_the_quantile_as_often_as_it_says() -> None:
    numbers, covered = random.Random(0), 0
    for _ in range(400):
        low, high = verdicts.quantile_interval([numbers.gauss() for _ in range(100)], 0.9, 0.95) or (0, 0)
        covered += low <= NormalDist().inv_cdf(0.9) <= high
    assert 0.93 < covered / 400 < 0.99


def test_an_interval_of_thousands_of_values_is_narrow() -> None:
    low, high = verdicts.quantile_interval(range(5000), 0.5, 0.95) or (0, 0)
    assert 2420 < low < 2440
    assert 2560 < high < 2580


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "regression"), (1.1, "same"), (1.0, "same"), (0.7, "better")])
def test_a_steady_change_is_judged_by_the_threshold(factor: float, verdict: str) -> None:
    slowed = change(entry(0.5), entry(0.5 * factor))
    assert (slowed.verdict, slowed.settled) == (verdict, True)
    assert slowed.change == pytest.approx(factor - 1)


def test_a_change_beyond_the_threshold_that_noise_may_explain_is_unclear() -> None:
    noisy = change(entry(0.5), entry(0.5 * 1.2, spread=(0.8, 1.0, 1.2) * 7))
    assert (noisy.verdict, noisy.settled) == ("unclear", False)
    assert noisy.least < 0.15 < noisy.change < noisy.most


def test_a_slow_machine_is_no_regression_on_a_cpu() -> None:
    changes = list(verdicts.compare_entries(entry(0.5), entry(0.5, yardstick=5e-4), "cpu"))
    assert [(change.measure, change.verdict) for change in changes] == [("ratio", "same")]


def test_on_a_gpu_the_time_counts_as_well() -> None:
    changes = list(verdicts.compare_entries(entry(0.5), entry(0.5, yardstick=1.4e-4), "cuda"))
    assert [(change.measure, change.verdict) for change in changes] == [("ratio", "same"), ("time", "regression")]
    assert "time was 50.00 µs, is 70.00 µs: +40%" in changes[1].line()


def test_a_measure_of_the_user_is_judged_by_its_range() -> None:
    before, now = (
        replace(entry(0.5), measures={"bytes": values}) for values in ((10.0, 10.0, 12.0), (16.0, 15.0, 15.0))
    )
    steady, changed = verdicts.compare_entries(before, now, "cpu")
    assert (steady.measure, steady.verdict) == ("ratio", "same")
    assert (changed.verdict, changed.least, changed.most) == ("regression", 15 / 12 - 1, 16 / 10 - 1)
    assert changed.line().startswith("regression: op 8x8r2 M=1 float32 cpu: bytes was 10, is 15: +50% (+25% to +60%)")


def test_a_measure_that_is_no_longer_taken_fails_and_a_new_one_does_not() -> None:
    plain, measured = {"a": entry(0.5)}, {"a": replace(entry(0.5), measures={"bytes": (1.0,)})}
    assert verdicts.compare(Document(HERE, measured), Document(HERE, plain)).lost == ["op 8x8r2 M=1 float32 cpu: bytes"]
    new = verdicts.compare(Document(HERE, plain), Document(HERE, measured))
    assert (new.failed, new.new) == (False, ["op 8x8r2 M=1 float32 cpu: bytes"])


def test_a_line_names_the_call_both_ratios_and_the_threshold() -> None:
    line = change(entry(0.5), entry(0.65), threshold=0.2).line()
    assert line.startswith("regression: op 8x8r2 M=1 float32 cpu: time over unfused was 0.500, is 0.650: +30% (+")
    assert line.endswith("threshold +20%")


# --- documents --------------------------------------------------------------------------------------------------------


def test_what_is_no_longer_measured_fails_and_what_is_new_does_not() -> None:
    both, one = {"a": entry(1), "b": entry(1)}, {"a": entry(1)}
    lost = verdicts.compare(Document(HERE, both), Document(HERE, one))
    assert lost.failed
    assert any(line.startswith("lost: ") for line in lost.lines())
    new = verdicts.compare(Document(HERE, one), Document(HERE, both))
    assert not new.failed
    assert any(line.startswith("new: ") for line in new.lines())


def test_the_worst_comes_first_and_a_tally_last() -> None:
    before = {name: entry(1) for name in "abcd"}
    now = {"a": entry(1), "b": entry(1.3), "c": entry(1.5), "d": entry(0.5)}
    *lines, tally = verdicts.compare(Document(HERE, before), Document(HERE, now)).lines()
    assert [line.split(":")[0] for line in lines] == ["regression", "regression", "better"]
    assert [re.search(r"is [\d.]+: (\S+)", line)[1] for line in lines] == ["+50%", "+30%", "-50%"]  # type: ignore[index]
    assert tally == "4 compared: 2 regression, 0 unclear, 1 better, 1 same; 0 lost, 0 new"


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (Document(Where("cpu", "Intel Xeon", 1), {"a": entry(1)}), "'AMD EPYC'.*'Intel Xeon'"),
        (Document(Where("cpu", "AMD EPYC", 2), {"a": entry(1)}), "threads: 1.*threads: 2"),
        (Document(HERE, {"a": entry(1, against="dense")}), "against dense, in the baseline against unfused"),
        (Document(HERE, {"b": entry(1)}), "nothing to compare"),
        (Document(HERE, {}), "nothing was timed"),
    ],
    ids=["device", "threads", "yardstick", "names", "nothing"],
)
def test_what_cannot_be_compared_is_refused(now: Document, complaint: str) -> None:
    with pytest.raises(BaselineError, match=complaint):
        verdicts.compare(Document(HERE, {"a": entry(1)}), now)


def test_a_document_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    recorded = baselines.read(saved(tmp_path / "0001_baseline.json", document({"a": entry(0.5)})))
    assert (recorded.where, dict(recorded.entries)) == (HERE, {"a": entry(0.5)})
    assert recorded.recorded == "2026-01-31T12:00:00+00:00, commit 0123456789ab, torch 2.11.0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(document({"a": entry(0.5)}))[:-40],
        "[]",
        "{}",
        json.dumps({**document({}), "machine_info": {}}),
        json.dumps(document({}, Where("tpu", "x", 1))),
        json.dumps(document({"a": entry(-0.5)})),
        json.dumps(document({"a": entry(float("nan"))})),
        json.dumps(document({"a": Entry("a", "b", (10**400,) * 9, (1.0,) * 9)})),
        json.dumps(document({"a": Entry("a", "b", (1.0,) * 3, (1.0,) * 3)})),
        json.dumps(document({"a": Entry("a", "b", (1.0,) * 9, (1.0,) * 8)})),
    ],
    ids=["empty", "cut", "list", "nothing", "plain", "device", "negative", "nan", "huge", "few", "uneven"],
)
def test_a_damaged_document_is_refused_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "0001_baseline.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match=r"0001_baseline\.json is .+recorded with --gate.*; move it away"):
        baselines.read(path)
    assert path.read_text() == text


def test_the_last_baseline_is_that_of_the_highest_number(tmp_path: Path) -> None:
    folder = baselines.device_folder(tmp_path, HERE)
    assert folder.name == "amd-epyc"
    (folder / "Linux").mkdir(parents=True)
    for name in ("9999_baseline.json", "10000_baseline.json", "0002_baseline.json", "99999old_baseline.json"):
        saved(folder / "Linux" / name, {})
    assert baselines.latest(folder, "Linux").name == "10000_baseline.json"
    with pytest.raises(BaselineError, match=r"no baseline in .*intel/Linux; .* amd-epyc/Linux; .*save"):
        baselines.latest(tmp_path / "intel", "Linux")
    with pytest.raises(BaselineError, match="no baselines exist"):
        baselines.latest(tmp_path / "elsewhere" / "intel", "Linux")


def test_ratios_are_exported_with_the_fields_that_github_action_benchmark_takes() -> None:
    (row,) = baselines.smaller_is_better(Document(HERE, {"a": entry(0.5)}))
    # Its README: name, unit and value are required; range and extra are texts.
    assert {name: type(value) for name, value in row.items()} == {
        "name": str,
        "unit": str,
        "value": float,
        "range": str,
        "extra": str,
    }
    assert (row["name"], row["unit"], row["value"]) == ("op 8x8r2 M=1 float32 cpu", "× unfused", 0.5)
    assert row["extra"] == "50.00 µs on 'AMD EPYC' (cpu, threads: 1)"
