from __future__ import annotations

import multiprocessing
import signal
import time
from multiprocessing.synchronize import Event

import pytest

from grasp.bench.signals import ending_by_interrupt


def test_a_forked_worker_that_is_ended_reports_no_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    """The block itself ends by one: tests/bench/test_serve.py."""
    fork = multiprocessing.get_context("fork")
    running = fork.Event()
    worker = fork.Process(target=work, args=(running,))
    with ending_by_interrupt():
        worker.start()
        assert running.wait(60)
        worker.terminate()
        worker.join()
    assert worker.exitcode == 128 + signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err


def work(running: Event) -> None:
    running.set()
    time.sleep(60)
