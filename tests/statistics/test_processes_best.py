"""The preset ``best`` in two processes, whole and sharded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.builtin import BUILTIN
from grasp.calibration import builtin_text, token_batches
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.compression import held_out, narrow
from grasp.compression.memory_budget import MemoryBudget
from grasp.compression.span_plan import PlannedSpan
from grasp.config import GraspConfig
from grasp.files import tensors_digest
from grasp.loading import load_model
from grasp.method import channels
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target
from grasp.statistics.covariance import input_groups
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sharding import collect_, shard_
from tests.candidates import is_narrowed, is_whole, losing
from tests.interrupted import Killed
from tests.many_processes import run
from tests.tiny_models import tiny_batches, tiny_model

CPU = torch.device("cpu")
BEST = GraspConfig.best(compression_ratio=0.1)


@dataclass
class Result:
    """The choices of a run, and the weights of the whole model as dense matrices; none in the second process."""

    ranks: dict[str, int]
    removed: tuple[int, ...]
    dense: dict[str, Tensor]


def compressed(
    model: PreTrainedModel, batches: list[Tensor], config: GraspConfig, processes: Processes, **options: Any
) -> Result:
    if processes.sharded:
        shard_(model, CPU, processes)
    report = compress_(model, batches, config, processes=processes, **options)
    if processes.sharded:
        collect_(model, processes)
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    products = {name: module.dense_weight() for name, module in low.items() if f"{name}.U" in state}
    rest = {name: value for name, value in state.items() if not name.endswith((".U", ".Vh", ".order"))}
    return Result({m.name: m.rank for m in report.modules}, report.removed_layers, products | rest)


def tiny(processes: Processes, family: str, config: GraspConfig) -> Result:
    """Three batches, which two processes cannot share evenly."""
    return compressed(tiny_model(family, torch.float64), tiny_batches(3), config, processes)


def results(work: Callable[..., Any], *arguments: Any, sharded: bool) -> list[Any]:
    """The results of two processes; an error of one is raised here."""
    outcomes = run(work, *arguments, sharded=sharded)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]


def assert_close(got: Result, expected: Result, tolerance: float) -> None:
    assert got.ranks == expected.ranks
    assert got.removed == expected.removed
    assert got.dense.keys() == expected.dense.keys()
    for name, value in got.dense.items():
        assert (value - expected.dense[name]).norm() <= tolerance * expected.dense[name].norm(), name


# Conv1D and biases; experts. Whole, llama and gpt2 are in test_processes.py.
@pytest.mark.parametrize(
    ("family", "sharded"), [("llama", True), ("gpt2", True), ("mixtral", True), ("mixtral", False)]
)
def test_two_processes_compress_like_one(family: str, sharded: bool) -> None:
    expected = tiny(ALONE, family, BEST)
    assert any(expected.ranks.values())
    first, second = results(tiny, family, BEST, sharded=sharded)
    assert_close(first, expected, 1e-6)
    assert second.ranks == first.ranks
    if not sharded:
        assert all(torch.equal(value, second.dense[name]) for name, value in first.dense.items())


def narrowed(processes: Processes, comes_back: bool) -> Result:
    """The MLPs of two layers lose an eighth of their channels, but if the whole model without layers is better.

    They are so wide that output covariances are projected.
    """
    widths = {f"model.layers.{layer}.mlp": [128, 112] for layer in (0, 2)}
    with (
        mock.patch.object(channels, "MULTIPLE", 8),
        mock.patch.object(narrow, "choose_widths", return_value=widths),
        mock.patch.object(held_out, "_measured", losing(is_narrowed if comes_back else is_whole)),
    ):
        model = tiny_model("llama", torch.float64, intermediate_size=128)
        return compressed(model, tiny_batches(3), BEST, processes, held_out=tiny_batches(1, seed=2))


@pytest.mark.parametrize(("sharded", "comes_back"), [(False, False), (True, False), (True, True)])
def test_two_processes_narrow_like_one(sharded: bool, comes_back: bool) -> None:
    expected = narrowed(ALONE, comes_back)
    gates_and_ups = sum(value.shape == (112, 32) for value in expected.dense.values())
    assert (gates_and_ups, bool(expected.removed)) == ((0, True) if comes_back else (4, False))
    first, second = results(narrowed, comes_back, sharded=sharded)
    assert_close(first, expected, 1e-6)
    if not sharded:
        assert all(torch.equal(value, second.dense[name]) for name, value in first.dense.items())


def smollm2(processes: Processes, folder: Path) -> Result:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = load_file(folder / "tokens.safetensors")
    batches = [tokens[name] for name in sorted(tokens)]
    return compressed(model, batches, GraspConfig.best(compression_ratio=0.03), processes)


@pytest.mark.slow
def test_smollm2_sharded_over_two_processes_is_compressed_like_a_whole_one(tmp_path: Path) -> None:
    """One of its layers, which has a tenth of the parameters, on 320 tokens."""
    model, tokenizer = load_model(BUILTIN, dtype="float32")
    remove_layers_(model, range(1, 30))
    model.save_pretrained(tmp_path)
    batches = token_batches(tokenizer, builtin_text("calibration"), num_samples=5, seq_len=64, batch_size=2)
    save_file({str(i): batch.input_ids for i, batch in enumerate(batches)}, tmp_path / "tokens.safetensors")
    expected = smollm2(ALONE, tmp_path)
    assert any(expected.ranks.values())
    first, second = results(smollm2, tmp_path, sharded=True)
    assert_close(first, expected, 1e-3)
    assert second.ranks == first.ranks


def one_span_a_layer(
    budget: MemoryBudget, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
) -> list[PlannedSpan]:
    """Each layer is a span; the layer in the middle runs once for each of its inputs."""
    members = {layer: [target for target in targets if target.layer == layer] for layer in layers}
    parts = {
        layer: tuple(input_groups(linears)) if layer == 1 else (tuple(linears),) for layer, linears in members.items()
    }
    return [PlannedSpan(range(layer, layer + 1), parts[layer] or ((),)) for layer in reversed(layers)]


def in_spans(processes: Processes) -> Result:
    with mock.patch.object(MemoryBudget, "spans", one_span_a_layer):
        return tiny(processes, "llama", BEST)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_spans_of_one_layer_give_the_same_result(sharded: bool) -> None:
    expected = tiny(ALONE, "llama", BEST)
    first, _ = results(in_spans, sharded=sharded)
    assert_close(first, expected, 1e-6)


def interrupted(processes: Processes, folder: Path, all_stops: bool) -> list[Any]:
    """Stop both processes in phases of every second name or of all, continue, and compare with a whole run."""

    def attempt(folder: Path, stop: int) -> tuple[list[str], Any]:
        steps: list[str] = []

        def progress(step: str, done: int, total: int) -> None:
            steps.append(step)
            if len(steps) == stop:
                raise Killed

        model = tiny_model("llama", torch.float64)
        with RunState(folder, rank=processes.rank, processes=processes.size) as state:
            result = compressed(model, tiny_batches(3), BEST, processes, progress=progress, state=state)
        return steps, (result.ranks, tensors_digest(result.dense.items()))

    steps, expected = attempt(folder / "whole", 0)
    phases = [list(calls) for _, calls in groupby(range(1, len(steps) + 1), lambda call: steps[call - 1])]
    last = {steps[calls[0] - 1]: calls[len(calls) // 2] for calls in phases}
    different = []
    for stop in chain(*phases) if all_stops else list(last.values())[::2]:
        with suppress(Killed):
            attempt(folder / "stopped", stop)
            raise AssertionError(f"not stopped at {stop}")
        if attempt(folder / "stopped", 0)[1] != expected:
            different.append(stop)
    return [[steps[calls[0] - 1] for calls in phases], different]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_processes_stopped_in_any_phase_continue_bit_for_bit(sharded: bool, tmp_path: Path, fuzzing: bool) -> None:
    if not (sharded or fuzzing):
        pytest.skip("takes a minute; --fuzz runs it")
    for phases, different in results(interrupted, tmp_path, fuzzing, sharded=sharded):
        assert phases.count("decompositions") == 2
        assert phases[-1] == "refit"
        assert different == []
