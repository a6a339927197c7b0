from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.releases import RUNS, record

# Triton reads this when it is first imported; without a GPU its kernels run on CPU tensors, interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="how many runs of each kind are killed at random points")
    parser.addoption("--fuzz", action="store_true", help="run the full number of random cases of tests/fuzz: minutes")
    parser.addoption("--record-releases", choices=RUNS, help="if all pass, write their releases to the record")
    parser.addoption("--scale", action="store_true", help="also run tests/scale with layers of an 8 B model: hours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take long first, so that no process waits at the end for one of them in another."""
    long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "long")))}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Numbers that a test file draws when it is imported are the same in every run; PyTorch's seed is another."""
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Libraries and tests stay to the end: the garbage collector need not look at their 400 000 objects each time.

    One call of each kind measures the speed of the device. Nothing is flushed to the disk: what a killed process wrote
    is there without it, and only tests/test_durability.py, whose processes are new, is about a power cut.
    """
    os.fsync = lambda fd: None
    if (device_speed := sys.modules.get("grasp.compression.device_speed")) is not None:
        device_speed.PROBE_SECONDS = 0.0
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    """Record the releases of a run in which everything has passed."""
    run, is_worker = config.getoption("--record-releases"), hasattr(config, "workerinput")
    if run and exitstatus == pytest.ExitCode.OK and not is_worker:
        record(run, {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "skipped")})


def pytest_sessionfinish() -> None:
    """Triton's bindings report what the end of the process does not free."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Likewise for the numbers that a test and its fixtures draw."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fuzzing(request: pytest.FixtureRequest) -> bool:
    """Whether tests/fuzz runs its full number of cases; in CI it runs a part of them."""
    return bool(request.config.getoption("--fuzz"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an output that is not wholly written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def short_builtin_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the built-in texts in this process, as tests/traced.py does in those that it is preloaded into."""
    if "grasp.calibration" in sys.modules:
        from tests.short_text import shorten

        shorten(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Put the environment back as it was: the command line sets variables for the libraries it loads."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
