from __future__ import annotations

import pytest
import torch

from grasp.errors import UnsupportedModelError
from grasp.method.storage import Storage
from grasp.serving.shards import (
    WHOLE,
    LocalLinear,
    Piece,
    linear_index,
    linear_names,
    local_columns,
    local_rows,
    merged_linears,
    output_pieces,
)

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
QKV = tuple(LocalLinear(name, None, (2,), (WHOLE,)) for name in ("q", "k", "v"))


def test_a_merged_module_has_the_names_of_its_linears_in_order() -> None:
    assert linear_names("layers.0.qkv_proj", PACKED) == ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj")
    assert linear_names("layers.0.o_proj", PACKED) == ("layers.0.o_proj",)
    assert linear_names("qkv_proj", PACKED) == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_and_columns_of_all_processes_make_the_tensor(processes: int) -> None:
    tensor = torch.arange(8 * 4).view(8, 4)
    rows, columns = [], []
    for rank in range(processes):
        (piece,) = output_pieces(1, rank, processes)
        rows.append(local_rows(tensor, LocalLinear("o", None, (8 // processes,), (piece,))))
        columns.append(local_columns(tensor, 4 // processes, piece))
    assert torch.cat(rows).equal(tensor)
    assert torch.cat(columns, dim=1).equal(tensor)


def test_several_processes_share_a_head_of_keys_and_values() -> None:
    """Four processes, eight heads of queries, two of keys and values: two processes share a head of keys and values."""
    heads = torch.arange(2)[:, None]
    taken = []
    for rank in range(4):
        query, key, value = output_pieces(3, rank, 4, kv_replicas=2)
        assert query == Piece(rank, 4)
        assert key == value
        taken.append(local_rows(heads, LocalLinear("k", 5, (1,), (key,))).item())
    assert taken == [0, 0, 1, 1]


def test_a_process_has_rows_of_every_output_of_a_linear_that_is_merged_in_the_checkpoint() -> None:
    """q has rows 0 to 7, k 8 to 11 and v 12 to 15; the second of two processes has the second half of each output."""
    (part,) = merged_linears(["qkv"], {"qkv": 3}, [4, 2, 2], output_pieces(3, 1, 2))
    assert part.rank == 3
    assert (part.rows, part.checkpoint_rows) == (8, 16)
    assert local_rows(torch.arange(16)[:, None], part).flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


def test_some_linears_of_a_merged_module_have_ranks_and_others_are_dense() -> None:
    parts = merged_linears(["q", "k", "v"], {"q": 9, "v": 2}, [8, 4, 4], [WHOLE] * 3)
    assert [part.rank for part in parts] == [9, None, 2]
    assert [part.rows for part in parts] == [8, 4, 4]


def test_linears_and_outputs_that_do_not_match_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"2 linears.*3 outputs.*dequantize"):
        merged_linears(["a", "b"], {"a": 1}, [4, 2, 2], [WHOLE] * 3)


def test_merged_linears_of_which_some_are_quantised_are_refused() -> None:
    storages = {"a": Storage(8), "b": Storage(4, 64)}
    parts = merged_linears(["a", "b"], {}, [4, 2], [WHOLE] * 2, (), storages)
    assert [part.storage for part in parts] == [*storages.values()]
    with pytest.raises(UnsupportedModelError, match=r"floating and quantised linears \(a int8, c floating\)"):
        merged_linears(["a", "c"], {}, [4, 2], [WHOLE] * 2, (), storages)


@pytest.mark.parametrize(("shard", "index"), [("q", 0), ("k", 1), ("v", 2), (0, 0), (2, 2)])
def test_shards_are_selected_by_name_and_by_number(shard: object, index: int) -> None:
    assert linear_index(shard, QKV) == index


def test_no_shard_selects_the_only_linear() -> None:
    assert linear_index(None, QKV[:1]) == 0


@pytest.mark.parametrize("shard", [None, "index_q", 3, -1, (0, 1), True])
def test_an_unknown_shard_is_refused(shard: object) -> None:
    with pytest.raises(UnsupportedModelError, match="q, k, v; expected one of them"):
        linear_index(shard, QKV)
