"""The plugin's linears without an engine: what each process loads and computes, and what is refused."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.storage import Storage
from tests.serving.linears import stored
from tests.serving.linears import weight as dense_weight

pytest.importorskip("vllm")

from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.utils import WeightsMapper

from grasp.serving.vllm import GraspLinearMethod, GraspVllmConfig, register
from tests.vllm.layers import HIDDEN, PACKED, WIDTHS, linear, load, method_for

tensors = stored
pivoted_tensors = functools.partial(stored, pivoted=True)


def weight(held: dict[str, Tensor]) -> Tensor:
    """The dense weight of a part."""
    return dense_weight(held, HIDDEN)


@pytest.mark.parametrize(("processes", "kv_replicas"), [(1, 1), (2, 1), (4, 2)])
def test_every_process_computes_its_heads_of_low_rank_and_dense_parts_with_biases(
    processes: int, kv_replicas: int
) -> None:
    ranks = {"q": 9, "k": 3}  # v is dense
    held = {"q": pivoted_tensors(WIDTHS["q"], HIDDEN, 9), "k": tensors(WIDTHS["k"], HIDDEN, 3)}
    held["v"] = {"weight": torch.randn(WIDTHS["v"], HIDDEN)}
    x = torch.randn(5, HIDDEN)
    whole = {name: x @ weight(own).mT for name, own in held.items()}
    for process in range(processes):
        layer = linear(QKVParallelLinear, process, processes, kv_replicas)
        outputs = [WIDTHS["q"] // processes, *[WIDTHS["k"] * kv_replicas // processes] * 2]
        paths = {f"m.{name}_proj": rank for name, rank in ranks.items()}
        method = method_for(layer, "m.qkv_proj", paths, HIDDEN, outputs, ["m.q_proj"])
        for part, own in held.items():
            for name, tensor in own.items():
                load(layer, name, tensor, part)
        assert layer.order.shape[0] == (WIDTHS["q"] if processes == 1 else 0)
        method.process_weights_after_loading(layer)
        bias = torch.randn(sum(outputs))
        starts = [process * outputs[0], *[process // kv_replicas * outputs[1]] * 2]
        pieces = zip(whole.values(), starts, outputs, strict=True)
        expected = torch.cat([y[:, start : start + width] for y, start, width in pieces], dim=1)
        torch.testing.assert_close(method.apply(layer, x, bias), expected + bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.apply(layer, x[None]), expected[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tensors, pivoted_tensors])
@pytest.mark.parametrize(("processes", "rank", "dense"), [(1, 4, False), (3, 4, False), (3, 8, True)])
def test_the_sum_over_processes_of_a_row_parallel_linear_is_the_whole(
    processes: int, rank: int, dense: bool, make: Callable[..., dict[str, Tensor]]
) -> None:
    """With rank 8, a third of the weight has fewer numbers than U and a third of Vh."""
    own, x = make(10, HIDDEN, rank), torch.randn(5, HIDDEN)
    pivoted = ["m.o_proj"] if "order" in own else []
    width, total = HIDDEN // processes, torch.zeros(5, 10)
    for process in range(processes):
        layer = linear(RowParallelLinear, process, processes)
        method = method_for(layer, "m.o_proj", {"m.o_proj": rank}, width, [10], pivoted)
        for name, tensor in own.items():
            load(layer, name, tensor)
        method.process_weights_after_loading(layer)
        assert [layer.U.numel(), layer.weight.numel()] == ([0, 10 * width] if dense else [own["U"].numel(), 0])
        total += method.apply(layer, x[:, process * width : (process + 1) * width])
    torch.testing.assert_close(total, x @ weight(own).mT, rtol=1e-4, atol=1e-4)


NARROWED = {"m.gate_proj": (20, HIDDEN), "m.up_proj": (20, HIDDEN), "m.down_proj": (HIDDEN, 20)}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_narrowed_mlp_has_the_channels_of_its_checkpoint(processes: int) -> None:
    """vLLM expects 32 channels. The gate has low rank, the others are dense."""
    gate, up, down = tensors(20, HIDDEN, 4), torch.randn(20, HIDDEN), torch.randn(HIDDEN, 20)
    x, total = torch.randn(5, HIDDEN), torch.zeros(5, HIDDEN)
    for process in range(processes):
        ranks = {"m.gate_proj": 4}
        first = linear(MergedColumnParallelLinear, process, processes)
        method = method_for(first, "m.gate_up_proj", ranks, HIDDEN, [32 // processes] * 2, shapes=NARROWED)
        for name, tensor in gate.items():
            load(first, name, tensor, 0)
        load(first, "weight", up, 1)
        method.process_weights_after_loading(first)
        second = linear(RowParallelLinear, process, processes)
        last = method_for(second, "m.down_proj", ranks, 32 // processes, [HIDDEN], shapes=NARROWED)
        load(second, "weight", down)
        last.process_weights_after_loading(second)
        gated = method.apply(first, x)
        assert gated.shape == (5, 40 // processes)
        left, right = gated.chunk(2, dim=-1)
        total += last.apply(second, left * right)
    torch.testing.assert_close(total, (x @ weight(gate).mT * (x @ up.mT)) @ down.mT, rtol=1e-4, atol=1e-3)


def test_channels_that_processes_cannot_share_are_refused() -> None:
    layer = linear(RowParallelLinear, 0, 3)
    with pytest.raises(UnsupportedModelError, match="20 channels; expected a multiple"):
        method_for(layer, "m.down_proj", {}, 8, [HIDDEN], shapes=NARROWED)


def test_a_replicated_linear_is_whole_in_every_process() -> None:
    layer, own = linear(ReplicatedLinear, 1, 2), tensors(10, HIDDEN, 4)
    method = method_for(layer, "m.router", {"m.router": 4}, HIDDEN, [10])
    for name, tensor in own.items():
        load(layer, name, tensor)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(method.apply(layer, x), x @ (own["U"] @ own["Vh"]).mT, rtol=1e-4, atol=1e-4)


def compiled(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[str]]:
    """The result of a compiled function, and what its one graph calls, but for splits and views of parameters."""
    calls: list[str] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    with torch.inference_mode():
        return torch.compile(run, backend=count, fullgraph=True)(x), [
            call for call in calls if "getitem" not in call and "split" not in call
        ]


@pytest.mark.parametrize("ranks", [{"q": 9, "k": 5, "v": 3}, {"q": 9, "k": 5}, {"k": 5}])
@pytest.mark.parametrize("rows", [5, 100])
def test_a_linear_is_one_op_that_returns_its_outputs_side_by_side(rows: int, ranks: dict[str, int]) -> None:
    layer, outputs = linear(QKVParallelLinear), list(WIDTHS.values())
    method = method_for(
        layer, "m.qkv_proj", {f"m.{n}_proj": r for n, r in ranks.items()}, HIDDEN, outputs, ["m.k_proj"]
    )
    held = {part: tensors(WIDTHS[part], HIDDEN, rank) for part, rank in ranks.items()}
    held["k"] = pivoted_tensors(WIDTHS["k"], HIDDEN, ranks["k"])
    held = {part: held.get(part) or {"weight": torch.randn(width, HIDDEN)} for part, width in WIDTHS.items()}
    for part, own in held.items():
        for name, tensor in own.items():
            load(layer, name, tensor, part)
    x, bias = torch.randn(rows, HIDDEN), torch.randn(sum(outputs))
    result, calls = compiled(lambda x: method.apply(layer, x, bias), x)
    assert calls == ["grasp.lowrank_linear_merged.default"]
    with torch.inference_mode():
        expected = torch.cat([x @ weight(own).mT for own in held.values()], dim=1) + bias
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.apply(layer, x, bias), result)


class Down(nn.Linear):
    def forward(self, x: Tensor) -> Any:  # as a linear of vLLM
        return super().forward(x), None


class Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ACTIVATIONS = {"silu": (SiluAndMul, None), "gelu": (GeluAndMul, "none"), "gelu_tanh": (GeluAndMul, "tanh")}


def gated_mlp(kind: Any = LlamaMLP, activation: str = "silu", dense: bool = False) -> Any:
    """A loaded MLP of vLLM with biases, a low-rank gate, and a pivoted or dense up."""
    torch.manual_seed(0)
    mlp, layer, (act, approximate) = object.__new__(kind), linear(MergedColumnParallelLinear), ACTIVATIONS[activation]
    for module in (mlp, (mlp_act := object.__new__(act))):
        nn.Module.__init__(module)
    mlp_act.approximate, mlp_act._forward_method = approximate, mlp_act.forward_native
    mlp.gate_up_proj, mlp.down_proj, mlp.act_fn = layer, Down(40, HIDDEN), mlp_act
    held = {
        0: tensors(40, HIDDEN, 7),
        1: {"weight": torch.randn(40, HIDDEN)} if dense else pivoted_tensors(40, HIDDEN, 5),
    }
    ranks = {"m.gate_proj": 7} if dense else {"m.gate_proj": 7, "m.up_proj": 5}
    layer.quant_method = method_for(layer, "m.gate_up_proj", ranks, HIDDEN, [40, 40], ["m.up_proj"])
    layer.bias, layer.gather_output, layer.return_bias = nn.Parameter(torch.randn(80)), False, True
    for part, own in held.items():
        for name, tensor in own.items():
            load(layer, name, tensor, part)
    for _ in range(2):  # vLLM can load weights again
        layer.quant_method.process_weights_after_loading(layer)
    return mlp


@pytest.mark.parametrize("kind", [LlamaMLP, Qwen2MLP])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_whose_gate_and_up_are_low_rank_is_one_op_and_down(kind: Any, activation: str) -> None:
    mlp, x = gated_mlp(kind, activation), torch.randn(3, HIDDEN)
    assert isinstance(mlp, kind)
    result, calls = compiled(mlp, x)
    assert [call for call in calls if "linear" not in call] == ["grasp.lowrank_glu.default"]
    torch.testing.assert_close(result, kind.forward(mlp, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result, mlp(x))


def test_an_mlp_keeps_its_class_if_a_part_is_dense_or_its_forward_is_another_or_vllm_serves_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert type(gated_mlp(dense=True)) is LlamaMLP
    assert type(gated_mlp(Scaled)) is Scaled
    config = SimpleNamespace(lora_config=object(), model_config=None)
    monkeypatch.setattr("grasp.serving.vllm.get_current_vllm_config_or_none", lambda: config)
    assert type(gated_mlp()) is LlamaMLP


def test_registering_twice_is_registering_once() -> None:
    register()
    register()
    assert get_quantization_config("grasp") is GraspVllmConfig


def test_a_linear_without_ranks_stays_dense_and_what_is_no_linear_is_left_to_vllm() -> None:
    config = GraspVllmConfig({"m.o_proj": 4, "m.experts.0.w1": 2})
    assert isinstance(config.get_quant_method(linear(RowParallelLinear), "m.down_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "m") is None


@pytest.mark.parametrize("path", ["lm_head", "m.experts"])
def test_a_rank_for_something_else_than_a_linear_is_refused(path: str) -> None:
    config = GraspVllmConfig({"lm_head": 4, "m.experts.0.w1": 2})
    with pytest.raises(UnsupportedModelError, match=f"has a rank for {path}.*Embedding.*expected linear layers"):
        config.get_quant_method(nn.Embedding(2, 2), path)


@pytest.mark.parametrize(
    ("kind", "path"), [("bloom", "h.0.query_key_value"), ("llama4_text", "m.qkv_proj"), ("gpt2", "m.c_fc")]
)
def test_a_linear_whose_factors_vllm_would_reorder_is_refused(
    kind: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SimpleNamespace(hf_text_config=SimpleNamespace(model_type=kind))
    monkeypatch.setattr(
        "grasp.serving.vllm.get_current_vllm_config_or_none", lambda: SimpleNamespace(model_config=text)
    )
    config = GraspVllmConfig(
        {"h.0.query_key_value": 4, "m.o_proj": 4}, (), {"m.q_proj": Storage(8), "m.c_fc": Storage(8)}
    )
    config.packed_modules_mapping = PACKED
    with pytest.raises(UnsupportedModelError, match=f"reorders {path}.*{kind}.*dense"):
        config.get_quant_method(linear(QKVParallelLinear), path)
    assert isinstance(config.get_quant_method(linear(RowParallelLinear), "m.o_proj"), GraspLinearMethod)


def test_low_rank_linears_are_renamed_as_vllm_renames_modules() -> None:
    config = GraspVllmConfig({"model.o_proj": 4, "model.q_proj": 3}, ["model.o_proj"], {"model.o_proj": Storage(8)})
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "text."}))
    assert config.ranks == {"text.o_proj": 4, "text.q_proj": 3}
    assert config.pivoted == ["text.o_proj"]
    assert config.quantized == {"text.o_proj": Storage(8)}


@pytest.mark.parametrize("rank", [17, 10**6, 10**9, 10**400])
def test_a_rank_above_that_of_the_weight_is_refused_before_memory_is_taken(rank: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"rank 1.* of m\.k_proj is above 16"):
        method_for(linear(QKVParallelLinear), "m.qkv_proj", {"m.k_proj": rank}, HIDDEN, list(WIDTHS.values()))
    with pytest.raises(CheckpointError, match=r"rank 1.* of m\.o_proj is above 10"):
        method_for(linear(RowParallelLinear, 0, 2), "m.o_proj", {"m.o_proj": rank}, HIDDEN // 2, [10])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


@pytest.mark.parametrize("ranks", [["m"], {"m.experts.": 4}, {"m": True}, {"m": 2.0}, {"": 1}, {"m\n": 1}])
def test_ranks_that_no_module_can_have_are_refused(ranks: object) -> None:
    with pytest.raises(CheckpointError, match="save the model again"):
        GraspVllmConfig.from_config({"quant_method": "grasp", "format_version": 1, "ranks": ranks})


def test_a_name_that_ends_like_an_expert_is_left_to_vllm() -> None:
    assert GraspVllmConfig({"m.experts.": 4}).get_quant_method(nn.Module(), "m.experts") is None


def test_a_factor_of_whole_numbers_is_refused(merged: tuple[LinearBase, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"m\.q_proj\.U has the dtype torch\.int8"):
        load(merged[0], "U", torch.zeros(32, 9, dtype=torch.int8), "q")


def test_a_configuration_of_the_future_is_refused() -> None:
    with pytest.raises(CheckpointError, match="format_version 5, this version of grasp reads 1, 2, 3, 4"):
        GraspVllmConfig.from_config({"quant_method": "grasp", "format_version": 5, "ranks": {}})


def test_the_dtypes_are_those_of_the_ops() -> None:
    assert set(GraspVllmConfig({}).get_supported_act_dtypes()) == {torch.bfloat16, torch.float16, torch.float32}


# --- checkpoints that are wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def merged() -> tuple[LinearBase, Any]:
    """q of rank 9, a dense k, a pivoted v of rank 3; nothing is loaded."""
    layer, ranks = linear(ColumnParallelLinear), {"m.q_proj": 9, "m.v_proj": 3}
    return layer, method_for(layer, "m.qkv_proj", ranks, HIDDEN, list(WIDTHS.values()), ["m.v_proj"])


WRONG = {
    "another rank": ("U", (32, 8), "q", r"m\.q_proj\.U has the shape \(32, 8\), config\.json requires \(32, 9\)"),
    "another width": ("Vh", (9, 23), "q", r"m\.q_proj\.Vh has the shape \(9, 23\), config\.json requires \(9, 24\)"),
    "a dense weight": ("weight", (32, 24), "q", r"dense m\.q_proj\.weight, but config\.json the rank 9 for it"),
    "a factor": ("U", (16, 3), "k", r"has the factor m\.k_proj\.U, but config\.json has no rank for it"),
    "another form": ("U", (16, 3), "v", r"m\.v_proj\.U has the shape \(16, 3\), config\.json requires \(13, 3\)"),
    "an order": ("order", (32,), "q", r"has m\.q_proj\.order, but pivoted in config\.json does not name m\.q_proj"),
    "another order": ("order", (15,), "v", r"m\.v_proj\.order has the shape \(15,\), config\.json requires \(16,\)"),
    "another dtype": ("order", (16,), "v", r"m\.v_proj\.order has the dtype torch\.float32; expected torch\.int32"),
    "another dense width": ("weight", (16, 23), "k", r"m\.k_proj\.weight has the shape \(16, 23\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_that_the_ranks_do_not_call_for_is_refused(wrong: str, merged: tuple[LinearBase, Any]) -> None:
    name, shape, shard, reason = WRONG[wrong]
    with pytest.raises(CheckpointError, match=reason):
        load(merged[0], name, torch.randn(shape), shard)


def test_a_shard_that_is_none_is_refused(merged: tuple[LinearBase, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="shard 'index_q'"):
        load(merged[0], "U", torch.randn(16, 3), "index_q")


@pytest.mark.parametrize("table", [torch.arange(16).flip(0).int(), torch.zeros(16, dtype=torch.int32)])
def test_an_order_that_kernels_cannot_use_is_refused(table: Tensor, merged: tuple[LinearBase, Any]) -> None:
    """Also one that vLLM has reordered with the rows of the architecture."""
    with pytest.raises(CheckpointError, match=r"m\.v_proj\.order is not the order.*grasp convert --to factored"):
        load(merged[0], "order", table, "v")


@pytest.mark.parametrize("missing", ["q.U", "q.Vh", "k.weight", "v.U", "v.order"])
def test_what_was_not_loaded_is_named(missing: str, merged: tuple[LinearBase, Any]) -> None:
    layer, method = merged
    held = {"q": tensors(32, HIDDEN, 9), "k": {"weight": torch.randn(16, HIDDEN)}, "v": pivoted_tensors(16, HIDDEN, 3)}
    for part, own in held.items():
        for name, tensor in own.items():
            if f"{part}.{name}" != missing:
                load(layer, name, tensor, part)
    part, _, name = missing.partition(".")
    with pytest.raises(CheckpointError, match=rf"m\.{part}_proj\.{name} is not in the checkpoint"):
        method.process_weights_after_loading(layer)


def test_scales_of_a_floating_part_are_refused(merged: tuple[LinearBase, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"has m\.q_proj\.U_scales, but quantized in config\.json does not name"):
        load(merged[0], "U_scales", torch.ones(32, 1), "q")


def test_a_number_that_is_none_is_refused() -> None:
    layer = linear(RowParallelLinear)
    method = method_for(layer, "m.o_proj", {"m.o_proj": 4}, HIDDEN, [10])
    load(layer, "U", torch.full((10, 4), torch.inf))
    load(layer, "Vh", torch.randn(4, HIDDEN))
    with pytest.raises(CheckpointError, match=r"m\.o_proj\.U is not in the checkpoint, or has NaN or infinite entries"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("kind", "rank", "skipped", "passed"),
    [
        (RowParallelLinear, 0, False, True),
        (RowParallelLinear, 1, False, False),
        (ColumnParallelLinear, 1, False, True),
        (ReplicatedLinear, 1, False, True),
        (ColumnParallelLinear, 0, True, False),
    ],
)
def test_on_a_gpu_ranks_in_memory_are_padded_with_zeros_and_kernels_are_warmed_up_with_the_bias_that_vllm_passes(
    kind: type[LinearBase], rank: int, skipped: bool, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr("grasp.serving.vllm.current_platform.is_cuda_alike", lambda: True)
    monkeypatch.setattr("grasp.serving.vllm.warm_up", lambda model, x: calls.append(model(x)))
    layer, own = linear(kind), tensors(10, HIDDEN, 4)
    layer.bias, layer.skip_bias_add = nn.Parameter(torch.randn(10), requires_grad=False), skipped
    method = method_for(layer, "m.o_proj", {"m.o_proj": 4}, HIDDEN, [10])
    for name, tensor in own.items():
        load(layer, name, tensor)
    layer.tp_rank = rank
    method.process_weights_after_loading(layer)
    Vh = layer.Vh.view(16, HIDDEN)
    assert Vh[:4].equal(own["Vh"])
    assert not Vh[4:].any()
    (y,) = calls  # of zeros
    assert torch.equal(y, passed * layer.bias[None])
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(method.apply(layer, x), F.linear(x, own["U"] @ own["Vh"]), rtol=1e-4, atol=1e-4)
