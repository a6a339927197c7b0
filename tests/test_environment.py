from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from grasp import environment
from grasp_kernels.dispatch import BACKENDS


def test_every_backend_is_available_or_says_why_not() -> None:
    backends = environment.environment()["backends"]
    assert list(backends) == [row.name for row in BACKENDS]
    assert backends["reference"] == "available"
    assert all(backends.values())


def test_all_of_it_is_json_and_a_missing_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    facts = json.loads(json.dumps(environment.environment()))
    assert facts["versions"]["no-such-package"] is None
    assert facts["versions"]["torch"]


@pytest.mark.parametrize(
    ("autoload", "installed", "status"),
    [
        ("1", True, "available"),
        ("0", True, "off: TORCH_DEVICE_BACKEND_AUTOLOAD=0; `import grasp` before loading"),
        ("1", False, "off: grasp is importable but not installed; `import grasp` before loading"),
    ],
)
def test_it_says_whether_plain_transformers_finds_the_format(
    autoload: str, installed: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    points = [SimpleNamespace(name="grasp")] if installed else []
    monkeypatch.setattr(environment, "entry_points", lambda group: points if group == "torch.backends" else [])
    assert environment.environment()["transformers_reload"] == status
