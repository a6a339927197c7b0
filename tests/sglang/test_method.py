"""The plugin's linears without an engine: what each process loads and computes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import LowRankLinear
from tests.serving.linears import stored, weight
from tests.sglang.processes import MISSING

pytest.importorskip("sglang", reason=MISSING)

from sglang.srt import plugins
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    MergedColumnParallelRepeatedLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, get_quantization_config
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.models.utils import WeightsMapper
from sglang.srt.runtime_context import get_context, get_parallel

from grasp.serving.sglang import DenseLinearMethod, GraspLinearMethod, GraspSglangConfig

HIDDEN, HEAD = 24, 8
HEADS = {"q": 4, "k": 2, "v": 2}


@contextmanager
def process(rank: int = 0, size: int = 1) -> Iterator[None]:
    """The context in which process ``rank`` of ``size`` builds and runs linears."""
    group = SimpleNamespace(rank_in_group=rank, world_size=size)
    with get_context().override_server_args(tp_size=size), get_parallel().override(tp_rank=rank, tp_group=group):
        yield


def load(layer: nn.Module, tensors: dict[str, Tensor], *shard: object) -> None:
    """Give the tensors of a linear to the loaders of the layer, as SGLang's models do."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def qkv(config: GraspSglangConfig) -> QKVParallelLinear:
    return QKVParallelLinear(
        HIDDEN, HEAD, 4, 2, bias=True, params_dtype=torch.float32, quant_config=config, prefix="m.qkv_proj"
    )


@pytest.mark.parametrize("storage", [None, Storage(8)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_process_computes_its_heads_of_low_rank_and_dense_parts_with_biases(
    processes: int, storage: Storage | None
) -> None:
    """q is pivoted, k factored and v dense. Two of four processes share a head of keys and values."""
    rows = {name: heads * HEAD for name, heads in HEADS.items()}
    own = {
        "q": stored(rows["q"], HIDDEN, 9, pivoted=True, storage=storage),
        "k": stored(rows["k"], HIDDEN, 3, storage=storage),
        "v": stored(rows["v"], HIDDEN, storage=storage),
    }
    biases = {name: torch.randn(rows[name]) for name in own}
    quantized = {f"m.{name}_proj": storage for name in own} if storage else {}
    x, outputs = torch.randn(5, HIDDEN), {name: [] for name in own}  # type: ignore[var-annotated]
    for rank in range(processes):
        with process(rank, processes):
            layer = qkv(GraspSglangConfig({"m.q_proj": 9, "m.k_proj": 3}, ["m.q_proj"], quantized))
            for name, tensors in own.items():
                load(layer, {**tensors, "bias": biases[name]}, name)
            layer.quant_method.process_weights_after_loading(layer)
            y, _ = layer(x)
        for name, part in zip(own, y.split([layer.q_proj_shard_size, *[layer.kv_proj_shard_size] * 2], 1), strict=True):
            outputs[name].append(part)
    for name, tensors in own.items():
        pieces = outputs[name] if name == "q" else outputs[name][:: max(1, processes // 2)]
        expected = x @ weight(tensors, HIDDEN).mT + biases[name]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)
    if processes == 4:
        assert outputs["k"][0].equal(outputs["k"][1])


@pytest.mark.parametrize("storage", [None, Storage(8)])
@pytest.mark.parametrize(("processes", "rank", "dense"), [(1, 4, False), (3, 4, False), (3, 8, True)])
def test_the_sum_over_processes_of_a_row_parallel_linear_is_the_whole(
    processes: int, rank: int, dense: bool, storage: Storage | None
) -> None:
    """With rank 8, a third of the weight has fewer numbers than U and a third of Vh. One process adds the bias."""
    own, bias, x = stored(10, HIDDEN, rank, pivoted=True, storage=storage), torch.randn(10), torch.randn(5, HIDDEN)
    total = torch.zeros(5, 10)
    for number, piece in enumerate(x.chunk(processes, 1)):
        with process(number, processes):
            config = GraspSglangConfig({"m.o_proj": rank}, ["m.o_proj"], {"m.o_proj": storage} if storage else {})
            layer = RowParallelLinear(
                HIDDEN, 10, params_dtype=torch.float32, reduce_results=False, quant_config=config, prefix="m.o_proj"
            )
            load(layer, {**own, "bias": bias})
            layer.quant_method.process_weights_after_loading(layer)
            total += layer(piece)[0]
        assert storage or bool(layer.weight.numel()) == dense
    torch.testing.assert_close(total, x @ weight(own, HIDDEN).mT + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merged", [True, False])
def test_gate_and_up_are_the_linears_of_transformers(merged: bool) -> None:
    """In the checkpoint they are one linear, as in Phi-3, or two."""
    names = ["gate_up_proj"] if merged else ["gate_proj", "up_proj"]
    linears = {}
    for number, name in enumerate(names):
        linears[name] = LowRankLinear.from_dense(nn.Linear(HIDDEN, 80 // len(names)), torch.arange(5 + number))
    linears[names[0]].pivot_()
    config = GraspSglangConfig({f"m.{name}": 5 + number for number, name in enumerate(names)}, [f"m.{names[0]}"])
    with process():
        layer = MergedColumnParallelLinear(
            HIDDEN, [40, 40], params_dtype=torch.float32, quant_config=config, prefix="m.gate_up_proj"
        )
        for number, linear in enumerate(linears.values()):
            load(layer, linear.state_dict(), *([] if merged else [number]))
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(5, HIDDEN)
        expected = torch.cat([linear(x) for linear in linears.values()], dim=1)
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_replicated_linear_is_whole_in_every_process() -> None:
    own, x = stored(10, HIDDEN, 4), torch.randn(5, HIDDEN)
    with process(1, 2):
        layer = ReplicatedLinear(
            HIDDEN, 10, bias=False, params_dtype=torch.float32, quant_config=GraspSglangConfig({"m": 4}), prefix="m"
        )
        load(layer, own)
        layer.quant_method.process_weights_after_loading(layer)
        torch.testing.assert_close(layer(x)[0], x @ weight(own, HIDDEN).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_a_quantised_embedding_gives_dequantised_rows(size: int, storage: Storage) -> None:
    own, total, tokens = stored(64 * size, HIDDEN, storage=storage), 0, torch.tensor([[3, 60], [1, 64 * size - 1]])
    for rank in range(size):
        with process(rank, size):
            config = GraspSglangConfig({}, (), {"embed": storage})
            layer = VocabParallelEmbedding(
                64 * size, HIDDEN, params_dtype=torch.float32, quant_config=config, prefix="embed"
            )
            load(layer, own)
            layer.quant_method.process_weights_after_loading(layer)
            total = total + layer._embed_local_shard(tokens)
    torch.testing.assert_close(total, weight(own, HIDDEN)[tokens])


# --- the configuration ------------------------------------------------------------------------------------------------


def test_sglang_finds_the_plugin_also_where_a_cpu_has_a_list_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP)
    register, distribution = found["grasp"]
    register()
    register()
    assert distribution == "grasp-llm"
    assert get_quantization_config("grasp") is GraspSglangConfig is CPU_QUANTIZATION_METHODS["grasp"]


def config_of(ranks: dict[str, int], kind: str = "llama", **added: object) -> GraspSglangConfig:
    """As SGLang reads it."""
    model = SimpleNamespace(model_type=kind, tie_word_embeddings=added.pop("tied", False))
    own = {"quant_method": "grasp", "format_version": 3 if "quantized" in added else 1, "ranks": ranks}
    return GraspSglangConfig.from_config({**own, "hf_config": model, "packed_modules_mapping": {}, **added})


def test_what_sglang_adds_to_the_configuration_is_read() -> None:
    config = config_of({"m.a": 4}, packed_modules_mapping={"ab": ["a", "b"]})
    with process():
        layer = MergedColumnParallelLinear(HIDDEN, [40, 40], quant_config=config, prefix="m.ab")
    assert isinstance(layer.quant_method, GraspLinearMethod)
    assert layer.quant_method.names == ("m.a", "m.b")


def test_low_rank_linears_are_renamed_as_sglang_renames_modules() -> None:
    config = GraspSglangConfig({"model.o_proj": 4}, ["model.o_proj"], {"model.o_proj": Storage(8)})
    config.apply_weight_name_mapper(WeightsMapper(orig_to_new_prefix={"model.": "text."}))
    assert (config.ranks, config.pivoted) == ({"text.o_proj": 4}, ["text.o_proj"])
    assert config.quantized == {"text.o_proj": Storage(8)}


def test_a_dense_linear_knows_whether_its_weight_was_loaded() -> None:
    with process():
        layer = ColumnParallelLinear(
            HIDDEN, 10, bias=False, params_dtype=torch.float32, quant_config=GraspSglangConfig({}), prefix="m.fc"
        )
        assert isinstance(layer.quant_method, DenseLinearMethod)
        with pytest.raises(CheckpointError, match=r"m\.fc\.weight is not in the checkpoint"):
            layer.quant_method.process_weights_after_loading(layer)
        load(layer, {"weight": torch.randn(10, HIDDEN)})
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("missing", ["q.U", "q.Vh", "k.weight", "v.order"])
def test_what_was_not_loaded_is_named(missing: str) -> None:
    own = {"q": stored(32, HIDDEN, 9), "k": stored(16, HIDDEN), "v": stored(16, HIDDEN, 3, pivoted=True)}
    part, _, name = missing.partition(".")
    del own[part][name]
    with process():
        layer = qkv(GraspSglangConfig({"m.q_proj": 9, "m.v_proj": 3}, ["m.v_proj"]))
        for shard, tensors in own.items():
            load(layer, tensors, shard)
        with pytest.raises(CheckpointError, match=rf"m\.{part}_proj\.{name} is not in the checkpoint"):
            layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("path", ["lm_head", "m.experts"])
def test_a_rank_for_something_else_than_a_linear_is_refused(path: str) -> None:
    config = GraspSglangConfig({"lm_head": 4, "m.experts.0.w1": 2})
    with pytest.raises(UnsupportedModelError, match=f"has a rank for {path}.*SGLang.*Embedding.*expected linear"):
        config.get_quant_method(nn.Embedding(2, 2), path)


@pytest.mark.parametrize(
    ("kind", "path", "quantized"),
    [("llama4", "m.qkv_proj", {}), ("deepseek_v3", "m.kv_b_proj", {}), ("gpt2", "m.c_fc", {"int8": ["m.c_fc"]})],
)
def test_a_linear_whose_tensors_sglang_would_reorder_is_refused(
    kind: str, path: str, quantized: dict[str, Sequence[str]]
) -> None:
    ranks = {} if quantized else {"m.q_proj": 4, "m.kv_b_proj": 4}
    config = config_of(ranks, kind, **({"quantized": quantized} if quantized else {}))
    with process(), pytest.raises(UnsupportedModelError, match=f"SGLang reorders {path}.*{kind}"):
        config.get_quant_method(LinearBase(1, 1), path)


def test_a_linear_of_another_kind_is_refused() -> None:
    config = GraspSglangConfig({"m.a": 4, "m.b": 4})
    config.packed_modules_mapping["ab"] = ["a", "b"]
    with process(), pytest.raises(UnsupportedModelError, match="serves with MergedColumnParallelRepeatedLinear"):
        MergedColumnParallelRepeatedLinear(HIDDEN, [16], [8], quant_config=config, prefix="m.ab")


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_output_layer_that_sglang_does_not_ask_for_is_refused_unless_it_is_the_embedding(
    tied: bool,
) -> None:
    config: Any = config_of({}, quantized={"int8": ["lm_head"]}, tied=tied)
    if tied:
        config.check_claimed()
    else:
        with pytest.raises(UnsupportedModelError, match="a storage for lm_head, for which SGLang asked no plugin"):
            config.check_claimed()
