"""The pytest plugin: the fixture ``gate`` and the options ``--gate…``.

``--gate=save`` saves a baseline of this device, ``--gate=compare`` compares with the last one, ``--gate-against``
compares with another version in turns, ``--gate-selftest`` counts how many planted slowdowns the gate catches. Exit
code 1: a regression or a failed test; 2: nothing to judge.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from speedgate import baselines, devices, markdown, verdicts
from speedgate.checkouts import OtherVersionError, checkout
from speedgate.fixture import RUN, UNUSABLE, Gate, Run
from speedgate.other_version import OtherVersion
from speedgate.selftest import SelfTest
from speedgate.server import Server
from speedgate.verdicts import BaselineError, Comparison, Document

SAVED = "baseline"  # part of a saved document's name

RED = ("regression", "lost", "error", "missed", "false alarm")
COLOURS = {**dict.fromkeys(RED, "red"), "unclear": "yellow"}


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
        type=verdicts.threshold,
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
        "--gate-against",
        metavar="PATH|REV",
        help="Time each call in turns with the same test's call in another checkout or git revision.",
    )
    group.addoption("--gate-serve", type=int, metavar="DESCRIPTOR", help=argparse.SUPPRESS)  # of that other process
    group.addoption(
        "--gate-selftest",
        nargs="?",
        const=30.0,
        type=float,
        metavar="P",
        help="Slow each call down by P per cent, and count how many the gate catches. Default of P: %(const)s",
    )
    group.addoption(
        "--gate-markdown",
        type=Path,
        metavar="FILE",
        help="Append the result as a table of markdown; $GITHUB_STEP_SUMMARY always gets it.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Check the options and read the baseline before any timing, and set the folder of pytest-benchmark's files."""
    option = config.option
    try:
        here = devices.where(option.gate_device or "cpu", option.gate_threads)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    run = config.stash[RUN] = Run(here, Document(here, {}))
    _check_options(config)
    if option.gate_serve is not None:
        run.server = Server(option.gate_serve, config.rootpath)
        config.pluginmanager.register(run.server)
    elif _mode(config) is None:
        return
    option.benchmark_enable = True
    if option.gate is None:
        return
    storage = str(option.benchmark_storage).removeprefix("file://")
    if "://" in storage:
        raise pytest.UsageError(
            f"--gate saves baselines in files, expected a folder, got --benchmark-storage={storage}"
        )
    folder = baselines.device_folder(Path(storage), here)
    option.benchmark_storage = f"file://{folder}"
    option.benchmark_save, option.benchmark_autosave = SAVED if option.gate == "save" else None, None
    if option.gate == "compare":
        from pytest_benchmark.utils import get_machine_id

        try:
            path = baselines.latest(folder, get_machine_id())
            run.baseline = baselines.read(path)
            verdicts.check_where(run.baseline.where, here)
        except BaselineError as error:
            pytest.exit(str(error), returncode=UNUSABLE)
        run.report.append(f"baseline {path}: {run.baseline.recorded}")


def _mode(config: pytest.Config) -> str | None:
    """Key of ``FINISH``, or ``None`` for a run without a verdict.

    Raises:
        pytest.UsageError: if the options name several.
    """
    option = config.option
    asked = (option.gate, option.gate_selftest and "selftest", option.gate_against and "against")
    modes = [mode for mode in asked if mode]
    if len(modes) > 1:
        raise pytest.UsageError(
            f"expected one of --gate, --gate-selftest and --gate-against, got {' and '.join(modes)}"
        )
    return modes[0] if modes else None


def _check_options(config: pytest.Config) -> None:
    option = config.option
    if (file := option.gate_markdown) and (file.is_dir() or not file.parent.is_dir()):
        raise pytest.UsageError(f"--gate-markdown={file}: expected a file in a folder that exists")
    if option.gate_selftest is not None and not 100 * option.gate_threshold < option.gate_selftest < math.inf:
        raise pytest.UsageError(
            f"--gate-selftest={option.gate_selftest:g}: expected more per cent than the threshold of "
            f"{100 * option.gate_threshold:g}, which the gate lets pass"
        )
    if option.gate_threads < 1:
        raise pytest.UsageError(f"--gate-threads={option.gate_threads}: expected at least 1")
    if _mode(config) and not hasattr(option, "benchmark_storage"):
        raise pytest.UsageError("the gate needs pytest-benchmark; pip install pytest-benchmark")
    if _mode(config) and getattr(option, "dist", "no") != "no":
        raise pytest.UsageError(
            "the gate times one call at a time, not in several processes of pytest-xdist; give -n 0"
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the process of the other version."""
    config, run = session.config, session.config.stash[RUN]
    version, root = config.option.gate_against, config.rootpath
    items = [item for item in session.items if "gate" in getattr(item, "fixturenames", ())]
    if not version or not items or config.option.collectonly:
        return
    options = [f"--gate-device={run.where.kind}", f"--gate-threads={run.where.threads}"]
    stack = ExitStack()
    config.add_cleanup(stack.close)
    try:
        if outside := [item.path for item in items if not item.path.is_relative_to(root)]:
            raise OtherVersionError(
                f"{outside[0]} is outside the root folder {root}; give the folder that has all tests with --rootdir"
            )
        folder = stack.enter_context(checkout(version, root))
        files = sorted({item.path.relative_to(root) for item in items})
        present = [file for file in files if (folder / file).exists()]
        if not present:
            raise OtherVersionError(f"{version} has none of the files with benchmarks: {', '.join(map(str, files))}")
        run.other = other = OtherVersion(version, folder, root.resolve(), present, options)
        stack.callback(other.close)
        other.require([item.nodeid for item in items])
    except OtherVersionError as error:
        pytest.exit(str(error), returncode=UNUSABLE)
    run.baseline = Document(run.where, other.entries, f"{version} in the same minutes")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the loops of other plugins
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Notice that the tests were not interrupted; ``pytest.exit`` can give an interrupted run any exit code."""
    result = yield
    session.config.stash[RUN].finished = True
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add facts that times depend on and pytest-benchmark does not record."""
    torch = sys.modules.get("torch")
    machine_info[baselines.KEY] = {**asdict(config.stash[RUN].where), "torch": torch and str(torch.__version__)}


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark saves
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Judge the run, or save a baseline if all tests passed."""
    mode = None if session.config.option.collectonly else _mode(session.config)
    if mode == "save" or (mode and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)):
        FINISH[mode](session)
    return (yield)


def _check_save(session: pytest.Session) -> None:
    run, status = session.config.stash[RUN], session.exitstatus
    if status != pytest.ExitCode.OK or not run.entries or not run.finished:
        reason = "the run was interrupted" if run.entries else "nothing was timed"
        session.config.pluginmanager.getplugin("pytest-benchmark").save = None
        run.report.append(f"no baseline was saved: {'a test failed' if session.testsfailed else reason}")
        session.exitstatus = status or UNUSABLE


def _compare(session: pytest.Session) -> None:
    run, selected = session.config.stash[RUN], {item.nodeid for item in session.items}
    baseline = run.baseline
    known = {name: entry for name, entry in baseline.entries.items() if name in selected}
    try:
        now = Document(run.where, run.entries)
        result = verdicts.compare(replace(baseline, entries=known), now, session.config.option.gate_threshold)
    except BaselineError as error:
        _give_up(session, str(error))
        return
    if others := len(baseline.entries) - len(known):
        run.report.append(f"{others} entries of the baseline belong to tests that were not selected")
    _report(session, result, markdown.comparison_text(result, baseline.recorded))


def _judge_selftest(session: pytest.Session) -> None:
    trials = session.config.stash[RUN].trials
    if not trials:
        _give_up(session, verdicts.NOTHING_TIMED)
        return
    result = SelfTest(trials, session.config.option.gate_selftest / 100)
    _report(session, result, markdown.selftest_text(result))


def _give_up(session: pytest.Session, reason: str) -> None:
    """Print why there is no verdict, and set the exit code; that of a failed test stays."""
    session.config.stash[RUN].report.append(f"error: {reason}")
    session.exitstatus = session.exitstatus or UNUSABLE


FINISH = {"save": _check_save, "compare": _compare, "against": _compare, "selftest": _judge_selftest}


def _report(session: pytest.Session, result: Comparison | SelfTest, text: str) -> None:
    """Print a result, set the exit code, and write the result's markdown."""
    if result.failed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    report = session.config.stash[RUN].report
    report += result.lines()
    for path in filter(None, [session.config.option.gate_markdown, os.environ.get("GITHUB_STEP_SUMMARY")]):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            report.append(f"the table was not written: {error}")


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the gate's lines."""
    if lines := config.stash[RUN].report:
        terminalreporter.section("gate")
        for line in lines:
            colour = COLOURS.get(line.partition(":")[0])
            terminalreporter.write_line(line, **({colour: True} if colour else {}))
