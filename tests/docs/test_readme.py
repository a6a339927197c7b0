from __future__ import annotations

import re

import pytest

from grasp_kernels.dispatch import BACKENDS
from tests.documents import read

README = read("README.md")


def test_the_first_screen_has_both_commands_and_a_figure() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert re.search(r'<img src="benchmarks/plots/size.+\.svg"', first_screen)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "docs/kernels.md"])
def test_the_backends_shown_are_those_of_the_dispatch_table(page: str) -> None:
    section = read(page).split("## Backends")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == tuple(row.name for row in BACKENDS)


def test_its_results_are_those_of_the_study() -> None:
    study = read("docs/study.md")
    section = README.split("## Results")[1].split("\n## ")[0]
    numbers = re.findall(r"\b\d\.\d{3}\b", section)
    assert len(numbers) == 27
    assert all(number in study for number in numbers)
