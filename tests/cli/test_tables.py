from __future__ import annotations

import pytest

from grasp.checkpoint.inspection import Inspection, LowRankModule, Part
from grasp.cli.tables import show_inspection


def test_linears_of_one_layer_with_the_same_last_name_share_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    modules = tuple(
        LowRankModule(f"transformer.h.3.{block}.c_proj", 3, rank, 8, 8, parameters, dense_parameters=64, bytes=0)
        for block, rank, parameters in (("attn", 2, 32), ("mlp", 1, 16))
    )
    show_inspection(Inspection("folder", "gpt2", 12, (Part("attention, low-rank", 4, 48, 192),), modules, report=None))
    assert capsys.readouterr().out.split()[-5:] == ["3", "2,", "1", "37.5", "%"]


def test_pivoted_ranks_are_marked_and_the_forms_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    modules = tuple(
        LowRankModule(f"model.layers.0.self_attn.{name}", 0, 4, 8, 8, 48, dense_parameters=64, bytes=0, form=form)
        for name, form in (("q_proj", "pivoted"), ("k_proj", "factored"), ("v_proj", "pivoted"))
    )
    show_inspection(Inspection("folder", "llama", 1, (Part("attention, low-rank", 8, 144, 576),), modules, report=None))
    shown = capsys.readouterr().out
    assert "2 pivoted, 1 factored" in shown
    assert shown.split("Ranks; p: pivoted")[1].split()[-6:] == ["0", "4p", "4", "4p", "75.0", "%"]
