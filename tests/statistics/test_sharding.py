from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import DistributedError, NonFiniteError, UnsupportedModelError
from grasp.model.batch import as_batches
from grasp.model.grouping import group_linears_
from grasp.model.last_added import last_added, merge_map_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import place_like, release_
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.divergence import Reference, removal_divergences
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sharding import collect_, shard_
from grasp.statistics.sweep import capture_prefix, sweep
from tests.interrupted import compress_until_killed, compress_with_a_bad_sweep
from tests.many_processes import run
from tests.tiny_models import tiny_batches, tiny_model

pytestmark = pytest.mark.long

CONFIG = GraspConfig(layers=(0, 2), retain_ratio=0.4)
CPU = torch.device("cpu")


def compress(
    processes: Processes, family: str, settings: dict[str, Any]
) -> tuple[CompressionReport, dict[str, Tensor]]:
    """Three batches, which two processes cannot share evenly."""
    model = tiny_model(family, torch.float64)
    if processes.sharded:
        shard_(model, CPU, processes)
    config = GraspConfig.from_dict({**CONFIG.to_dict(), **settings})
    report = compress_(model, tiny_batches(3), config, processes=processes)
    if processes.sharded:
        collect_(model, processes)
    return report, {name: value.detach() for name, value in model.state_dict().items() if not value.is_meta}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"schedule": "sequential"}),
        ("llama", {"schedule": "single-sweep"}),
        (
            "llama",
            {
                "basis": "kfac",
                "allocation": "global",
                "metric": "magnitude",
                "schedule": "single-sweep",
                "refit": True,
            },
        ),
        ("llama", {"basis": "whitened", "metric": "fisher"}),
        ("gpt2", {"schedule": "per-layer"}),  # Conv1D, biases, positions that are learnt
        ("gemma3", {"schedule": "per-layer"}),  # tied embeddings, windows
        ("mixtral", {"schedule": "per-layer"}),  # experts
    ],
)
def test_a_model_sharded_over_two_processes_is_compressed_as_a_whole_one(family: str, settings: dict[str, Any]) -> None:
    alone, expected = compress(ALONE, family, settings)
    (report, state), (second, rest) = (outcome.value for outcome in run(compress, family, settings, sharded=True))
    assert [module.indices for module in report.modules] == [module.indices for module in alone.modules]
    assert report.modules == second.modules
    assert (report.before, report.after) == (alone.before, alone.after)
    assert report.block_influence == pytest.approx(alone.block_influence, rel=1e-9)
    assert state.keys() == expected.keys()
    assert rest.keys() < state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def measure(processes: Processes) -> tuple[list[tuple[int, int]], list[str]]:
    """Each target's parameters here and in all; which modules are sharded after a compression."""
    model = tiny_model("mixtral")
    shard_(model, CPU, processes)
    weights = [target.module.weight for layer in range(3) for target in layer_targets(model, layer)[0]]
    sizes = [(weight.to_local().numel(), weight.numel()) for weight in weights]
    compress_(model, tiny_batches(3), CONFIG, processes=processes)
    modules = dict(model.named_modules())
    sharded = [name for name, m in modules.items() if any(isinstance(p, DTensor) for p in m.parameters(recurse=False))]
    return sizes, sharded


def test_each_process_holds_half_of_the_linears_and_experts() -> None:
    for outcome in run(measure, sharded=True):
        sizes, sharded = outcome.value
        assert len(sizes) == 12
        assert all(2 * here == whole for here, whole in sizes)
        linears = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkvo"]
        assert sorted(sharded) == sorted([*linears, *(f"model.layers.{layer}.mlp.experts" for layer in range(3))])


def remove_layers(processes: Processes) -> tuple[dict[int, float], CompressionReport, dict[str, Tensor]]:
    """Measure the removal of each layer, let ``best`` remove some, and collect the model."""
    model = tiny_model("llama", torch.float64, num_hidden_layers=5)
    with torch.no_grad():  # two layers that do next to nothing
        for layer in (1, 3):
            decoder(model).layers[layer].self_attn.o_proj.weight.mul_(1e-2)
            decoder(model).layers[layer].mlp.down_proj.weight.mul_(1e-2)
    if processes.sharded:
        shard_(model, CPU, processes)
    batches = as_batches(tiny_batches(8))
    losses = removal_divergences(Reference.of(model, batches[:3], processes=processes), [0, 1, 3])
    config = GraspConfig.best(compression_ratio=0.55, schedule="single-sweep")
    report = compress_(model, batches[1:], config, held_out=batches[:1], processes=processes)
    if processes.sharded:
        collect_(model, processes)
    return losses, report, {name: value for name, value in model.state_dict().items() if not value.is_meta}


def test_layers_of_a_sharded_model_are_removed_like_those_of_a_whole_one() -> None:
    losses, report, expected = remove_layers(ALONE)
    (first, second) = (outcome.value for outcome in run(remove_layers, sharded=True))
    assert report.removed_layers
    assert report.compressed
    for other in (first, second):
        assert other[0] == pytest.approx(losses, rel=1e-9)
        assert other[1].removed_layers == report.removed_layers
        assert [m.indices for m in other[1].modules] == [m.indices for m in report.modules]
        assert other[1].held_out_loss == pytest.approx(report.held_out_loss, rel=1e-9)
    torch.testing.assert_close(first[2], expected, rtol=1e-6, atol=1e-9)


def replace_by_hand(processes: Processes) -> dict[str, Any]:
    """Replace the linears of the last layer, merge a map into the first, sweep through them, and collect the model."""
    model, batches = tiny_model("qwen2", torch.float64), as_batches(tiny_batches(2))
    if processes.sharded:
        shard_(model, CPU, processes)
    bytes_left, held = 0, 0
    for target in layer_targets(model, 2)[0]:
        module = LowRankLinear.from_dense(target.module, torch.arange(3))
        model.set_submodule(target.name, module)
        place_like(module, target.module)
        weight = target.module.weight
        storage = weight.to_local().untyped_storage() if isinstance(weight, DTensor) else weight.untyped_storage()
        del weight
        release_(target.module)
        bytes_left += storage.nbytes() if processes.sharded else 0
        held += sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in (module.U, module.Vh))
    last = last_added(model, 0).linear
    assert last is not None
    merge_map_(model, last, torch.arange(32 * 32, dtype=torch.float64).view(32, 32) / 1024)
    prefix = capture_prefix(model, batches, [1])
    grads: list[Tensor] = []
    sweep(prefix, layer_targets(model, 1)[0], lambda call: grads.append(call.grad_y))
    group_linears_(model)  # the members of a group are not fetched together
    logits = model(batches[0].input_ids).logits.detach()
    if processes.sharded:
        collect_(model, processes)
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    return {"bytes": bytes_left, "held": held, "grads": grads, "logits": logits, "state": state}


def test_low_rank_linears_are_sharded_in_place_of_sharded_ones() -> None:
    expected = replace_by_hand(ALONE)
    outcomes = [outcome.value for outcome in run(replace_by_hand, sharded=True)]
    assert sum(outcome["held"] for outcome in outcomes) == expected["held"]
    for outcome in outcomes:
        assert outcome["bytes"] == 0
        assert outcome["held"] < 0.6 * expected["held"]
        torch.testing.assert_close(outcome["grads"], expected["grads"], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(outcome["logits"], expected["logits"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(outcomes[0]["state"], expected["state"], rtol=1e-12, atol=1e-15)


def test_an_error_in_one_process_ends_the_waiting_processes() -> None:
    first, second = run(compress_with_a_bad_sweep, sharded=True)
    assert isinstance(second.error, NonFiniteError)
    assert isinstance(first.error, DistributedError)
    assert "process 0 of 2 has lost the others" in str(first.error)


def test_a_sharded_run_resumes_after_a_kill(tmp_path: Path) -> None:
    arguments = (tmp_path / "kept", CONFIG, "layer")
    first, second = run(compress_until_killed, *arguments, 3, sharded=True)
    assert second.exit_code == -signal.SIGKILL
    assert isinstance(first.error, DistributedError)
    report = compress_(tiny_model("llama", torch.float64), tiny_batches(3), CONFIG)
    expected = [module.indices for module in report.modules]
    for outcome in run(compress_until_killed, *arguments, None, sharded=True):
        assert outcome.value == [["layer 0 mlp", "layer 0 attention"], expected, ""]


def compress_in_bfloat16(processes: Processes) -> None:
    model = tiny_model("llama")
    shard_(model, CPU, processes)
    config = GraspConfig.from_dict({**CONFIG.to_dict(), "sweep_dtype": "bfloat16"})
    compress_(model, tiny_batches(2), config, processes=processes)


def test_sweeps_in_another_dtype_are_refused() -> None:
    for outcome in run(compress_in_bfloat16, sharded=True):
        assert isinstance(outcome.error, UnsupportedModelError)
        assert "sweep_dtype='bfloat16' needs whole weights, but some are sharded" in str(outcome.error)
