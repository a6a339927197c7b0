"""The plugin's quantised linears, embeddings and output layers without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.storage import FP8, Storage
from tests.serving.linears import matrix, stored, weight

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from grasp.serving.vllm import GraspVllmConfig, register
from grasp.serving.vllm_embedding import GraspEmbeddingMethod
from tests.vllm.layers import HIDDEN, WIDTHS, linear, load, method_for


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("storage", [Storage(8), Storage(4), Storage(4, 32), FP8], ids=str)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_computes_its_outputs_of_quantised_low_rank_and_dense_parts(
    processes: int, storage: Storage, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised weight is factors of full rank on a CPU; elsewhere it is dequantised in the call. q has 8 bits."""
    monkeypatch.setattr("grasp.serving.vllm.current_platform.is_cpu", lambda: on_cpu)
    held = {"q": stored(WIDTHS["q"], HIDDEN, 9, pivoted=True, storage=Storage(8))}
    held["k"] = stored(WIDTHS["k"], HIDDEN, 5, storage=storage)
    held["v"] = stored(WIDTHS["v"], HIDDEN, storage=storage)
    storages = {"m.q_proj": Storage(8), "m.k_proj": storage, "m.v_proj": storage}
    for process in range(processes):
        layer, outputs = linear(QKVParallelLinear, process, processes), [w // processes for w in WIDTHS.values()]
        ranks = {"m.q_proj": 9, "m.k_proj": 5}
        method = method_for(layer, "m.qkv_proj", ranks, HIDDEN, outputs, ["m.q_proj"], storages)
        for part, own in held.items():
            for name, tensor in own.items():
                load(layer, name, tensor, part)
        method.process_weights_after_loading(layer)
        assert (layer.weight.numel() == 0) == on_cpu
        bias = torch.randn(sum(outputs))
        expected = torch.cat([weight(own, HIDDEN).chunk(processes)[process] for own in held.values()])
        for rows in (3, 100):
            x = torch.randn(rows, HIDDEN)
            y = method.apply(layer, x, bias)
            torch.testing.assert_close(y, F.linear(x, expected, bias), rtol=1e-4, atol=1e-3)


# --- quantised embeddings and output layers ---------------------------------------------------------------------------

VOCABULARY, PADDED = 50, 64


def embedding(
    kind: type[VocabParallelEmbedding],
    path: str,
    start: int = 0,
    rows: int = PADDED,
    storage: Storage = Storage(8),  # noqa: B008
) -> Any:
    """A quantised embedding or output layer that has ``rows`` rows, padded, from row ``start``."""
    layer = object.__new__(kind)
    nn.Module.__init__(layer)
    stop = min(VOCABULARY, start + rows)
    layer.shard_indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
    layer.org_vocab_size, layer.embedding_dim = VOCABULARY, HIDDEN
    config = GraspVllmConfig({}, (), {"model.embed_tokens": storage, "lm_head": storage})
    layer.quant_method = config.get_quant_method(layer, path)
    assert isinstance(layer.quant_method, GraspEmbeddingMethod)
    sizes = (HIDDEN, [rows], HIDDEN, PADDED)
    layer.quant_method.create_weights(layer, *sizes, params_dtype=torch.float32, weight_loader=layer.weight_loader)
    return layer


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_a_process_embeds_its_rows_and_gives_their_logits(storage: Storage) -> None:
    held = matrix("weight", VOCABULARY, HIDDEN, storage)
    whole, x = F.pad(weight(held, HIDDEN), (0, 0, 0, PADDED - VOCABULARY)), torch.randn(5, HIDDEN)
    for start in (0, 32):
        layer = embedding(VocabParallelEmbedding, "model.embed_tokens", start, 32, storage)
        for name, tensor in held.items():
            load(layer, name, tensor)
        layer.quant_method.process_weights_after_loading(layer)
        ids = torch.tensor([[3, 0], [17, 3]])
        torch.testing.assert_close(layer.quant_method.embedding(layer, ids), whole[start + ids])
        head = layer.quant_method.tie_weights(embedding(ParallelLMHead, "lm_head", start, 32, storage), layer)
        expected = F.linear(x, whole[start : start + 32])
        torch.testing.assert_close(head.quant_method.apply(head, x), expected, rtol=1e-4, atol=1e-3)


def test_an_embedding_that_is_not_in_the_checkpoint_or_is_another_is_refused() -> None:
    layer = embedding(ParallelLMHead, "lm_head")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has the dtype torch\.float32; expected torch\.int8"):
        load(layer, "weight", torch.randn(VOCABULARY, HIDDEN))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scales has the shape \(50, 2\).*requires \(50, 1\)"):
        load(layer, "weight_scales", torch.randn(VOCABULARY, 2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scales is not in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_an_embedding_that_is_not_quantised_is_left_to_vllm() -> None:
    layer = object.__new__(ParallelLMHead)
    assert GraspVllmConfig({"m.o_proj": 4}, (), {"m.o_proj": Storage(8)}).get_quant_method(layer, "lm_head") is None


@pytest.mark.parametrize(("ranks", "storage"), [({"lm_head": 4}, Storage(8)), ({}, FP8)])
def test_an_output_layer_of_another_kind_is_refused(ranks: dict[str, int], storage: Storage) -> None:
    with pytest.raises(UnsupportedModelError, match=r"for lm_head, .* ParallelLMHead; .* embeddings in int8"):
        GraspVllmConfig(ranks, (), {"lm_head": storage}).get_quant_method(object.__new__(ParallelLMHead), "lm_head")


@pytest.mark.parametrize(("attribute", "kind"), [("embed_tokens", GraspEmbeddingMethod), ("positions", None)])
def test_an_embedding_for_which_vllm_does_not_ask_is_known_by_its_attribute(
    attribute: str, kind: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    config = SimpleNamespace(quant_config=GraspVllmConfig({}, (), {"model.embed_tokens": Storage(8)}))
    monkeypatch.setattr("grasp.serving.vllm_embedding.get_current_vllm_config_or_none", lambda: config)
    layer = object.__new__(VocabParallelEmbedding)
    nn.Module.__init__(layer)
    layer.quant_method, layer.org_vocab_size, layer.embedding_dim = UnquantizedEmbeddingMethod(), VOCABULARY, HIDDEN
    layer.output_partition_sizes, layer.output_size, layer.params_dtype = [PADDED], PADDED, torch.bfloat16
    layer.weight = nn.Parameter(torch.empty(PADDED, HIDDEN))
    setattr(nn.Module(), attribute, layer)
    assert type(layer.quant_method) is (kind or UnquantizedEmbeddingMethod)
    assert layer.weight.dtype == (torch.int8 if kind else torch.float32)


# --- checkpoints that are wrong ---------------------------------------------------------------------------------------

QUANTIZED = {"m.q_proj": Storage(4, 32), "m.k_proj": Storage(4, 32), "m.v_proj": Storage(4, 32)}


@pytest.fixture
def quantized() -> tuple[LinearBase, Any]:
    """As ``merged``, with 4 bits."""
    layer, ranks = linear(ColumnParallelLinear), {"m.q_proj": 9, "m.v_proj": 3}
    outputs = list(WIDTHS.values())
    return layer, method_for(layer, "m.qkv_proj", ranks, HIDDEN, outputs, ["m.v_proj"], QUANTIZED)


WRONG_QUANTIZED = {
    "floating values": ("U", torch.randn(32, 5), "q", r"m\.q_proj\.U has the dtype torch\.float32; .*torch\.uint8"),
    "other bits": ("U", torch.zeros(32, 9).char(), "q", r"m\.q_proj\.U has the shape \(32, 9\).*requires \(32, 5\)"),
    "other groups": ("Vh_scales", torch.ones(3, 2), "v", r"m\.v_proj\.Vh_scales has the shape \(3, 2\)"),
    "whole scales": ("weight_scales", torch.ones(16, 1).int(), "k", r"weight_scales has the dtype torch\.int32"),
    "scales of a dense": ("U_scales", torch.ones(16, 1), "k", r"has the factor m\.k_proj\.U_scales, but .* no rank"),
}


@pytest.mark.parametrize("wrong", WRONG_QUANTIZED)
def test_a_tensor_that_the_storages_do_not_call_for_is_refused(wrong: str, quantized: tuple[LinearBase, Any]) -> None:
    name, tensor, shard, reason = WRONG_QUANTIZED[wrong]
    with pytest.raises(CheckpointError, match=reason):
        load(quantized[0], name, tensor, shard)


@pytest.mark.parametrize("missing", ["q.U", "q.Vh_scales", "k.weight_scales", "v.U_scales", "v.order", "k."])
def test_what_was_not_loaded_of_a_quantised_part_is_named(missing: str, quantized: tuple[LinearBase, Any]) -> None:
    layer, method = quantized
    parts = {"q": (32, 9, False), "k": (16, 0, False), "v": (16, 3, True)}
    for part, (rows, rank, pivoted) in parts.items():
        for name, tensor in stored(rows, HIDDEN, rank, pivoted=pivoted, storage=Storage(4, 32)).items():
            if f"{part}.{name}" != missing and missing != f"{part}.":
                load(layer, name, tensor, part)
    part, _, name = missing.partition(".")
    with pytest.raises(CheckpointError, match=rf"m\.{part}_proj\.{name or 'weight_scales'} is not in the checkpoint"):
        method.process_weights_after_loading(layer)
