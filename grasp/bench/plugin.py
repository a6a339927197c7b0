"""A pytest plugin that guards the speed of kernels: ``pytest_plugins = ["grasp.bench.plugin"]`` in ``conftest.py``.

The fixture ``gate`` times a call in turns with a yardstick, and records both with pytest-benchmark. ``--gate=save``
saves a baseline of this device, ``--gate=compare`` compares with the last one. Exit code 1: a regression or a failed
test; 2: no usable baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from grasp.bench import gate as gates
from grasp.bench.gate import BaselineError, Document, Entry, Where

if TYPE_CHECKING:
    import torch


Operands = TypeVar("Operands")

UNUSABLE = 2  # exit code
EXTENSIONS = 3  # most times that rounds are added while the threshold is within the noise
SAVED = "baseline"  # part of a saved document's name

WHERE = pytest.StashKey[Where]()
ENTRIES = pytest.StashKey[dict[str, Entry]]()
BASELINE = pytest.StashKey[Document]()
REPORT = pytest.StashKey[list[str]]()
COLOURS = {"regression": "red", "lost": "red", "unclear": "yellow"}


class Gate:
    """The fixture ``gate``: call it once in a test.

    Example:
        >>> import torch
        >>> def test_silu(gate):
        ...     copies = [torch.randn(16, 4096) for _ in range(64)]
        ...     gate(torch.nn.functional.silu, lambda x: x * x.sigmoid(), copies, against="plain PyTorch")
    """

    def __init__(self, benchmark: Any, config: pytest.Config, name: str) -> None:
        self._benchmark, self._config, self._name = benchmark, config, name

    @property
    def device(self) -> torch.device:
        """The device to run the calls on."""
        import torch

        return torch.device(_where(self._config).kind)

    def __call__(
        self,
        candidate: Callable[[Operands], object],
        yardstick: Callable[[Operands], object],
        operands: Sequence[Operands],
        *,
        label: str | None = None,
        against: str = "the yardstick",
    ) -> None:
        """Time ``candidate`` in turns with ``yardstick``; with timing disabled, call both once.

        Args:
            candidate: the guarded call.
            yardstick: a call that does not change, takes about as long, and uses the same parts of the machine.
            operands: the calls get one of them each, in a cycle. Copies in different memory, together larger than the
                caches, make every call read memory; a single one stays in a cache.
            label: name in reports; ``None`` for the test's name.
            against: name of the yardstick in reports. A baseline with another yardstick is refused.

        Raises:
            ValueError: if there are no operands.
        """
        if not operands:
            raise ValueError("expected at least one operand for candidate and yardstick, got none")
        if not self._benchmark.enabled:
            yardstick(operands[0])
            self._benchmark(candidate, operands[0])
            return
        from grasp.bench.pairs import ROUNDS, Pairing, turn
        from grasp.bench.timing import Rotation, using_threads

        where = _where(self._config)
        rotation = Rotation(operands)
        with using_threads(where.threads):
            turns = turn(self.device, candidate, rotation)
            pairing = Pairing(turns, turn(self.device, yardstick, rotation))
            self._benchmark.pedantic(pairing.candidate, setup=pairing.yardstick, rounds=ROUNDS * pairing.turns)
            for extension in range(EXTENSIONS + 1):
                entry = Entry(label or self._name, against, pairing.result("candidate"), pairing.result("yardstick"))
                if extension == EXTENSIONS or self._settled(entry):
                    break
                pairing.more()
        self._benchmark.extra_info.update({gates.KEY: asdict(entry), "calls_per_round": turns.calls})
        self._config.stash.setdefault(ENTRIES, {})[self._benchmark.fullname] = entry

    def _settled(self, entry: Entry) -> bool:
        """Whether more rounds are not needed for a verdict."""
        baseline = self._config.stash.get(BASELINE, None)
        before = baseline and baseline.entries.get(self._benchmark.fullname)
        if not before:
            return True
        kind, threshold = _where(self._config).kind, self._config.option.gate_threshold
        return all(change.settled for change in gates.compare_entries(before, entry, kind, threshold))


@pytest.fixture
def gate(benchmark: Any, request: pytest.FixtureRequest) -> Gate:
    """Time a call in turns with a yardstick, see ``Gate.__call__``."""
    return Gate(benchmark, request.config, request.node.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("gate", "guarding speed (grasp.bench.plugin)")
    group.addoption("--gate", choices=("save", "compare"), help="Save a baseline, or compare with the last one.")
    group.addoption(
        "--gate-threshold",
        type=float,
        default=gates.THRESHOLD,
        metavar="FRACTION",
        help="Slower by more than this is a regression. Default: %(default)s",
    )
    group.addoption(
        "--gate-threads", type=int, default=1, metavar="N", help="Threads of PyTorch on a CPU. Default: %(default)s"
    )
    group.addoption("--gate-device", choices=tuple(gates.MEASURES), help="Default: cuda if there is a GPU.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the baseline before any timing, and set the folder of pytest-benchmark's files."""
    option = config.option
    if option.gate is None:
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--gate needs pytest-benchmark; pip install pytest-benchmark")
    storage = str(option.benchmark_storage).removeprefix("file://")
    if "://" in storage:
        raise pytest.UsageError(
            f"--gate saves baselines in files, expected a folder, got --benchmark-storage={storage}"
        )
    folder = gates.device_folder(Path(storage), _where(config))
    option.benchmark_storage = f"file://{folder}"
    option.benchmark_enable = True
    option.benchmark_save, option.benchmark_autosave = SAVED if option.gate == "save" else None, None
    if option.gate == "compare":
        from pytest_benchmark.utils import get_machine_id

        try:
            path = gates.latest(folder, get_machine_id())
            baseline = config.stash[BASELINE] = gates.read(path)
            gates.check_where(baseline.where, _where(config))
        except BaselineError as error:
            pytest.exit(str(error), returncode=UNUSABLE)
        config.stash[REPORT] = [f"baseline {path}: {baseline.recorded}"]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add facts that times depend on and pytest-benchmark does not record."""
    import torch

    machine_info[gates.KEY] = {**asdict(_where(config)), "torch": torch.__version__}


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
    now = Document(_where(session.config), entries)
    try:
        result = gates.compare(replace(baseline, entries=known), now, session.config.option.gate_threshold)
    except BaselineError as error:
        stash[REPORT].append(f"error: {error}")
        session.exitstatus = UNUSABLE
        return
    if others := len(baseline.entries) - len(known):
        stash[REPORT].append(f"{others} entries of the baseline belong to tests that were not selected")
    stash[REPORT] += result.lines()
    if result.failed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the gate's lines."""
    if lines := config.stash.get(REPORT, None):
        terminalreporter.section("gate")
        for line in lines:
            colour = COLOURS.get(line.partition(":")[0])
            terminalreporter.write_line(line, **({colour: True} if colour else {}))


def _where(config: pytest.Config) -> Where:
    """Device and threads of this run."""
    if WHERE not in config.stash:
        import torch

        from grasp.bench.conditions import device_name

        kind = config.option.gate_device or ("cuda" if torch.cuda.is_available() else "cpu")
        config.stash[WHERE] = Where(kind, device_name(torch.device(kind)), config.option.gate_threads)
    return config.stash[WHERE]
