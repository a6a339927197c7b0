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
