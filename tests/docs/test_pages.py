"""Links, commands and Python of every document, the site's pages and README alike."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import environment
from tests.documents import (
    PAGES,
    blocks,
    broken_links,
    check_command,
    check_mention,
    commands,
    mentions,
    read,
    run_python,
)

# Pages whose Python runs here, block by block in one folder, each in a process of its own.
RUN_IN_ORDER = ["docs/getting-started.md", "docs/kernels.md", "docs/resume-and-distributed.md"]
# Pages whose Python is one project of tests, which runs here.
OF_THE_GATE = ["docs/regression-gate.md", "packages/pytest-speedgate/README.md"]
# Pages whose Python another test runs, because it needs a checkpoint, a server or another environment.
RUN_ELSEWHERE = {
    "docs/evaluate.md": "tests/test_real_model.py",
    "docs/publish.md": "tests/test_real_model.py",
    "docs/serve/compile-and-export.md": "tests/serving/test_transformers_serve.py",
    "docs/serve/linear-pairs.md": "tests/workflows/test_export.py",
    "docs/serve/llama-cpp.md": "tests/workflows/test_export.py",
    "docs/serve/kernel-hub.md": "packages/kernel-hub/check.sh",
    "docs/serve/onnx.md": "tests/export/test_onnx_file.py",
    "docs/serve/training.md": "tests/serving/test_transformers_serve.py",
    "docs/serve/transformers.md": "tests/serving/test_transformers_serve.py",
    "docs/serve/transformers-serve.md": "tests/serving/test_transformers_serve.py",
    "docs/serve/vllm.md": "tests/vllm/test_commands.py",
}
BUILT = {"_static/map.html"}  # docs/conf.py writes it when the site is built


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = {"docs/index.md"}
    for page in PAGES:
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
            names = [line for line in toctree.splitlines() if line and not line.startswith(":")]
            listed |= {str(Path(page).parent / f"{name}.md") for name in names}
    assert listed == {page for page in PAGES if page.startswith("docs/")}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    assert set(broken_links(page)) <= BUILT


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_exists(page: str) -> None:
    for line in commands(read(page)):
        check_command(line)
    for code in mentions(read(page)):
        check_mention(code)


def test_the_python_of_every_page_is_run_by_a_test() -> None:
    run = {"README.md", *RUN_IN_ORDER, *OF_THE_GATE, *RUN_ELSEWHERE}  # getting-started.md begins with README's
    assert {page for page in PAGES if blocks(read(page), "python")} == run
    for page, place in RUN_ELSEWHERE.items():
        assert Path(page).stem in read(place)


def test_the_python_of_the_readme_is_the_first_of_getting_started() -> None:
    assert blocks(read("README.md"), "python") == blocks(read("docs/getting-started.md"), "python")[:1]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_IN_ORDER)
def test_the_python_of_a_page_runs_in_order(page: str, tmp_path: Path) -> None:
    for code in blocks(read(page), "python"):
        assert run_python(code, tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", OF_THE_GATE)
def test_the_project_on_a_page_about_the_gate_runs(page: str, tmp_path: Path) -> None:
    (tmp_path / "test_speed.py").write_text(blocks(read(page), "python")[0])
    options = ["-q", "-p", "speedgate.plugin", "--benchmark-disable"]
    command = [sys.executable, "-m", "pytest", *options, "test_speed.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
