"""The division of the layers into spans, and an interruption, change no bit of the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grasp.checkpoint import run_folder
from grasp.checkpoint.compression_report import ModuleReport
from grasp.checkpoint.run_state import NoState, RunState
from grasp.compress import compress_
from grasp.compression.memory_budget import MemoryBudget
from grasp.compression.span_plan import PlannedSpan
from grasp.config import GraspConfig
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import input_groups
from grasp.statistics.hidden_states import Scratch
from tests.tiny_models import tiny_batches, tiny_model

Division = Callable[[Collection[Target], range], list[PlannedSpan]]


def together(targets: Collection[Target], layers: range) -> list[PlannedSpan]:
    return [PlannedSpan(layers, (tuple(targets),))]


def two(targets: Collection[Target], layers: range) -> list[PlannedSpan]:
    middle = max(layers.start, layers.stop - 2)  # the deepest span has two layers
    spans = [range(middle, layers.stop), range(layers.start, middle)]
    return [PlannedSpan(span, (tuple(t for t in targets if t.layer in span),)) for span in spans if span]


def layer_by_layer(targets: Collection[Target], layers: range) -> list[PlannedSpan]:
    spans = [range(layer, layer + 1) for layer in reversed(layers)]
    return [PlannedSpan(span, (tuple(t for t in targets if t.layer in span),)) for span in spans]


def in_parts(targets: Collection[Target], layers: range) -> list[PlannedSpan]:
    groups = input_groups(targets)
    return [
        PlannedSpan(range(layer, layer + 1), tuple(g for g in groups if g[0].layer == layer) or ((),))
        for layer in reversed(layers)
    ]


class Result(NamedTuple):
    weights: dict[str, Tensor]
    modules: tuple[ModuleReport, ...]
    removed: tuple[int, ...]


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Compress a tiny model with a division into spans."""

    def compressed(
        family: str,
        config: GraspConfig,
        division: Division,
        folder: Path | None = None,
        progress: Progress = no_progress,
    ) -> Result:
        def spans(
            _: MemoryBudget, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
        ) -> list[PlannedSpan]:
            planned = division(targets, layers)
            assert sorted(t.name for s in planned for part in s.parts for t in part) == sorted(t.name for t in targets)
            return planned

        monkeypatch.setattr(MemoryBudget, "spans", spans)
        model = tiny_model(family)
        with NoState() if folder is None else RunState(folder) as state:
            report = compress_(model, BATCHES, config, progress=progress, state=state)
        return Result(dict(model.state_dict()), report.modules, report.removed_layers)

    return compressed


def assert_same_bits(result: Result, expected: Result) -> None:
    assert result.modules == expected.modules
    assert result.removed == expected.removed
    assert result.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(result.weights[name], weight), name


BATCHES = tiny_batches(3, 1)
BEST = GraspConfig.best(compression_ratio=0.15)
SOME = {"layers": (0, 1), "retain_ratio": 0.4}  # the head is in a span without linears, or far above them
CONFIGS = {
    "best": BEST,
    "bf16": GraspConfig.best(compression_ratio=0.15, sweep_dtype="bfloat16"),
    "paper": GraspConfig.paper(**SOME),
    "single sweep": GraspConfig(**SOME, schedule="single-sweep"),
    "magnitude": GraspConfig(layers=(0, 2), retain_ratio=0.3, schedule="single-sweep", metric="magnitude"),
    "fisher": GraspConfig(**SOME, schedule="single-sweep", basis="kfac", metric="fisher", refit=True),
}


@pytest.mark.parametrize(
    ("family", "name", "divisions"),
    [
        ("llama", "best", [two, layer_by_layer, in_parts]),
        ("gpt2", "best", [in_parts]),
        ("llama", "bf16", [in_parts]),
        ("gpt2", "paper", [layer_by_layer]),
        ("llama", "single sweep", [in_parts]),
        ("llama", "magnitude", [in_parts]),
        ("gpt2", "fisher", [in_parts]),
    ],
)
def test_the_division_into_spans_changes_no_bit(
    family: str, name: str, divisions: list[Division], compressed: Callable[..., Result]
) -> None:
    expected = compressed(family, CONFIGS[name], together)
    assert any(module.rank for module in expected.modules) or expected.removed
    for division in divisions:
        assert_same_bits(compressed(family, CONFIGS[name], division), expected)


def test_hidden_states_in_files_change_no_bit(
    compressed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compressed("llama", BEST, together)
    monkeypatch.setattr(Scratch, "takes", lambda scratch, nbytes: False)
    assert_same_bits(compressed("llama", BEST, layer_by_layer), expected)


@pytest.mark.parametrize("interruption", [1, 2])
def test_a_run_with_the_files_of_some_linears_resumes_with_any_division(
    interruption: int, compressed: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "INTERVAL", 0.0)  # every file is listed at once
    expected, steps = compressed("llama", BEST, together), list[int]()

    def count(step: str, done: int, total: int) -> None:
        if step == "decompositions":
            steps.append(done)

    def stop(step: str, done: int, total: int) -> None:
        count(step, done, total)
        if steps.count(9) == interruption:  # linears of the deepest layer, and some of the next one
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed("llama", BEST, in_parts, tmp_path / "run", stop)
    steps.clear()
    result = compressed("llama", BEST, two, tmp_path / "run", count)
    assert_same_bits(result, expected)
    assert steps == [*range(10, 22), *(range(1, 22) if interruption == 1 else ())]
    assert not (tmp_path / "run").exists()
