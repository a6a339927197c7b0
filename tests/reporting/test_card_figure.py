from __future__ import annotations

from pathlib import Path

import pytest

from grasp.checkpoint import compression_report
from grasp.checkpoint.card import FIGURE, model_card, without_figure
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import MissingPackageError
from grasp.reporting import card_figure
from grasp.reporting.card_figure import add_figure
from tests.tiny_models import tiny_batches, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.4))
    (tmp_path / compression_report.FILE_NAME).write_text(report.to_json())
    (tmp_path / "README.md").write_text(model_card(model, base_model=None))
    return tmp_path


def test_a_card_shows_what_linears_kept_once(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    add_figure(folder)
    shown, picture = (folder / "README.md").read_text(), (folder / FIGURE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert shown.count(f"({FIGURE})") == 1
    assert shown.index("## What was compressed") < shown.index(FIGURE) < shown.index("| layer |")
    assert without_figure(shown) == before
    add_figure(folder)
    assert (folder / "README.md").read_text() == shown
    assert (folder / FIGURE).read_bytes() == picture


@pytest.mark.parametrize("missing", [compression_report.FILE_NAME, "README.md"])
def test_a_folder_without_card_or_report_stays_as_it_is(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    left = sorted(folder.iterdir())
    add_figure(folder)
    assert sorted(folder.iterdir()) == left


def test_a_card_of_ones_own_stays_as_it_is(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    add_figure(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert not (folder / FIGURE).exists()


def test_without_matplotlib_nothing_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingPackageError("figures need matplotlib")

    monkeypatch.setattr(card_figure, "require_matplotlib", missing)
    before = (folder / "README.md").read_text()
    with pytest.raises(MissingPackageError):
        add_figure(folder)
    assert (folder / "README.md").read_text() == before
