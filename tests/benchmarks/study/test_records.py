from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.records import STUDY_RECORDS, StudyResult, StudySetting, perplexity_by_size
from grasp.bench.records import ModelResult
from grasp.bench.results import append_results, check_output, read_results
from grasp.errors import ResultsError
from grasp.reporting.figure_data import Quality
from grasp.reporting.pictures import of_results
from tests.bench.records import record

STUDY = StudySetting("builtin", "wikitext2", "builtin", 24, 512, 2, 512, 16, "bfloat16")


def test_a_study_is_read_by_those_who_pass_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    cells = [record(record_class) for record_class in STUDY_RECORDS]
    append_results(path, cells)
    assert read_results(path, STUDY_RECORDS) == cells
    check_output(path, STUDY_RECORDS)
    for read in (read_results, check_output):
        with pytest.raises(ResultsError, match=r"line 1: got kind 'study'; .*read_results"):
            read(path)


def test_seeds_are_one_point_with_their_range() -> None:
    cells = [
        record(StudyResult, method="GRASP", ratio=0.2, seed=seed, setting=STUDY, parameters=100, perplexity=value)
        for seed, value in enumerate((20.0, 26.0, 23.0))
    ]
    (picture,) = perplexity_by_size(cells)
    assert picture.draw.args == ([Quality("GRASP", 100, 23.0, 20.0, 26.0)],)  # type: ignore[attr-defined]


def test_perplexities_of_different_settings_do_not_share_a_figure() -> None:
    cell = record(StudyResult, setting=STUDY)
    other = record(StudyResult, setting=replace(STUDY, windows=None))
    pictures = of_results([cell, other, record(ModelResult, provider="dense")])
    studies = [picture for picture in pictures if "windows" in picture.title]
    assert [picture.title for picture in studies] == [
        "Perplexity by size: builtin, 16 windows of 512 tokens of builtin",
        "Perplexity by size: builtin, all windows of 512 tokens of builtin",
    ]
    assert all("512 tokens of wikitext2; bfloat16; " in picture.caption for picture in studies)
