from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grasp import cli
from grasp.bench.recorded import WorkloadResult
from grasp.bench.records import RECORDS, ModelResult, NotMeasured, OpResult
from grasp.bench.results import append_results
from grasp.bench.schema import Record
from grasp.bench.serve_records import ServeResult
from grasp.checkpoint.compression_report import CompressionReport
from grasp.config import GraspConfig
from grasp.errors import ResultsError
from grasp.method.storage import Storage
from grasp.reporting.page import render, write_report
from grasp.reporting.result_tables import require_same_model
from grasp.workflows.compress import compress
from grasp.workflows.quantize import quantize
from grasp.workflows.samples import Samples
from tests.bench.records import record
from tests.browser import Tab, browser, find_chromium
from tests.command_line import save_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 20
CHROMIUM = find_chromium()
PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint, as the command line writes it."""
    here = tmp_path_factory.mktemp("report")
    save_tiny_model(here / "tiny")
    (here / "text.txt").write_text(TEXT)
    samples = Samples(str(here / "text.txt"), 2, 24)
    compress(str(here / "tiny"), here / "small", GraspConfig(layers=(0, 2), retain_ratio=0.4), samples)
    return here / "small"


@pytest.fixture(scope="module")
def report(folder: Path) -> CompressionReport:
    return CompressionReport.load(folder)


@pytest.fixture(scope="module")
def plain_page(report: CompressionReport) -> str:
    """The page without benchmarks."""
    return render(report, "small")


@pytest.fixture(scope="module")
def full_page(report: CompressionReport) -> str:
    """The page with benchmarks of every kind."""
    return render(report, "small", measured(report))


@pytest.fixture
def grasp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Run the command in this process: its exit code, and what it wrote."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["grasp", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return run


def measured(report: CompressionReport) -> list[Record]:
    """Records of every kind, of the model that was compressed."""
    size = {"parameters": report.before.parameters}
    shape = {"op": "lowrank_linear", "shape": "4x6r2", "dtype": "float32"}
    return [
        *(record(ModelResult, model="tiny", provider=name, **size) for name in ("dense", "removed", "compressed/cpu")),
        *(record(OpResult, provider=name, median_us=ms, **shape) for name, ms in (("cpu", 9.5), ("dense", 100.0))),
        record(ServeResult, model="tiny"),
        record(WorkloadResult),
        record(NotMeasured, benchmark="ops", provider="cuda", not_measured="no <GPU> here", model=None),
    ]


class Text(HTMLParser):
    """The cells of the tables, and all text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.shown = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden = tag in ("style", "script")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.shown += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data


def test_the_page_says_what_was_done_to_every_module(report: CompressionReport, plain_page: str) -> None:
    text = Text(plain_page)
    assert f"{100 * report.compression_ratio:.1f} %" in text.shown
    assert "2 of 3" in text.shown
    rows = {(row[0], row[1]): row for row in text.rows if len(row) > 1}
    assert len(report.compressed) == 14
    for module in report.compressed:
        row = rows[str(module.layer), module.name.partition(f".{module.layer}.")[2]]
        shape = [module.out_features, module.in_features, module.rank, min(module.out_features, module.in_features)]
        assert row[2:8] == [module.block, *map(str, shape), module.form]
        assert row[-1] == f"{100 * module.importance_kept:.1f} %"


def test_the_page_lists_candidates_and_kinds_of_text(report: CompressionReport) -> None:
    losses = {"dense": 3.0, "low-rank": 3.25, "layers 1 removed": 3.5, "compressed": 3.25}
    measured_ones = replace(
        report,
        held_out_loss=losses,
        candidate_bytes=dict.fromkeys(losses, 4_000_000),
        candidate_seconds=dict.fromkeys(losses, 0.025),
        kind_losses={"stories": (2.0, 2.125), "source code": (3.0, 3.5)},
    )
    text = Text(render(measured_ones, "small"))
    for name, loss in losses.items():
        assert [name, f"{loss:.4f}", "4.0 MB", "25.00"] in text.rows
    assert text.rows.index(["source code", "3.000", "3.500", "+0.500"]) + 1 == text.rows.index(
        ["stories", "2.000", "2.125", "+0.125"]
    )
    assert "+0.312 nats per token in the mean of 2, +0.500 on source code" in text.shown


def test_modules_that_were_left_have_their_reason_and_converted_ones_the_command(report: CompressionReport) -> None:
    left = replace(report.modules[0], reason="too <small>: rank 1 does not shrink (2, 32)")
    pivoted = [replace(module, form="pivoted") for module in report.modules[2:]]  # by `grasp convert`
    page = render(replace(report, modules=(left, report.modules[1], *pivoted)), "small")
    assert "12 pivoted, 1 factored" in page
    assert "\ngrasp convert small -o small-pivoted --to pivoted" in page
    assert [str(left.layer), "mlp.gate_proj", left.reason] in Text(page).rows or left.reason in Text(page).shown
    assert "<small>" not in page


def test_all_records_are_in_tables_and_none_is_called_missing(report: CompressionReport, full_page: str) -> None:
    records, text = measured(report), Text(full_page)
    for record_class in RECORDS:
        columns = record_class.columns
        assert record_class.title in text.shown
        rows = [[column.text_of(line) for column in columns] for line in records if isinstance(line, record_class)]
        shown = [row[-len(columns) :] for row in text.rows]
        assert rows
        assert all(row in shown for row in rows), record_class
    assert "Not measured:" not in text.shown
    assert "no <GPU> here" in text.shown


@pytest.mark.parametrize("record_class", [record_class for record_class in RECORDS if record_class.missing])
def test_missing_results_are_named_with_the_command_that_measures_them(
    report: CompressionReport, record_class: type[Record]
) -> None:
    records = [line for line in measured(report) if not isinstance(line, record_class)]
    text = Text(render(report, "small", records))
    assert text.shown.count("Not measured:") == 1
    assert f"Not measured: {record_class.missing}" in text.shown
    assert record_class.command.format(model="tiny", folder="small") in text.shown
    assert f"grasp report small --results {record_class.kind}.jsonl" in text.shown


def test_a_report_from_python_or_of_an_older_version_has_a_page_too(report: CompressionReport) -> None:
    bare = replace(report, request={}, modules=tuple(replace(m, spectrum=()) for m in report.modules))
    text = Text(render(bare, "small"))
    assert "Not measured: the report has no singular values" in text.shown
    assert "compressed from Python" in text.shown
    assert "GraspConfig.from_dict({'layers': [0, 2]" in text.shown


def test_nothing_that_is_given_becomes_markup(report: CompressionReport, full_page: str) -> None:
    bad = "<script>alert('x')</script>\"&"
    modules = tuple(replace(m, name=f"a.{m.layer}.{bad}", block=bad) for m in report.modules)
    request = {**report.request, "model": bad, "calibration": bad, "grasp": bad}
    config = {**report.config, "basis": bad}
    changed = replace(report, modules=modules, request=request, config=config, versions={bad: bad}, scope=bad)
    records = [
        replace(line, **{name: bad for name in ("provider", "schedule") if hasattr(line, name)})
        for line in measured(report)
    ]
    page = render(changed, bad, records)
    assert page.count("<script") == full_page.count("<script") == 1
    assert "<script>alert" not in page
    assert bad in Text(page).shown


def test_the_page_loads_nothing(full_page: str) -> None:
    assert "default-src 'none'" in full_page
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', full_page)
    assert links
    assert all((one or other).startswith("#") for one, other in links)


def test_the_command_writes_the_page_and_replaces_it(
    folder: Path, full_page: str, tmp_path: Path, grasp: Callable[..., tuple[Any, str, str]]
) -> None:
    page = tmp_path / "page.html"
    assert grasp("report", folder, "-o", page) == (0, f"{page}\n", "")
    first = page.read_text()
    results = tmp_path / "results.jsonl"
    append_results(results, measured(CompressionReport.load(folder)))
    assert grasp("report", folder, "-o", page, "--results", results, "--json")[0] == 0
    assert len(page.read_text()) > len(first)
    assert page.read_text() == full_page
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "results.jsonl"}


def lines(*records: Record) -> Callable[[Path], None]:
    return lambda path: append_results(path, records)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no report": (lambda folder: None, "report.json; expected the report.json that `grasp compress` wrote"),
    "corrupt": (lambda folder: (folder / "report.json").write_text('{"a'), "not a compression report"),
    "no UTF-8": (lambda folder: (folder / "report.json").write_bytes(b"\xff"), "report.json is not UTF-8"),
    "something else": (lambda folder: (folder / "report.json").write_text("[]"), "not a compression report"),
}
BAD_RESULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "corrupt": (lambda path: path.write_text('{"kind": "op"\n'), "line 1: it is not JSON"),
    "unknown": (lambda path: path.write_text('{"a": 1}\n'), "got kind None"),
    "unknown op": (
        lines(record(OpResult, op="a", shape="4x6r2", dtype="float32")),
        "the op 'a' in float32; expected one of",
    ),
    "unknown shape": (lines(record(OpResult, op="lowrank_linear", dtype="float32")), "shape 'a' is not KxNrR"),
    "no time": (
        lines(record(OpResult, op="lowrank_linear", shape="4x6r2", dtype="float32", median_us=0.0)),
        "lowrank_linear took 0.0 µs; expected a time above 0",
    ),
    "another model": (
        lines(record(ModelResult, model="hub/other")),
        "has results of hub/other, but small was made from tiny",
    ),
    "another kind": (lambda path: path.write_text('{"kind": "study"}\n'), "got kind 'study'; expected kind model, op"),
    "another size": (
        lines(record(ModelResult, model="tiny", provider="dense", parameters=7)),
        "with 7 parameters, but small",
    ),
    "another model left out": (lines(record(NotMeasured, model="other", op=None)), "has results of other"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused(case: str, tmp_path: Path, grasp: Callable[..., tuple[Any, str, str]]) -> None:
    (tmp_path / "bad").mkdir()
    make, words = BAD_FOLDERS[case]
    make(tmp_path / "bad")
    code, out, err = grasp("report", tmp_path / "bad", "-o", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_refused_and_the_earlier_page_stays(
    case: str, folder: Path, plain_page: str, tmp_path: Path, grasp: Callable[..., tuple[Any, str, str]]
) -> None:
    make, words = BAD_RESULTS[case]
    make(tmp_path / "bad.jsonl")
    page = tmp_path / "page.html"
    before = plain_page.encode()
    page.write_bytes(before)
    code, out, err = grasp("report", folder, "-o", page, "--results", tmp_path / "bad.jsonl")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert "bad.jsonl" in err
    assert page.read_bytes() == before


def test_a_page_says_that_the_model_was_quantised_and_trained_afterwards(folder: Path, tmp_path: Path) -> None:
    text = "was quantised and trained after this compression"
    write_report(folder, tmp_path / "small.html")
    assert "after this compression" not in (tmp_path / "small.html").read_text()
    samples = Samples(str(folder.parent / "text.txt"), 2, 24)
    quantize(str(folder), tmp_path / "int8", Storage(8), samples, rounding="nearest")
    (tmp_path / "int8" / "recovery.json").write_text("{}")
    write_report(tmp_path / "int8", tmp_path / "int8.html")
    assert text in (tmp_path / "int8.html").read_text()


def test_what_is_no_page_of_this_command_is_never_replaced(
    folder: Path, tmp_path: Path, grasp: Callable[..., tuple[Any, str, str]]
) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("<p>mine")
    for target in (notes, tmp_path, folder / "report.json"):
        code, _, err = grasp("report", folder, "-o", target)
        assert code == 2
        assert ("is not a file" if target == tmp_path else "is not a page of `grasp report`") in err
    assert notes.read_text() == "<p>mine"
    assert json.loads((folder / "report.json").read_text())


def test_a_folder_that_is_missing_is_not_made(
    folder: Path, tmp_path: Path, grasp: Callable[..., tuple[Any, str, str]]
) -> None:
    code, _, err = grasp("report", folder, "-o", tmp_path / "no" / "page.html")
    assert code == 2
    assert "there is no folder" in err
    assert not (tmp_path / "no").exists()


def test_results_of_the_checkpoint_itself_are_its_own(report: CompressionReport) -> None:
    result = record(ModelResult, model="/a/small", provider="dense", parameters=report.after.parameters)
    require_same_model([result], "tiny", "small", report.before.parameters, Path("x"))


def test_without_names_sizes_tell_models_apart() -> None:
    result = record(ModelResult, model="a", provider="dense", parameters=5)
    require_same_model([result], None, "small", 5, Path("x"))
    with pytest.raises(ResultsError, match="x has results of a with 5 parameters"):
        require_same_model([result], None, "small", 6, Path("x"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install the package chromium, or Google Chrome")
    with browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(report: CompressionReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, long names among them."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    long = "a-checkpoint-of-a-name-that-has-no-space-in-it-and-goes-on-and-on-until-no-phone-is-wide-enough"
    path.write_text(render(report, long, measured(report)), encoding="utf-8")
    return path


BOXES = """[...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  return {open: !svg.closest("details:not([open])"), left: box.left, right: box.right, height: box.height,
          drawn: [...svg.querySelectorAll("path, use")].some(each => each.getBoundingClientRect().width > 0),
          text: Math.min(...[...svg.querySelectorAll("text")].map(each => each.getBoundingClientRect().height))};
})"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_browser_shows_all_figures_and_has_nothing_to_complain_of(
    tab: Tab, page: Path, width: int, dark: bool
) -> None:
    tab.open(page, width=width, dark=dark, mobile=width == PHONE)
    assert tab.complaints() == []
    assert tab.requests() == [page.as_uri()]
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("innerWidth") == width
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    boxes = tab.run(BOXES)
    assert len(boxes) == 9  # layers, parameters, two spectra, perplexity by size, speed, latency, a roofline, servers
    for box in boxes:
        assert box["left"] >= 0
        assert box["right"] <= width
        assert box["right"] - box["left"] >= 320
        assert box["height"] > 100
        assert box["drawn"]
        assert box["text"] >= 10  # CSS pixels
    assert tab.run("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_the_ink_of_figures_is_that_of_the_page(tab: Tab, page: Path) -> None:
    inks = set()
    for dark in (False, True):
        tab.open(page, width=DESKTOP, dark=dark)
        ink = tab.run("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == tab.run("getComputedStyle(document.body).color")
        assert ink != tab.run("getComputedStyle(document.body).backgroundColor")
        inks.add(ink)
    assert len(inks) == 2


@pytest.mark.slow
def test_a_table_sorts_by_the_keyboard(tab: Tab, page: Path, report: CompressionReport) -> None:
    tab.open(page, width=DESKTOP)
    heading = "[...document.querySelectorAll('#ranks-and-sizes th')].find(each => each.textContent === 'rank')"
    rows = "[...document.querySelectorAll('#ranks-and-sizes tbody tr')]"
    cells = f"{rows}.map(row => row.cells[{heading}.cellIndex].textContent)"
    ranks = [module.rank for module in report.compressed]
    assert list(map(int, tab.run(cells))) == ranks
    assert len(set(ranks)) > 1
    tab.run(f"{heading}.querySelector('button').focus()")
    for sort, expected in (("ascending", sorted(ranks)), ("descending", sorted(ranks, reverse=True))):
        tab.press("Enter", 13, "\r")
        assert list(map(int, tab.run(cells))) == expected
        assert tab.run(f"{heading}.getAttribute('aria-sort')") == sort


@pytest.mark.slow
def test_numbers_sort_as_numbers_and_blanks_come_last(tab: Tab, report: CompressionReport, tmp_path: Path) -> None:
    lines = [
        record(OpResult, provider=name, floor_us=floor, op="lowrank_linear", shape="4x6r2", dtype="float32")
        for name, floor in (("x", 9.0), ("y", None), ("z", 1e4))
    ]
    path = tmp_path / "page.html"
    path.write_text(render(report, "small", lines), encoding="utf-8")
    tab.open(path, width=DESKTOP)
    heading = "[...document.querySelectorAll('#benchmarks th')].find(each => each.textContent === 'floor µs')"
    order = "[...document.querySelectorAll('#benchmarks tbody tr')].map(row => row.cells[0].textContent).join('')"
    for expected in ("xzy", "zxy"):
        tab.run(f"{heading}.querySelector('button').click()")
        assert tab.run(order) == expected
