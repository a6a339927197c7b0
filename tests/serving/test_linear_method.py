"""A linear and an embedding of a serving stack, without one: ``tests/vllm`` and ``tests/sglang`` have the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp.errors import CheckpointError
from grasp.method.storage import Storage
from grasp.serving.embedding_method import QuantizedEmbeddingMethod
from grasp.serving.linear_method import LowRankMethod
from grasp.serving.shards import WHOLE, Piece, output_pieces
from tests.serving.linears import stored, weight

COLUMNS, ROWS = 24, 16


class Method(LowRankMethod):
    """Of a column-parallel linear."""

    def local_pieces(self, layer: Any, outputs: int) -> tuple[Sequence[Piece], Piece]:
        return output_pieces(outputs, layer.rank, layer.processes), WHOLE

    def on_cpu(self) -> bool:
        return True

    def on_gpu(self) -> bool:
        return False


def load(layer: nn.Module, tensors: dict[str, Tensor], *shard: object) -> None:
    for name, tensor in tensors.items():
        parameter: Any = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


@pytest.mark.parametrize("storage", [None, Storage(8)])
@pytest.mark.parametrize("processes", [1, 2])
def test_outputs_of_pivoted_and_dense_parts_are_side_by_side(processes: int, storage: Storage | None) -> None:
    own, x = [stored(ROWS, COLUMNS, 5, pivoted=True, storage=storage)], torch.randn(3, COLUMNS)
    own.append(stored(ROWS, COLUMNS, storage=storage))
    for rank in range(processes):
        layer: Any = nn.Module()
        layer.rank, layer.processes = rank, processes
        method = Method(["a", "b"], {"a": 5}, ["a"], {"a": storage, "b": storage} if storage else {})
        method.create_weights(layer, COLUMNS, [ROWS // processes] * 2, COLUMNS, 2 * ROWS, torch.float32)
        for shard, tensors in enumerate(own):
            load(layer, tensors, shard)
        method.check_loaded(layer)
        expected = [(x @ weight(tensors, COLUMNS).mT).chunk(processes, 1)[rank] for tensors in own]
        bias = torch.randn(2 * ROWS // processes)
        y = method.apply(layer, x, bias)
        torch.testing.assert_close(y, torch.cat(expected, 1) + bias, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_was_not_loaded_is_named() -> None:
    layer: Any = nn.Module()
    layer.rank, layer.processes = 0, 1
    method = Method(["a"], {"a": 5}, ["a"])
    method.create_weights(layer, COLUMNS, [ROWS], COLUMNS, ROWS, torch.float32)
    tensors = stored(ROWS, COLUMNS, 5, pivoted=True)
    del tensors["Vh"]
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=r"a\.Vh is not in the checkpoint; expected U, Vh, order of a"):
        method.check_loaded(layer)


def test_shapes_of_some_merged_linears_only_are_refused() -> None:
    layer: Any = nn.Module()
    layer.rank, layer.processes = 0, 1
    method = Method(["gate_proj", "up_proj"], {}, shapes={"gate_proj": (ROWS, COLUMNS)})
    with pytest.raises(CheckpointError, match="shape of a narrowed linear beside up_proj, but not of that one"):
        method.create_weights(layer, COLUMNS, [ROWS] * 2, COLUMNS, 2 * ROWS, torch.float32)


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_an_embedding_looks_up_and_multiplies_by_its_rows(storage: Storage) -> None:
    layer: Any = nn.Module()
    layer.org_vocab_size, layer.embedding_dim = ROWS, COLUMNS
    method, own = QuantizedEmbeddingMethod("embed", storage), stored(ROWS, COLUMNS, storage=storage)
    method.create_weights(layer, COLUMNS, [ROWS], COLUMNS, ROWS, torch.float32, weight_loader=torch.Tensor.copy_)
    with pytest.raises(CheckpointError, match=r"embed\.weight_scales is not in the checkpoint"):
        method.process_weights_after_loading(layer)
    load(layer, own)
    method.process_weights_after_loading(layer)
    table, tokens, x = weight(own, COLUMNS), torch.tensor([[3, 0], [1, ROWS - 1]]), torch.randn(3, COLUMNS)
    torch.testing.assert_close(method.embedding(layer, tokens), table[tokens])
    torch.testing.assert_close(method.apply(layer, x), x @ table.mT, rtol=1e-4, atol=1e-4)
    head: Any = method.tie_weights(nn.Module(), SimpleNamespace(weight=layer.weight, weight_scales=layer.weight_scales))
    assert head.weight is layer.weight
