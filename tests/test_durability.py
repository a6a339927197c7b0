from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.command_line import ROOT, environment

pytestmark = pytest.mark.long

COMPILER = shutil.which("cc")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The result of ``faulty_scenarios.py``: of all faults with ``--fuzz``, of some of them without."""
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "faults.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, ROOT / "tests/faulty_calls.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faulty_scenarios", folder, "1" if request.config.getoption("--fuzz") else "13"],
        cwd=ROOT,
        env={**environment(), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_when_a_call_fails_the_former_state_or_the_new_one_is_there_and_nothing_else(result: dict[str, Any]) -> None:
    print(*(f"{name}: {count}" for name, count in result["faults"].items()), sep="\n")
    assert len(result["faults"]) == 7
    assert result["failures"] == []


def test_all_is_on_the_disk_before_the_rename_and_before_the_progress_is_removed(result: dict[str, Any]) -> None:
    calls: list[str] = result["order"]
    placed = calls.index("rename out")
    temporary = calls[placed - 1].removeprefix("fsync ")
    assert os.path.dirname(temporary) == ""
    written = {call.split()[1] for call in calls[:placed] if call.startswith("write ") and "/.tmp" not in call}
    flushed = {call.split()[1] for call in calls[:placed] if call.startswith("fsync ")}
    assert written <= flushed  # safetensors writes into a name of its own and renames it:
    assert f"{temporary}/model.safetensors" in flushed
    assert calls[placed + 1].startswith("open /")  # the folder of the output
    assert calls[placed + 2] == "fsync" + calls[placed + 1].removeprefix("open")
    for name in ("state.json", "module-"):
        cleared = [index for index, call in enumerate(calls) if call.startswith(f"unlink out.partial/{name}")]
        assert min(cleared) > placed + 2
    assert calls[-1] == "unlink out.partial"
