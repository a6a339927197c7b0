"""Models whose factors lie in packed memory, as on a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.utils import clean_state_dict_for_safetensors
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from grasp.compression.layer_cost import LiveBytes
from grasp.model import input_group, lowrank_linear
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.peft import lowrank_targets
from grasp_kernels import direct, registered
from grasp_kernels.packing import packed_memory, stacked
from tests.lowrank_models import Attention, assert_same_state, compressed_model, logits


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_group, "_gains_by_packing", lambda _: True)
    monkeypatch.setattr(lowrank_linear, "_faster_alone", lambda _: False)


def three_linears() -> Attention:
    """Of ranks 20, 32 and 7; in memory they have 32, 32 and 16."""
    return Attention(LowRankLinear(48, 40, 20), LowRankLinear(48, 32, 32, False), LowRankLinear(48, 32, 7, False))


def attention() -> Attention:
    model = plain()
    group_linears_(model)
    return model


def plain() -> Attention:
    torch.manual_seed(0)
    return three_linears().eval()


def is_packed(model: Attention) -> bool:
    Us, Vhs = (
        [packed_memory(getattr(layer, name), dim) for layer in model.layers] for name, dim in (("U", 1), ("Vh", 0))
    )
    assert None not in Vhs
    assert stacked(Vhs) is not None  # type: ignore[arg-type]
    return None not in Us


def addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def is_contiguous(model: nn.Module) -> bool:
    return all(parameter.is_contiguous() for parameter in model.parameters())


X = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
PATHS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "compiled": lambda model: torch.compile(model, fullgraph=True, backend="eager"),
    "traced": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "exported": lambda model: torch.export.export(model, (X,)).module(),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_reads_the_one_memory_of_the_factors(path: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []

    def recorded(_: str, op: str, *args: Any) -> Callable[..., Any]:
        def run(x: Tensor, groups: Any) -> list[Tensor]:
            assert op == "lowrank_linear_grouped"
            read.extend(factor for group in groups for factor in (group.U, group.Vh))
            return [x @ group.Vh.mT @ group.U.mT + (0 if group.bias is None else group.bias) for group in groups]

        return run

    torch.compiler.reset()
    expected, model = plain()(X), attention()
    run = PATHS[path](model)
    monkeypatch.setattr(registered, "select", recorded)
    monkeypatch.setattr(direct, "grouped", lambda *_: None)  # which only a CPU has
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(X), expected)
    assert [tuple(factor.shape) for factor in read] == [(40, 32), (32, 48), (32, 32), (32, 48), (32, 16), (16, 48)]
    held = [factor for layer in model.layers for factor in (layer.U, layer.Vh)]
    assert [factor.data_ptr() for factor in read] == [factor.data_ptr() for factor in held]
    assert all(factor.data_ptr() % 16 == factor.stride(0) * factor.itemsize % 16 == 0 for factor in read)
    assert stacked(read[1::2]) is not None


def test_factors_are_held_once() -> None:
    with LiveBytes() as live, torch.no_grad():
        model = attention()
        for _ in range(2):
            model(X)
    Vhs, Us, bias = (32 + 32 + 16) * 48, 40 * 32 + 32 * 32 + 32 * 16, 40
    assert live.now == 4 * (Vhs + Us + bias)


def test_writes_are_seen_without_packing_again() -> None:
    model = attention()
    before = addresses(model)
    with torch.inference_mode():
        model(X)
        model.q_proj.U.zero_()
        model.k_proj.Vh.data.zero_()
        model.load_state_dict({"v_proj.U": torch.zeros(32, 7)}, strict=False)
        assert not model(X).any()
    assert addresses(model) == before


def test_state_and_memory_are_those_of_the_logical_ranks(tmp_path: Path) -> None:
    model, twin = attention(), attention()
    assert_same_state(model, plain())
    assert len({factor.untyped_storage().data_ptr() for factor in model.parameters()}) == len(list(model.parameters()))
    twin.load_state_dict(model.state_dict())
    assert_same_state(twin, model)
    group_linears_(twin, enabled=False)  # safetensors refuses rows that are not adjacent
    save_model(twin, str(tmp_path / "twin.safetensors"))
    for state in (load_file(tmp_path / "twin.safetensors"), clean_state_dict_for_safetensors(model.state_dict())):
        twin = three_linears()
        twin.load_state_dict(state)
        assert_same_state(twin, model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.load_state_dict(torch.load(tmp_path / "model.pt"), assign=True)
    assert_same_state(model, twin)
    assert is_packed(model)


def test_a_checkpoint_is_saved_and_loaded(tmp_path: Path) -> None:
    model = compressed_model("llama")
    expected = logits(model)
    group_linears_(model.eval())
    assert not is_contiguous(model)
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert not is_contiguous(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_trained_factors_are_contiguous_and_return_to_the_same_memory() -> None:
    model, before = attention(), addresses(attention())
    before = addresses(model)
    model.train()
    assert is_contiguous(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    twin = plain().train()
    reference = torch.optim.AdamW(twin.parameters(), fused=False)
    for each, step in ((model, optimizer), (twin, reference)):
        each(X).square().sum().backward()
        step.step()
    model.eval()
    assert addresses(model) == before
    assert is_packed(model)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
    memory = packed_memory(model.q_proj.U, 1)
    assert memory is not None
    assert not memory[:, 20:].any()
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_in_evaluation_mode_move_no_padding(optimizer: type[torch.optim.Optimizer]) -> None:
    model, twin = attention(), plain()
    for each in (model, twin):
        step = optimizer(each.parameters(), lr=0.1)  # type: ignore[call-arg]
        for _ in range(2):
            each(X).square().sum().backward()
            step.step()
    assert is_packed(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    for layer in model.layers:
        for factor, dim in ((layer.U, 1), (layer.Vh, 0)):
            memory = packed_memory(factor, dim)
            assert memory is not None
            assert not memory.narrow(dim, layer.rank, memory.shape[dim] - layer.rank).any()


def test_factors_that_a_library_moves_into_one_buffer_stay_there() -> None:
    model = attention()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, piece in zip(model.parameters(), flat.split(sizes), strict=True):
        parameter.data = piece.view_as(parameter)
    before = addresses(model)
    for change in (model.train, model.eval, model.float, lambda: model.load_state_dict(plain().state_dict())):
        change()  # type: ignore[operator]
        assert addresses(model) == before
    assert_same_state(model, plain())


def test_a_model_grouped_in_training_mode_is_packed_for_evaluation() -> None:
    model = plain().train()
    group_linears_(model)
    assert is_contiguous(model)
    assert is_packed(model.eval())  # type: ignore[arg-type]


def test_frozen_factors_stay_packed_in_training_mode() -> None:
    model = attention().requires_grad_(False)
    before = addresses(model)
    assert is_packed(model.train())  # type: ignore[arg-type]
    assert addresses(model) == before


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_trainable_factors_can_be_sharded(mesh: DeviceMesh) -> None:
    model = fully_shard(attention().train(), mesh=mesh)
    assert all(type(layer.U) is DTensor for layer in model.layers)
    torch.testing.assert_close(model(X), plain()(X))
    gathered = addresses(model)
    assert addresses(model.eval()) == gathered


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_merged_adapters_are_packed_again() -> None:
    adapted = inject_adapter_in_model(lowrank_targets(LoraConfig(r=2, target_modules=["q_proj"])), attention())
    layer = adapted.q_proj.base_layer
    expected = layer(X)
    adapted.q_proj.merge()
    assert layer.U.shape == (40, 22)
    assert packed_memory(layer.U, 1) is not None
    torch.testing.assert_close(layer(X), expected)
    adapted.q_proj.unmerge()
    assert not is_contiguous(layer)
    assert_same_state(layer, plain().q_proj)


def test_factors_arrive_packed_in_another_dtype_or_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention().double()
    assert is_packed(model)
    torch.testing.assert_close(model(X.double()), plain().double()(X.double()))
    monkeypatch.setattr(input_group, "_gains_by_packing", lambda factor: factor.dtype == torch.bfloat16)
    assert is_contiguous(model.float())
    assert packed_memory(model.q_proj.Vh, 0) is None
    assert is_packed(model.bfloat16())


def test_a_copy_has_memory_of_its_own() -> None:
    model = attention()
    copies: tuple[Attention, ...] = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for twin in copies:
        assert_same_state(twin, model)
        assert not set(addresses(twin)) & set(addresses(model))
        torch.testing.assert_close(twin(X), model(X))
        group_linears_(twin)
        assert is_packed(twin)
    assert is_contiguous(copy.deepcopy(model))


def test_groups_taken_apart_have_ordinary_parameters() -> None:
    model = attention()
    memory = packed_memory(model.q_proj.Vh, 0)
    assert group_linears_(model, enabled=False) == []
    assert is_contiguous(model)
    assert packed_memory(model.q_proj.Vh, 0) is None
    assert packed_memory(model.k_proj.Vh, 0) is model.k_proj.Vh  # of rank 32, and no longer among the others
    assert memory is not None
    assert model.k_proj.Vh.data_ptr() != memory.data_ptr() + memory.nbytes
    assert_same_state(model.eval(), plain())
    assert is_contiguous(model)


def test_grouping_again_moves_nothing() -> None:
    model = attention()
    before = addresses(model)
    group_linears_(model)
    assert addresses(model) == before


def test_offloaded_and_parametrized_factors_are_left_alone() -> None:
    class Same(nn.Module):
        def forward(self, U: Tensor) -> Tensor:
            return U

    model, expected = attention(), plain()(X)
    parametrize.register_parametrization(model.q_proj, "U", Same())
    torch.testing.assert_close(model.eval()(X), expected)
    offloaded = attention()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    torch.testing.assert_close(offloaded.eval()(X), expected)
    with torch.inference_mode():
        inference = attention()
        torch.testing.assert_close(inference(X), expected)
