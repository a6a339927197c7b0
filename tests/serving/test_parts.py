"""The tensors that a process makes of a part of a linear: without vLLM."""

from __future__ import annotations

import pytest
import torch

from grasp.errors import UnsupportedModelError
from grasp.method.storage import FP8, Storage
from grasp.serving.parts import Part
from grasp.serving.shards import WHOLE, LocalLinear, Piece
from tests.serving.linears import stored, weight

ROWS, COLUMNS = 12, 256
FORMS = {"dense": (0, False), "factored": (5, False), "pivoted": (5, True)}
STORAGES = {str(storage): storage for storage in (None, Storage(8), FP8, Storage(4), Storage(4, 64), Storage(4, 128))}


def part(form: str, storage: Storage | None, rows: Piece = WHOLE, columns: Piece = WHOLE, width: int = 0) -> Part:
    rank, pivoted = FORMS[form]
    linear = LocalLinear("m", rank or None, (ROWS // rows.total,), (rows,), pivoted, storage)
    return Part(linear, width or COLUMNS // columns.total, columns, weight_as_factors=True)


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_the_pieces_of_all_processes_make_the_weight(axis: str, storage: str, form: str, processes: int) -> None:
    """With four processes, those with columns have 64 each: one scale of a group of 128 is that of two of them."""
    rank, pivoted = FORMS[form]
    tensors = stored(ROWS, COLUMNS, rank, pivoted=pivoted, storage=STORAGES[storage])
    expected = weight(tensors, COLUMNS).chunk(processes, dim=0 if axis == "rows" else 1)
    for process in range(processes):
        piece = {axis: Piece(process, processes)}
        own = part(form, STORAGES[storage], **piece)  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            own.check(name, tensor)
        assert own.stored.keys() == tensors.keys()
        made = own.make(tensors, torch.device("cpu"))
        assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
            name: spec.shape for name, spec in own.held.items() if name in made
        }
        if own.held.keys() - made.keys():  # a quantised weight as the Vh of pivoted factors
            assert form == "dense"
            made["order"] = torch.arange(own.linear.rows, dtype=torch.int32)
        torch.testing.assert_close(weight(made, own.width), expected[process])


def test_a_scale_stands_for_fewer_columns_where_a_group_crosses_a_border() -> None:
    own = part("dense", Storage(4, 64), columns=Piece(1, 2), width=96)
    tensors = stored(ROWS, 192, storage=Storage(4, 64))
    made = own.make(tensors, torch.device("cpu"))
    assert made["Vh_scales"].equal(tensors["weight_scales"][:, [1, 2, 2]])


@pytest.mark.parametrize(("storage", "width"), [(Storage(4, 64), 48), (Storage(4), 47), (Storage(8, 32), 16)])
def test_columns_that_cannot_be_cut_are_refused(storage: Storage, width: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"m is stored as {storage}, .* 3 processes has {width} .*--bits 8"):
        _ = part("dense", storage, columns=Piece(0, 3), width=width).held
