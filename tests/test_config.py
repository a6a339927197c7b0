from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from grasp.config import GraspConfig

_BEST = GraspConfig.PRESETS["best"]
_GLOBAL = {"basis": "kfac", "metric": "magnitude", "allocation": "global", "schedule": "single-sweep"}


def test_default_is_the_paper_preset() -> None:
    assert GraspConfig() == GraspConfig.paper()
    assert (GraspConfig().retain_ratio, GraspConfig().metric) == (0.1, "taylor")


def test_json_round_trip() -> None:
    config = GraspConfig(layers=(5, 2), retain_ratio=0.3, metric="gradient")
    assert config.layers == (2, 5)
    others = GraspConfig(target_bytes=10**9), GraspConfig.best(target_latency=0.8)
    for each in (config, *others):
        assert GraspConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GraspConfig().retain_ratio = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": (1,), "num_layers": 1}, "layers and num_layers exclude each other"),
        ({"num_layers": 1, "compression_ratio": 0.2}, "num_layers and compression_ratio exclude"),
        ({"layers": (1, 1)}, r"distinct integers.*\[1, 1\]"),
        ({"layers": (-1,)}, r"from 0 up, got \[-1\]"),
        ({"layers": 5}, "layers must be distinct integers from 0 up, got 5"),
        ({"layers": (1, "a")}, r"distinct integers from 0 up, got \(1, 'a'\)"),
        ({"layers": "12"}, "distinct integers"),
        ({"layers": (True,)}, r"distinct integers.*got \[True\]"),
        ({"metric": ["taylor"]}, r"metric must be one of taylor, gradient, magnitude, fisher, got \['taylor'\]"),
        ({"basis": "fourier"}, "basis must be one of plain, whitened, kfac, got 'fourier'"),
        ({"scope": "some"}, "scope must be one of redundant, model, auto"),
        ({"redundancy": "cosine"}, "redundancy must be one of block_influence, sub_block_influence, angular_distance"),
        ({"redundancy": "angular_distance", "layers": (1,)}, "layers are given, so nothing is chosen by redundancy"),
        ({"redundancy": "sub_block_influence", "num_layers": 1}, "halves of layers; give a ratio or target"),
        ({"target_bytes": 0}, "target_bytes must be a positive number of bytes, got 0"),
        ({"target_bytes": 1e9}, "positive number of bytes, got 1000000000.0"),
        ({"target_bytes": True}, "positive number of bytes, got True"),
        ({"target_bytes": 10, "compression_ratio": 0.1}, "compression_ratio and target_bytes exclude each other"),
        ({"target_bytes": 10, "num_layers": 1}, "num_layers and target_bytes exclude each other"),
        ({**_GLOBAL, "target_latency": 0.5, "target_bytes": 10}, "target_bytes and target_latency exclude each other"),
        ({**_GLOBAL, "target_latency": 0.5, "layers": (1,)}, "layers and target_latency exclude each other"),
        ({**_GLOBAL, "target_latency": 0.0}, r"target_latency must be in \(0, 1\], got 0.0"),
        ({**_GLOBAL, "target_latency": 1.5}, "got 1.5"),
        ({**_GLOBAL, "target_latency": "12ms"}, "got '12ms'"),
        ({"remove_layers": True}, "remove_layers weighs layers against ranks; it needs allocation='global'"),
        ({**_GLOBAL, "remove_layers": 1}, "remove_layers must be True or False, got 1"),
        ({"target_latency": 0.5}, "target_latency is reached by ranks .* it needs allocation='global'"),
        ({**_GLOBAL, "target_latency": 0.5, "threshold_ratio": 0.5}, "threshold_ratio needs layers or num_layers"),
        ({"allocation": "global", "schedule": "single-sweep", "metric": "gradient"}, "not in units of loss"),
        (
            {"allocation": "global", "schedule": "single-sweep", "metric": "magnitude", "basis": "whitened"},
            "'magnitude' in the whitened basis is not in units of loss",
        ),
        ({"allocation": "global"}, "take schedule='single-sweep' or 'progressive', got 'sequential'"),
        ({"scope": "auto", "schedule": "per-layer"}, "take schedule='single-sweep' or 'progressive', got 'per-layer'"),
        (
            {"allocation": "global", "schedule": "single-sweep", "threshold_ratio": 0.5, "num_layers": 1},
            "threshold_ratio sets ranks matrix by matrix",
        ),
        (
            {"scope": "auto", "schedule": "single-sweep", "threshold_ratio": 0.5, "num_layers": 1},
            "it excludes allocation='global' and scope='auto'",
        ),
        ({"schedule": "progressive"}, "'progressive' spends a global budget, got allocation='uniform'"),
        (
            {**_GLOBAL, "basis": "plain", "metric": "taylor", "schedule": "progressive"},
            "'progressive' needs a basis that sees inputs, got basis='plain'",
        ),
        ({**_BEST, "remove_layers": True}, "on ranks alone, got remove_layers=True; take schedule='single-sweep'"),
        ({**_BEST, "redundancy": "angular_distance"}, "nothing is chosen by redundancy='angular_distance'"),
        ({**_BEST, "scope": "auto"}, "schedule='progressive' follows one scope"),
        ({"num_layers": -3}, "num_layers must be an integer from 0 up, got -3"),
        ({"num_layers": 2.0}, "got 2.0"),
        ({"num_layers": True}, "got True"),
        ({"compression_ratio": 1.0}, r"compression_ratio must be in \[0, 1\), got 1.0"),
        ({"compression_ratio": -0.1}, "got -0.1"),
        ({"compression_ratio": float("nan")}, "got nan"),
        ({"retain_ratio": 0.0}, r"retain_ratio must be in \(0, 1\], got 0.0"),
        ({"retain_ratio": "x"}, "got 'x'"),
        ({"threshold_ratio": 0.5}, "threshold_ratio needs layers or num_layers"),
        ({"threshold_ratio": 0.5, "compression_ratio": 0.2}, "threshold_ratio needs"),
        ({"threshold_ratio": 2, "num_layers": 1}, r"threshold_ratio must be in \(0, 1\], got 2"),
        ({"metric": "tailor"}, "metric must be one of taylor, gradient, magnitude, fisher, got 'tailor'"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraspConfig(**values)  # type: ignore[arg-type]


def test_layers_that_are_no_sequence_are_refused_in_dictionaries_too() -> None:
    with pytest.raises(ValueError, match="layers must be distinct integers from 0 up, got 5"):
        GraspConfig.from_dict({"layers": 5})


def test_integers_of_numpy_are_taken_as_integers() -> None:
    config = GraspConfig(layers=tuple(np.array([3, 1])))
    assert config == GraspConfig(layers=(1, 3))
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [1, 3]
    assert json.dumps(GraspConfig(num_layers=np.int32(2)).to_dict()["num_layers"]) == "2"  # type: ignore[arg-type]


def test_unknown_preset_and_key_are_refused() -> None:
    with pytest.raises(ValueError, match="preset must be one of paper, best, got 'papers'"):
        GraspConfig.preset("papers")
    with pytest.raises(ValueError, match="unknown configuration keys ratio; expected some of layers"):
        GraspConfig.paper(ratio=0.1)


def test_the_best_preset_compresses_the_layers_that_are_named() -> None:
    assert GraspConfig.best(compression_ratio=0.1).scope == "model"
    assert GraspConfig.best(num_layers=2).scope == "redundant"
    assert GraspConfig.best(layers=None, num_layers=None, compression_ratio=0.1).scope == "model"
    assert GraspConfig.best(layers=(1,), scope="model").scope == "model"


def test_what_does_not_go_with_a_preset_is_said_with_what_the_preset_has() -> None:
    with pytest.raises(ValueError, match=r"\(the preset 'best' has schedule='progressive'; 'paper' has not\)$"):
        GraspConfig.best(remove_layers=True)
    with pytest.raises(ValueError, match=r"got 2\.0$"):  # which has nothing to do with it
        GraspConfig.best(retain_ratio=2.0)
