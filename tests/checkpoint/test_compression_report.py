from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from grasp.checkpoint.compression_report import CompressionReport, spectrum_indices
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import CheckpointError
from grasp.model.dense import dense_weight
from tests.tiny_models import tiny_batches, tiny_model

CONFIG = GraspConfig(layers=(1,), retain_ratio=0.4, schedule="single-sweep")


@pytest.fixture(scope="module")
def report() -> CompressionReport:
    return compress_(tiny_model("llama"), tiny_batches(1), CONFIG)


@pytest.mark.parametrize("groups", [1, 2, 256, 257, 576, 4096, 100_000])
def test_a_spectrum_is_kept_at_few_places_that_reach_from_end_to_end(groups: int) -> None:
    indices = spectrum_indices(groups)
    assert indices == sorted(set(indices))
    assert (indices[0], indices[-1]) == (0, groups - 1)
    assert len(indices) <= 256
    if groups <= 256:
        assert len(indices) == groups
    else:
        assert indices[:10] == list(range(10))
        assert max(b - a for a, b in itertools.pairwise(indices)) <= 2 + groups / 100


@pytest.mark.parametrize(
    "config",
    [CONFIG, GraspConfig(layers=(1,), retain_ratio=0.4, schedule="single-sweep", allocation="global", metric="taylor")],
)
def test_the_spectrum_is_that_of_the_dense_weight_before_selection(config: GraspConfig) -> None:
    dense = tiny_model("llama")
    report = compress_(tiny_model("llama"), tiny_batches(1), config)
    assert report.compressed
    for module in report.compressed:
        expected = torch.linalg.svdvals(dense_weight(dense.get_submodule(module.name)).double())
        found = torch.tensor(module.spectrum, dtype=torch.float64)
        assert len(found) > module.rank
        torch.testing.assert_close(found, expected, rtol=5e-4, atol=1e-6)


def test_lists_of_numbers_take_one_line_and_words_stay_as_they_are(report: CompressionReport) -> None:
    module = replace(report.modules[0], reason='why [\n  1,\n  2\n] "not"')
    changed = replace(report, modules=(module, *report.modules[1:]))
    text = changed.to_json()
    assert json.loads(text) == changed.to_dict()
    assert CompressionReport.from_json(text) == changed
    line = next(line for line in text.splitlines() if '"spectrum"' in line)
    assert json.loads("{" + line.strip().rstrip(",") + "}") == {"spectrum": list(module.spectrum)}
    assert len(text.splitlines()) < 20 * len(report.modules) + 80


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"out_features": 0}, "sizes of .* must be integers from 1 up"),
        ({"parameters_before": "7"}, "sizes of .* must be integers from 1 up"),
        ({"indices": [99]}, "indices of .* must be of its 32 singular groups"),
        ({"spectrum": ["a"]}, "spectrum of .* must be numbers"),
        ({"spectrum": [1.0]}, "spectrum of .* has 1 values, not those of 32 groups"),
    ],
)
def test_damaged_modules_are_refused(report: CompressionReport, values: dict[str, object], words: str) -> None:
    damaged = report.to_dict()
    damaged["modules"][0].update(values)
    with pytest.raises(CheckpointError, match=words):
        CompressionReport.from_json(json.dumps(damaged))


@pytest.mark.parametrize("name", ["config", "calibration", "seconds", "versions", "request"])
def test_lists_in_the_place_of_objects_are_refused(report: CompressionReport, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} must be an object"):
        CompressionReport.from_json(json.dumps({**report.to_dict(), name: [1]}))


def test_reports_of_earlier_versions_are_read(report: CompressionReport) -> None:
    values = report.to_dict()
    del values["request"]
    for module in values["modules"]:
        del module["spectrum"]
    read = CompressionReport.from_json(json.dumps(values))
    assert read.request == {}
    assert read.modules == tuple(replace(module, spectrum=()) for module in report.modules)
