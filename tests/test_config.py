from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from grasp.config import PRESETS, GraspConfig
from tests import command_line

_GLOBAL = {"basis": "kfac", "metric": "magnitude", "allocation": "global", "schedule": "single-sweep"}


def test_the_default_is_the_papers() -> None:
    assert GraspConfig() == GraspConfig.paper()
    assert (GraspConfig().retain_ratio, GraspConfig().metric) == (0.1, "taylor")


@pytest.mark.parametrize(
    "config",
    [
        GraspConfig.paper(layers=(5, 2), retain_ratio=0.3, metric="gradient"),
        GraspConfig(target_bytes=10**9),
        GraspConfig.best(target_latency=0.8, bits="auto"),
    ],
)
def test_json_round_trip(config: GraspConfig) -> None:
    assert GraspConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_layers_are_sorted() -> None:
    assert GraspConfig(layers=(5, 2)).layers == (2, 5)


def test_the_dictionary_of_an_earlier_version_is_read() -> None:
    config = GraspConfig(num_layers=2)
    assert GraspConfig.from_dict({**config.to_dict(), "redundancy": "block_influence"}) == config
    with pytest.raises(ValueError, match="unknown configuration keys redundancy"):
        GraspConfig.from_dict({**config.to_dict(), "redundancy": "angular_distance"})


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GraspConfig().retain_ratio = 0.5  # type: ignore[misc]


def test_a_configuration_is_made_without_torch_and_transformers() -> None:
    code = (
        "import sys; from grasp import GraspConfig; GraspConfig.best(num_layers=1); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], env=command_line.environment(), capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": (1, 1)}, r"layers .*\[1, 1\]"),
        ({"layers": (-1,)}, r"layers .*\[-1\]"),
        ({"layers": 5}, "layers .* got 5"),
        ({"layers": (1, "a")}, "layers .*'a'"),
        ({"layers": "12"}, "layers"),
        ({"layers": (True,)}, r"layers .*\[True\]"),
        ({"num_layers": -3}, "num_layers .* got -3"),
        ({"num_layers": 2.0}, "num_layers .* got 2.0"),
        ({"num_layers": True}, "num_layers .* got True"),
        ({"metric": ["taylor"]}, r"metric .* taylor, gradient, magnitude, fisher, got \['taylor'\]"),
        ({"metric": "tailor"}, "metric .* taylor, gradient, magnitude, fisher, got 'tailor'"),
        ({"basis": "fourier"}, "basis .* plain, whitened, kfac, got 'fourier'"),
        ({"scope": "auto"}, "scope .* redundant, model, got 'auto'"),
        ({"target_bytes": 0}, "target_bytes .* got 0"),
        ({"target_bytes": 1e9}, "target_bytes .* got 1000000000.0"),
        ({"target_bytes": True}, "target_bytes .* got True"),
        ({**_GLOBAL, "target_latency": 0.0}, r"target_latency .*\(0, 1\], got 0.0"),
        ({**_GLOBAL, "target_latency": 1.5}, "target_latency .* got 1.5"),
        ({**_GLOBAL, "target_latency": "12ms"}, "target_latency .* got '12ms'"),
        ({**_GLOBAL, "refit": 1}, "refit .* got 1"),
        ({"refit": None}, "refit .* got None"),
        ({"sweep_dtype": "int8"}, "sweep_dtype .* got 'int8'"),
        ({"compression_ratio": 1.0}, r"compression_ratio .*\[0, 1\), got 1.0"),
        ({"compression_ratio": -0.1}, "compression_ratio .* got -0.1"),
        ({"compression_ratio": float("nan")}, "compression_ratio .* got nan"),
        ({"retain_ratio": 0.0}, r"retain_ratio .*\(0, 1\], got 0.0"),
        ({"retain_ratio": "x"}, "retain_ratio .* got 'x'"),
        ({"bits": 3}, "bits must be one of 8, 4, fp8, auto, got 3"),
        ({"bits": 8, "bits_dense": "auto"}, "bits_dense must be one of 8, 4, fp8, got 'auto'"),
        ({"threshold_ratio": 2, "num_layers": 1}, r"threshold_ratio .*\(0, 1\], got 2"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GraspConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": (1,), "num_layers": 1}, "layers and num_layers exclude each other"),
        ({"num_layers": 1, "compression_ratio": 0.2}, "num_layers and compression_ratio exclude"),
        ({"target_bytes": 10, "compression_ratio": 0.1}, "compression_ratio and target_bytes exclude each other"),
        ({**_GLOBAL, "target_latency": 0.5, "layers": (1,)}, "layers and target_latency exclude each other"),
        ({"threshold_ratio": 0.5}, "threshold_ratio needs layers or num_layers"),
        ({"threshold_ratio": 0.5, "compression_ratio": 0.2}, "threshold_ratio needs layers or num_layers"),
        ({"metric": "gradient", "basis": "whitened"}, "metric='gradient' needs basis='plain'"),
        ({**_GLOBAL, "basis": "plain", "metric": "gradient"}, "metric='gradient' needs .*allocation='uniform'"),
        ({**_GLOBAL, "basis": "whitened"}, "'magnitude' in the whitened basis"),
        ({"allocation": "global"}, "'single-sweep' or 'progressive', got 'sequential'"),
        ({**_GLOBAL, "threshold_ratio": 0.5, "num_layers": 1}, "threshold_ratio .*allocation='uniform'"),
        ({"target_latency": 0.5}, "target_latency needs allocation='global'"),
        ({"bits_dense": 4}, "bits_dense=4 needs bits"),
        ({"bits": 8, "target_bytes": 10}, "target_bytes with bits needs allocation='global'"),
        ({**_GLOBAL, "bits": "auto"}, "bits='auto' needs target_bytes or target_latency"),
        (
            {**_GLOBAL, "bits": "auto", "target_bytes": 10, "bits_dense": 4},
            "bits_dense=4 needs bits=8, bits=4 or bits='fp8', got auto",
        ),
        ({"schedule": "progressive"}, "schedule='progressive' needs allocation='global', got 'uniform'"),
        (
            {**_GLOBAL, "basis": "plain", "metric": "taylor", "schedule": "progressive"},
            "schedule='progressive' needs a basis .* got 'plain'",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused_with_a_remedy(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GraspConfig(**values)  # type: ignore[arg-type]


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ValueError, match="basis") as caught:
        GraspConfig(basis="fourier", retain_ratio=2.0, num_layers=1, compression_ratio=0.1, threshold_ratio=-1)
    for name in ("basis", "retain_ratio", "threshold_ratio", "num_layers and compression_ratio"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="metric") as caught:
        GraspConfig.paper(metric="fisher", retain_ratio=2.0, threshold_ratio=0.5)
    for words in ("metric", "retain_ratio and threshold_ratio", "got 2.0", "threshold_ratio needs"):
        assert words in str(caught.value)


def test_integers_of_numpy_are_taken_as_integers() -> None:
    config = GraspConfig(layers=tuple(np.array([3, 1])))
    assert config == GraspConfig(layers=(1, 3))
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [1, 3]
    assert json.dumps(GraspConfig(num_layers=np.int32(2)).to_dict()["num_layers"]) == "2"  # type: ignore[arg-type]
    stored = GraspConfig.best(target_bytes=np.int64(99), bits=np.int64(8)).to_dict()  # type: ignore[arg-type]
    assert json.dumps([stored["target_bytes"], stored["bits"]]) == "[99, 8]"


def test_best_compresses_all_layers_or_those_that_are_named() -> None:
    assert GraspConfig.best(compression_ratio=0.1).scope == "model"
    assert GraspConfig.best(num_layers=2).scope == "redundant"
    assert GraspConfig.best(layers=(1,), retain_ratio=0.5).scope == "redundant"


@pytest.mark.parametrize(
    ("constructor", "options", "words"),
    [
        ("paper", {"metric": "magnitude"}, "metric must be one of taylor, gradient in paper, got 'magnitude'"),
        ("paper", {"schedule": "progressive"}, "schedule must be one of .* in paper, got 'progressive'"),
        ("best", {"schedule": "sequential"}, "schedule must be one of .* in best, got 'sequential'"),
        ("best", {"retain_ratio": 0.3}, "retain_ratio needs layers or num_layers in best"),
        ("paper", {"retain_ratio": 0.3, "threshold_ratio": 0.5, "num_layers": 1}, "exclude each other"),
    ],
)
def test_a_constructor_refuses_values_without_a_meaning_there(
    constructor: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        PRESETS[constructor](**options)
