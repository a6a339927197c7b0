from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.compression import held_out as choice
from grasp.compression.linear_replacement import TAKES_MAP
from grasp.config import GraspConfig
from grasp.method.least_squares import linear_map
from grasp.model.batch import as_batches
from grasp.model.dense import dense_weight
from grasp.model.layer_removal import remove_layers_
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.loss import mean_loss
from tests.interrupted import Killed, stop_at
from tests.model.test_offload import on_disk
from tests.tiny_models import tiny_batches, tiny_model

BATCHES, HELD_OUT = tiny_batches(4), tiny_batches(2, seed=5)
MERGED = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}


@pytest.fixture
def map_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = choice._measured

    def measure_or_worse(run: Any, start: Any, selections: Any, candidate: Any) -> float:
        value = measure(run, start, selections, candidate)
        return value if candidate.map else value + 99

    monkeypatch.setattr(choice, "_measured", measure_or_worse)


def compressed(
    model: PreTrainedModel,
    *,
    layers: float = 1.5,
    state: RunState | None = None,
    progress: Progress = no_progress,
) -> CompressionReport:
    """Remove the parameters of so many layers."""
    size = sum(p.numel() for p in decoder(model).layers[0].parameters())
    config = GraspConfig.best(compression_ratio=layers * size / model.num_parameters(), schedule="single-sweep")
    return compress_(model, BATCHES, config, held_out=HELD_OUT, state=state, progress=progress)


def by_hand(model: PreTrainedModel, merged: str, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The map in the place of a block, from all tokens at once, and the weight that takes it in."""
    layers = decoder(model).layers
    module, end = layers[block[0] - 1].get_submodule(merged), layers[block[-1]]
    outputs: dict[Any, list[Tensor]] = {m: [] for m in (module, layers[block[0] - 1], end)}

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs[module].append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    hooks = [module.register_forward_hook(keep) for module in outputs]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for hook in hooks:
        hook.remove()
    y, before, after = (torch.cat(states) for states in outputs.values())
    T = linear_map(y.mT @ y, (after - before + y).mT @ y)
    return T, dense_weight(module)


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.usefixtures("map_wins")
def test_the_map_is_merged_and_the_result_is_a_stock_model_with_the_loss_that_was_measured(
    family: str, tmp_path: Path
) -> None:
    dense, model = (tiny_model(family, torch.float64, num_hidden_layers=5) for _ in range(2))
    if family == "gpt2":
        dense, model = (tiny_model(family, torch.float64, n_layer=5) for _ in range(2))
    report = compressed(model)
    removed = report.removed_layers
    assert removed in {(1, 2), (2, 3), (3, 4)}
    name = f"layers {removed[0]}, {removed[1]} replaced by a linear map"
    assert report.held_out_text.endswith(name)
    assert report.held_out_loss[name] == pytest.approx(report.held_out_loss["compressed"], rel=1e-9)
    assert report.candidate_bytes[name] == report.after.bytes
    T, weight = by_hand(dense, MERGED[family], removed)
    takes = decoder(model).layers[removed[0] - 1].get_submodule(MERGED[family])
    torch.testing.assert_close(dense_weight(takes), T @ weight)
    path = f"{decoder(model).path}.{removed[0] - 1}.{MERGED[family]}"
    assert {module.name for module in report.left if module.reason == TAKES_MAP} == {path}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in vars(again.config)
    torch.testing.assert_close(again(BATCHES[0]).logits, model(BATCHES[0]).logits, rtol=0, atol=1e-5)


def test_a_map_recovers_a_layer_that_adds_nearly_a_multiple_of_what_the_layer_before_adds() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        first, second, last = (layer.mlp for layer in decoder(model).layers)
        decoder(model).layers[1].self_attn.o_proj.weight.mul_(1e-6)
        second.gate_proj.weight.copy_(first.gate_proj.weight)
        second.up_proj.weight.copy_(first.up_proj.weight)
        second.down_proj.weight.copy_(0.5 * first.down_proj.weight)
        first.down_proj.weight.mul_(0.05)
        last.down_proj.weight.mul_(4)  # changes the hidden states more
    remove_layers_(smaller := copy.deepcopy(model), [1])
    removed = mean_loss(smaller, as_batches(HELD_OUT))
    losses = compressed(model, layers=0.9).held_out_loss
    assert abs(losses["layers 1 replaced by a linear map"] - losses["dense"]) < abs(removed - losses["dense"]) / 2


def test_no_map_where_no_linear_takes_it() -> None:
    losses = compressed(tiny_model("gemma3"), layers=0.9).held_out_loss
    assert any(name.endswith(" removed") for name in losses)
    assert not any(name.endswith(" map") for name in losses)


@pytest.mark.usefixtures("map_wins")
def test_a_resumed_run_and_an_offloaded_model_end_with_the_same_map(tmp_path: Path) -> None:
    expected = tiny_model("llama")
    report = compressed(expected, layers=0.9)
    assert report.removed_layers

    def run(progress: Progress = no_progress) -> tuple[CompressionReport, PreTrainedModel]:
        model = tiny_model("llama")
        with RunState(tmp_path / "run") as state:
            return compressed(model, layers=0.9, state=state, progress=progress), model

    with pytest.raises(Killed):
        run(stop_at("refit", 2))
    resumed, model = run()
    assert resumed.modules == report.modules
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    offloaded = on_disk("llama", tmp_path / "disk")
    assert compressed(offloaded, layers=0.9).held_out_loss == report.held_out_loss
    assert torch.equal(offloaded(BATCHES[0]).logits, expected(BATCHES[0]).logits)
