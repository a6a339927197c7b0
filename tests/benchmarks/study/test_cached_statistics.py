from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.study.cached_statistics import CachedStatistics
from grasp.checkpoint.run_state import NoState
from grasp.compress import carry_out_, compress_
from grasp.compression.run import start_run
from grasp.config import GraspConfig
from grasp.model.batch import CalibrationBatch
from grasp.progress import no_progress
from grasp.statistics.processes import ALONE
from tests.tiny_models import tiny_batches, tiny_model

CONFIGS = [
    {"metric": "taylor"},
    {"metric": "magnitude"},
    {"basis": "whitened", "metric": "magnitude", "scope": "model"},
    {"basis": "kfac", "metric": "magnitude", "scope": "model", "allocation": "global"},
]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: f"{options.get('basis', 'plain')} {options['metric']}")
def test_cached_statistics_give_the_model_of_fresh_ones_also_from_the_disk(options: dict, tmp_path: Path) -> None:
    dense, batches = tiny_model("llama", torch.float64), [CalibrationBatch(tokens) for tokens in tiny_batches(4)]
    config = GraspConfig(compression_ratio=0.2, schedule="single-sweep", **options)
    fresh = copy.deepcopy(dense)
    compress_(fresh, batches, config)
    first, second = (CachedStatistics(tmp_path / "cache", batches, None) for _ in range(2))
    for cached in (first, first, second):
        model = copy.deepcopy(dense)
        run = start_run(model, batches, config, None, no_progress, NoState(), ALONE)
        carry_out_(replace(run, gather=cached))
        torch.testing.assert_close(model(batches[0].input_ids).logits, fresh(batches[0].input_ids).logits)
    assert first.seconds > 0
