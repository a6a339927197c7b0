"""The pytest plugin: the fixture ``gate`` and the options ``--gate…``.

``--gate=save`` saves a baseline of this device, ``--gate=compare`` compares with the last one. Exit code 1: a
regression or a failed test; 2: no usable baseline.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from speedgate import baselines, devices, markdown, verdicts
from speedgate.fixture import BASELINE, ENTRIES, WHERE, Gate
from speedgate.verdicts import BaselineError, Document

UNUSABLE = 2  # exit code
SAVED = "baseline"  # part of a saved document's name

REPORT = pytest.StashKey[list[str]]()
COLOURS = {"regression": "red", "lost": "red", "unclear": "yellow"}


@pytest.fixture
def gate(benchmark: Any, request: pytest.FixtureRequest) -> Gate:
    """Time a call in turns with a yardstick, see ``Gate.__call__``."""
    return Gate(benchmark, request.config, request.node.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("gate", "guarding speed (speedgate)")
    group.addoption("--gate", choices=("save", "compare"), help="Save a baseline, or compare with the last one.")
    group.addoption(
        "--gate-threshold",
        type=float,
        default=verdicts.THRESHOLD,
        metavar="FRACTION",
        help="Slower by more than this is a regression. Default: %(default)s",
    )
    group.addoption(
        "--gate-threads", type=int, default=1, metavar="N", help="Threads of PyTorch on a CPU. Default: %(default)s"
    )
    group.addoption(
        "--gate-device",
        choices=tuple(verdicts.MEASURES),
        help="cuda: the calls are PyTorch's, and are timed on the GPU. Default: cpu",
    )
    group.addoption(
        "--gate-markdown",
        type=Path,
        metavar="FILE",
        help="Append the result as a table of markdown; $GITHUB_STEP_SUMMARY always gets it.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Read the baseline before any timing, and set the folder of pytest-benchmark's files."""
    option = config.option
    try:
        config.stash[WHERE] = devices.where(option.gate_device or "cpu", option.gate_threads)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if option.gate_markdown and not option.gate_markdown.parent.is_dir():
        raise pytest.UsageError(f"--gate-markdown={option.gate_markdown}: expected a file in a folder that exists")
    if option.gate is None:
        return
    if not hasattr(option, "benchmark_storage"):
        raise pytest.UsageError("--gate needs pytest-benchmark; pip install pytest-benchmark")
    storage = str(option.benchmark_storage).removeprefix("file://")
    if "://" in storage:
        raise pytest.UsageError(
            f"--gate saves baselines in files, expected a folder, got --benchmark-storage={storage}"
        )
    folder = baselines.device_folder(Path(storage), config.stash[WHERE])
    option.benchmark_storage = f"file://{folder}"
    option.benchmark_enable = True
    option.benchmark_save, option.benchmark_autosave = SAVED if option.gate == "save" else None, None
    if option.gate == "compare":
        from pytest_benchmark.utils import get_machine_id

        try:
            path = baselines.latest(folder, get_machine_id())
            baseline = config.stash[BASELINE] = baselines.read(path)
            verdicts.check_where(baseline.where, config.stash[WHERE])
        except BaselineError as error:
            pytest.exit(str(error), returncode=UNUSABLE)
        config.stash[REPORT] = [f"baseline {path}: {baseline.recorded}"]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add facts that times depend on and pytest-benchmark does not record."""
    torch = sys.modules.get("torch")
    machine_info[baselines.KEY] = {**asdict(config.stash[WHERE]), "torch": torch and str(torch.__version__)}


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark saves
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Compare with the baseline, or save a baseline if all tests passed."""
    if session.config.option.gate and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        {"save": _check_save, "compare": _compare}[session.config.option.gate](session)
    return (yield)


def _check_save(session: pytest.Session) -> None:
    config = session.config
    failed = session.exitstatus != pytest.ExitCode.OK
    if failed or not config.stash.setdefault(ENTRIES, {}):
        config.pluginmanager.getplugin("pytest-benchmark").save = None
        config.stash[REPORT] = [f"no baseline was saved: {'a test failed' if failed else 'nothing was timed'}"]
        session.exitstatus = session.exitstatus if failed else UNUSABLE


def _compare(session: pytest.Session) -> None:
    stash = session.config.stash
    selected = {item.nodeid for item in session.items}
    baseline = stash[BASELINE]
    known = {name: entry for name, entry in baseline.entries.items() if name in selected}
    entries = stash.setdefault(ENTRIES, {})
    now = Document(stash[WHERE], entries)
    try:
        result = verdicts.compare(replace(baseline, entries=known), now, session.config.option.gate_threshold)
    except BaselineError as error:
        stash[REPORT].append(f"error: {error}")
        session.exitstatus = UNUSABLE
        return
    if others := len(baseline.entries) - len(known):
        stash[REPORT].append(f"{others} entries of the baseline belong to tests that were not selected")
    stash[REPORT] += result.lines()
    _write_markdown(session.config, markdown.comparison_text(result, baseline.recorded))
    if result.failed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _write_markdown(config: pytest.Config, text: str) -> None:
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    paths = [config.option.gate_markdown, summary and Path(summary)]
    markdown.append(text, filter(None, paths))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the gate's lines."""
    if lines := config.stash.get(REPORT, None):
        terminalreporter.section("gate")
        for line in lines:
            colour = COLOURS.get(line.partition(":")[0])
            terminalreporter.write_line(line, **({colour: True} if colour else {}))
