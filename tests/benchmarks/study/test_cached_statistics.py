from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.study import cached_statistics
from benchmarks.study.cached_statistics import CachedStatistics
from grasp.checkpoint.run_state import NoState
from grasp.compress import carry_out_
from grasp.compression.run import start_run
from grasp.compression.span_plan import PlannedSpan
from grasp.config import GraspConfig
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import Target
from grasp.progress import no_progress
from grasp.statistics.processes import ALONE
from grasp.statistics.scores import Scores, gather_scores
from tests.tiny_models import tiny_batches, tiny_model

CONFIGS: list[dict[str, Any]] = [
    {"metric": "taylor"},
    {"metric": "magnitude"},
    {"basis": "whitened", "metric": "magnitude", "scope": "model"},
    {"basis": "kfac", "metric": "magnitude", "scope": "model", "allocation": "global"},
]


class OneLayerSpans:
    """A budget of memory in which only one layer fits."""

    hidden_states = None

    def spans(self, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None) -> list[PlannedSpan]:
        return [
            PlannedSpan(range(layer, layer + 1), (tuple(t for t in targets if t.layer == layer),))
            for layer in reversed(layers)
        ]


def logits(gather: Callable[..., Scores], options: Mapping[str, Any], ratio: float = 0.2) -> Tensor:
    """The logits of a compressed tiny model; each of its layers is a span."""
    model, batches = copy.deepcopy(tiny_model("llama", torch.float64)), [CalibrationBatch(t) for t in tiny_batches(4)]
    config = GraspConfig(compression_ratio=ratio, schedule="single-sweep", **options)
    with NoState() as state:
        run = start_run(model, batches, config, None, no_progress, state, ALONE)
        carry_out_(replace(run, gather=gather, memory=OneLayerSpans()))  # type: ignore[arg-type]
    return model(batches[0].input_ids).logits


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: f"{options.get('basis', 'plain')} {options['metric']}")
def test_cached_groups_give_the_model_of_fresh_ones_for_every_ratio(options: dict[str, Any], tmp_path: Path) -> None:
    first, second = CachedStatistics(tmp_path), CachedStatistics(tmp_path)
    fresh = {ratio: logits(gather_scores, options, ratio) for ratio in (0.2, 0.3)}
    for cached, ratio in ((first, 0.2), (first, 0.3), (second, 0.2)):
        torch.testing.assert_close(logits(cached, options, ratio), fresh[ratio])
    assert first.seconds > 0
    assert second.seconds > 0


def test_a_complete_cache_needs_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(CachedStatistics(tmp_path), CONFIGS[-1])
    for name in ("gather_scores", "sweep"):
        monkeypatch.delattr(cached_statistics, name)
    assert torch.equal(logits(CachedStatistics(tmp_path), CONFIGS[-1]), expected)


@pytest.mark.parametrize("lost", ["layers.0.", "layers.1.mlp", "layers.2.self_attn.q_proj"])
def test_linears_that_the_cache_lacks_are_scored_again(lost: str, tmp_path: Path) -> None:
    expected = logits(CachedStatistics(tmp_path), CONFIGS[-1])
    files = [file for file in tmp_path.glob("*/*") if lost in file.name]
    contents = {file: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    assert torch.equal(logits(CachedStatistics(tmp_path), CONFIGS[-1]), expected)
    assert contents.keys() == {file for file in files if file.exists()}
