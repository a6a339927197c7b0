from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.utils import offload_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.checkpoint.run_state import RunState
from grasp.checkpoint.saving import save_checkpoint
from grasp.compress import compress_
from grasp.compression import held_out, narrow
from grasp.compression.layer_cost import LiveBytes
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from grasp.evaluation.perplexity import perplexity
from grasp.method import channels
from grasp.model.batch import as_batches
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrowed_shapes
from grasp.model.offload import (
    execution_device,
    fetched,
    fetched_bytes,
    is_fetched_per_call,
    place_like,
    release_,
)
from grasp.model.running import first_device
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.redundancy import block_influence
from grasp.statistics.sweep import Call, capture_prefix, sweep
from tests.candidates import is_narrowed, is_whole, losing
from tests.interrupted import Killed
from tests.tiny_models import tiny_batches, tiny_model

pytestmark = pytest.mark.long

FAMILIES = ["llama", "gpt2", "gemma3"]  # gemma3 ties its head to its embeddings


def on_disk(family: str, folder: Path, **overrides: int) -> PreTrainedModel:
    """A model with all weights in files."""
    model = tiny_model(family, **overrides)
    offload_state_dict(folder / "weights", model.state_dict())
    return dispatch_model(model, {"": "disk"}, main_device="cpu", offload_dir=str(folder / "weights"))


def in_cpu_memory(family: str, folder: Path) -> PreTrainedModel:
    model = tiny_model(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def by_device_map(family: str, folder: Path, offload_folder: str | None = "offload") -> PreTrainedModel:
    """A model of ``from_pretrained`` with the last layer on disk and the rest in memory."""
    dense = tiny_model(family)
    dense.save_pretrained(folder / "dense")
    last = f"{decoder(dense).path}.2"
    places = {name: "cpu" for name, module in dense.named_modules() if not list(module.children()) and name}
    places = {name: place for name, place in places.items() if not name.startswith(f"{last}.")}
    return AutoModelForCausalLM.from_pretrained(
        folder / "dense",
        device_map={**places, last: "disk"},
        offload_folder=None if offload_folder is None else str(folder / offload_folder),
    )


def in_the_checkpoint(family: str, folder: Path) -> PreTrainedModel:
    """The same; the weights of the last layer are read from the checkpoint."""
    return by_device_map(family, folder, offload_folder=None)


Maker = Callable[[str, Path], PreTrainedModel]
MAKERS = [on_disk, in_cpu_memory, by_device_map]


CONFIGS = {
    "sequential": GraspConfig(layers=(1, 2), retain_ratio=0.3),
    "refitted": GraspConfig(layers=(1, 2), retain_ratio=0.3, schedule="single-sweep", refit=True),
    "best": GraspConfig.best(layers=(1, 2), retain_ratio=0.6),
}


PAIRS = [  # every two of family, maker and configuration meet once
    (family, make, list(CONFIGS)[(row + column) % 3])
    for row, family in enumerate(FAMILIES)
    for column, make in enumerate(MAKERS)
]


@pytest.mark.parametrize(("family", "make", "name"), PAIRS)
def test_an_offloaded_model_is_compressed_like_one_in_memory(
    family: str, make: Maker, name: str, tmp_path: Path
) -> None:
    config, batches = CONFIGS[name], tiny_batches()
    model, expected = make(family, tmp_path), tiny_model(family)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert block_influence(model, batches) == block_influence(expected, batches)
    report, wanted = compress_(model, batches, config), compress_(expected, batches, config)
    assert [m.indices for m in report.modules] == [m.indices for m in wanted.modules]
    assert (report.before, report.after) == (wanted.before, wanted.after)
    assert all(model.get_submodule(m.name).U.is_meta for m in report.compressed if make is not by_device_map)
    tokens = torch.cat([batch.flatten() for batch in batches])
    assert perplexity(model, tokens, window=16).nll == perplexity(expected, tokens, window=16).nll


@pytest.mark.parametrize("comes_back", [False, True])
@pytest.mark.parametrize("make", [*MAKERS, in_the_checkpoint])
def test_mlps_of_an_offloaded_model_lose_channels(
    make: Maker, comes_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the layers removed from the whole model are better in the end."""
    monkeypatch.setattr(held_out, "_measured", losing(is_narrowed if comes_back else is_whole))
    monkeypatch.setattr(channels, "MULTIPLE", 8)
    widths = {f"model.layers.{layer}.mlp": [48, 40] for layer in (0, 2)}
    monkeypatch.setattr(narrow, "choose_widths", lambda *_: widths)
    model, expected = make("llama", tmp_path), tiny_model("llama")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.dat")}
    batches, others, config = tiny_batches(), tiny_batches(1, seed=2), GraspConfig.best(compression_ratio=0.15)
    report, wanted = (compress_(each, batches, config, held_out=others) for each in (model, expected))
    assert report.held_out_loss == wanted.held_out_loss
    assert any(name.startswith("narrowed") for name in report.held_out_loss)
    assert report.channels == wanted.channels
    assert narrowed_shapes(model) == narrowed_shapes(expected)
    assert bool(report.channels) is not comes_back
    assert torch.equal(model(batches[0]).logits, expected(batches[0]).logits)
    if make in (on_disk, in_cpu_memory):
        assert all(parameter.is_meta for name, parameter in model.named_parameters() if ".mlp." in name)
    assert [path.name for path, content in files.items() if path.read_bytes() != content] == []
    if make is not in_cpu_memory:  # transformers saves a model without ``hf_device_map`` as it is
        save_checkpoint(model, tmp_path / "out")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(saved(batches[0]).logits, expected(batches[0]).logits)


def test_a_module_outlives_the_one_that_it_was_placed_like(tmp_path: Path) -> None:
    dense = on_disk("llama", tmp_path).get_submodule("model.layers.0.mlp.up_proj")
    n, k = dense_shape(dense)
    first, second, x = nn.Linear(k, n), nn.Linear(k, n), torch.randn(2, k)
    expected = second(x)
    place_like(first, dense)
    place_like(second, first)
    del first
    gc.collect()
    assert torch.equal(second(x), expected)


def test_layers_of_an_offloaded_model_are_removed(tmp_path: Path) -> None:
    config = GraspConfig.best(compression_ratio=0.3)
    batches, held_out = tiny_batches(), tiny_batches(1, seed=2)
    model, expected = on_disk("llama", tmp_path), tiny_model("llama")
    report, wanted = (compress_(each, batches, config, held_out=held_out) for each in (model, expected))
    assert report.removed_layers == wanted.removed_layers
    assert report.removed_layers
    assert report.held_out_loss == wanted.held_out_loss
    assert torch.equal(model(batches[0]).logits, expected(batches[0]).logits)


@pytest.mark.parametrize("make", [on_disk, by_device_map])  # transformers does not recognise cpu_offload
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_and_compressed_model_is_saved_completely(family: str, make: Maker, tmp_path: Path) -> None:
    batches = tiny_batches()
    model = make(family, tmp_path)
    compress_(model, batches, GraspConfig(layers=(2,), retain_ratio=0.3))
    save_checkpoint(model, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(batches[0]).logits, model(batches[0]).logits, rtol=0, atol=0)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["ranks"]


@pytest.mark.parametrize("make", MAKERS)
def test_hooks_and_parameters_are_as_they_were_after_a_sweep(make: Maker, tmp_path: Path) -> None:
    model, batches = make("llama", tmp_path), as_batches(tiny_batches())
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    prefix = capture_prefix(model, batches, [1])
    sweep(prefix, layer_targets(model, 1)[0], lambda call: None)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert {name: parameter.device for name, parameter in model.named_parameters()} == places
    assert all(parameter.requires_grad for parameter in model.parameters())
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert hooks
    assert not any(vars(hook).keys() & {"pre_forward", "post_forward"} for hook in hooks)


def test_fetched_weights_are_not_held_for_the_backward_pass(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512}  # weights much larger than the activations of four tokens
    batches = as_batches(tiny_batches(1, 1, 4))
    grads: list[list[torch.Tensor]] = [[], []]

    def peak(model: PreTrainedModel, gradients: list[torch.Tensor]) -> int:
        prefix = capture_prefix(model, batches, [0])

        def visit(call: Call) -> None:
            gradients.append(call.grad_y)

        with LiveBytes() as live:
            sweep(prefix, layer_targets(model, 0)[0], visit)
        return live.peak

    offloaded, whole = on_disk("llama", tmp_path, **wide), tiny_model("llama", **wide)
    largest = max(p.nbytes for p in whole.parameters())
    assert peak(offloaded, grads[0]) - peak(whole, grads[1]) < 3 * largest < sum(p.nbytes for p in whole.parameters())
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "step"),
    [("sequential", "layer 1 mlp"), ("best", "decompositions"), ("best", "refit")],
)
def test_a_run_of_an_offloaded_model_is_resumed(config: str, step: str, tmp_path: Path) -> None:
    batches = tiny_batches()

    def kill(now: str, done: int, total: int) -> None:
        if now == step and done > 1:
            raise Killed

    with pytest.raises(Killed), RunState(tmp_path / "run") as state:
        compress_(on_disk("llama", tmp_path / "1"), batches, CONFIGS[config], progress=kill, state=state)
    model, expected = on_disk("llama", tmp_path / "2"), tiny_model("llama")
    with RunState(tmp_path / "run") as state:
        report = compress_(model, batches, CONFIGS[config], state=state)
    wanted = compress_(expected, batches, CONFIGS[config])
    assert [m.indices for m in report.modules] == [m.indices for m in wanted.modules]
    assert torch.equal(model(batches[0]).logits, expected(batches[0]).logits)


def test_a_weight_is_fetched_to_where_its_module_runs(tmp_path: Path) -> None:
    model, expected = on_disk("gpt2", tmp_path), tiny_model("gpt2")
    module, wanted = (m.get_submodule("transformer.h.0.mlp.c_fc") for m in (model, expected))
    assert module.weight.is_meta
    torch.testing.assert_close(dense_weight(module), dense_weight(wanted), rtol=0, atol=0)
    torch.testing.assert_close(fetched(module, "bias"), wanted.bias.detach(), rtol=0, atol=0)
    assert module.weight.is_meta  # and released again
    assert execution_device(module) == torch.device("cpu")
    low = LowRankLinear.from_dense(module, torch.arange(3))
    assert {parameter.device.type for parameter in low.parameters()} == {"cpu"}


def replaced_by_hand(model: PreTrainedModel) -> list[LowRankLinear]:
    """Replace the linears of the last layer, and release them."""
    modules = []
    for target in layer_targets(model, 2)[0]:
        module = LowRankLinear.from_dense(target.module, torch.arange(3))
        model.set_submodule(target.name, module)
        place_like(module, target.module)
        shape, dtype = dense_shape(target.module), target.module.weight.dtype
        release_(target.module)
        assert target.module.weight.is_meta
        assert (dense_shape(target.module), target.module.weight.dtype) == (shape, dtype)
        modules.append(module)
    return modules


@pytest.mark.parametrize("make", [*MAKERS, in_the_checkpoint])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_linears_are_offloaded_in_place_of_offloaded_ones(family: str, make: Maker, tmp_path: Path) -> None:
    tokens = tiny_batches()
    results = []
    for model in (make(family, tmp_path), tiny_model(family)):
        modules = replaced_by_hand(model)
        assert all(module.U.is_meta == is_fetched_per_call(module) for module in modules)
        prefix = capture_prefix(model, as_batches(tokens), [1])
        grads: list[torch.Tensor] = []
        sweep(prefix, layer_targets(model, 1)[0], lambda call, grads=grads: grads.append(call.grad_y))  # type: ignore[misc]
        results.append((grads, model(tokens[0]).logits.detach(), [module.U.is_meta for module in modules]))
    (grads, logits, offloaded), (expected_grads, expected_logits, _) = results
    assert all(offloaded)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)


@pytest.mark.parametrize("make", [on_disk, by_device_map, in_the_checkpoint])
def test_low_rank_linears_that_were_offloaded_are_saved(make: Maker, tmp_path: Path) -> None:
    model, tokens = make("gpt2", tmp_path), tiny_batches()[0]
    replaced_by_hand(model)
    mark_compressed(model)
    expected = model(tokens).logits.detach()
    save_checkpoint(model, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(loaded(tokens).logits.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [on_disk, in_cpu_memory, in_the_checkpoint])
def test_a_low_rank_linear_stands_in_and_the_dense_one_returns(make: Maker, tmp_path: Path) -> None:
    model, tokens = make("llama", tmp_path), tiny_batches()[0]
    before = model(tokens).logits.detach()
    targets = layer_targets(model, 2)[0]
    for rank in (2, 5):  # of the second one, the files are written anew
        for target in targets:
            module = LowRankLinear.from_dense(target.module, torch.arange(rank))
            place_like(module, target.module)
            model.set_submodule(target.name, module)
        assert not torch.equal(model(tokens).logits, before)
    for target in targets:
        model.set_submodule(target.name, target.module)
    assert torch.equal(model(tokens).logits, before)


def test_a_released_weight_takes_no_memory_even_if_its_parameter_is_referred_to() -> None:
    linear = nn.Linear(4, 3)
    parameter, storage = linear.weight, weakref.ref(linear.weight.untyped_storage())
    release_(linear)
    assert storage() is None
    assert (linear.weight.shape, parameter.numel()) == ((3, 4), 0)
    assert not linear.bias.is_meta


def test_a_weight_in_cpu_memory_is_gone_after_its_release(tmp_path: Path) -> None:
    module = layer_targets(in_cpu_memory("llama", tmp_path), 2)[0][0].module
    stored = weakref.ref(module._hf_hook.weights_map["weight"])
    release_(module)
    assert stored() is None


def test_the_memory_of_fetched_weights_is_that_of_the_largest_and_its_copy(tmp_path: Path) -> None:
    model = by_device_map("llama", tmp_path)  # one layer is on disk
    largest = max(t.module.weight.numel() for t in layer_targets(model, 2)[0])
    assert fetched_bytes(model) == 2 * 4 * largest
    assert fetched_bytes(tiny_model("llama")) == 0


def test_tokens_go_to_the_device_where_an_offloaded_model_runs(tmp_path: Path) -> None:
    assert first_device(tiny_model("llama")) == torch.device("cpu")
    model = in_cpu_memory("llama", tmp_path)
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = torch.device("cuda:1")
    assert first_device(model) == torch.device("cuda:1")


def test_a_weight_without_data_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"weight of a Linear is on the meta device.*from_pretrained"):
        dense_weight(nn.Linear(2, 3, device="meta"))


@pytest.mark.parametrize(("family", "make"), [("llama", on_disk), ("gpt2", in_the_checkpoint), ("gemma3", on_disk)])
def test_an_offloaded_model_is_swept_in_another_dtype_like_one_in_memory(
    family: str, make: Maker, tmp_path: Path
) -> None:
    config, batches = GraspConfig(layers=(1, 2), retain_ratio=0.3, sweep_dtype="bfloat16"), tiny_batches()
    model, expected = make(family, tmp_path), tiny_model(family)
    report, wanted = compress_(model, batches, config), compress_(expected, batches, config)
    assert [m.indices for m in report.modules] == [m.indices for m in wanted.modules]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(batches[0]).logits, expected(batches[0]).logits)
