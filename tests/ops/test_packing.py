from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_kernels import Factors, lowrank_glu, lowrank_linear, lowrank_linear_grouped, pack_factors, registered
from grasp_kernels.packing import (
    close_columns,
    has_padding,
    may_pad,
    packed_memory,
    pad_columns,
    stack_rows,
    stacked,
    widened,
)
from tests.ops.inputs import factors, normal, seeded

SHAPES = ((24, 5), (8, 16), (40, 33))  # (N, R)
K = 20


def group(**options: object) -> list[Factors]:
    generator = seeded()
    return [
        factors(N, K, R, generator, s=index != 1, bias=index != 2, **options)  # type: ignore[arg-type]
        for index, (N, R) in enumerate(SHAPES)
    ]


def test_ranks_become_multiples_of_16_filled_with_zeros() -> None:
    for given, packed in zip(group(), pack_factors(group()), strict=True):
        rank = given.U.shape[1]
        assert packed.U.shape[1] == packed.Vh.shape[0] == -(-rank // 16) * 16
        assert torch.equal(packed.U[:, :rank], given.U)
        assert torch.equal(packed.Vh[:rank], given.Vh)
        assert not packed.U[:, rank:].any()
        assert not packed.Vh[rank:].any()
        assert (packed.s is None) == (given.s is None)
        assert (packed.bias is None) == (given.bias is None)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_copies_are_contiguous_and_aligned(dtype: torch.dtype, layout: str) -> None:
    for packed in pack_factors(group(dtype=dtype, layout=layout)):
        for factor in (packed.U, packed.Vh):
            assert factor.is_contiguous()
            assert factor.data_ptr() % 16 == 0
        assert packed.U.stride(0) * packed.U.element_size() % 16 == 0


def test_every_op_gives_the_same_result_on_packed_factors() -> None:
    x = normal((7, K), seeded(1))
    given, packed = group(), pack_factors(group())
    for a, b in zip(lowrank_linear_grouped(x, given), lowrank_linear_grouped(x, packed), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(lowrank_linear(x, *given[0]), lowrank_linear(x, *packed[0]))
    generator = seeded()
    pair = [factors(12, K, rank, generator, s=True, bias=True) for rank in (3, 18)]
    torch.testing.assert_close(lowrank_glu(x, *pair), lowrank_glu(x, *pack_factors(pair)))


def test_packing_twice_changes_nothing() -> None:
    once = pack_factors(group())
    for a, b in zip(once, pack_factors(once), strict=True):
        assert torch.equal(a.U, b.U)
        assert torch.equal(a.Vh, b.Vh)


def test_packed_factors_are_detached_copies() -> None:
    given = [member._replace(U=member.U.requires_grad_(), Vh=member.Vh.requires_grad_()) for member in group()]
    packed = pack_factors(given)
    before = [member.U.clone() for member in packed]
    with torch.no_grad():
        for member in given:
            member.U.zero_()
    for member, U in zip(packed, before, strict=True):
        assert torch.equal(member.U, U)
        assert not member.U.requires_grad
        assert not member.Vh.requires_grad


def test_a_packed_group_is_stacked() -> None:
    packed = pack_factors(group())
    whole = stacked([member.Vh for member in packed])
    assert whole is not None
    assert torch.equal(whole, torch.cat([member.Vh for member in packed]))
    assert whole.data_ptr() == packed[0].Vh.data_ptr()


def test_other_groups_are_not_stacked() -> None:
    Vhs = [member.Vh for member in pack_factors(group())]
    assert stacked([Vhs[1], Vhs[0]]) is None
    assert stacked([Vhs[0], Vhs[2]]) is None
    assert stacked([member.Vh for member in group()]) is None
    assert stacked([Vhs[0][:5], Vhs[1]]) is None  # a gap
    assert stacked([torch.empty(4, 4).mT, torch.empty(4, 4)]) is None


def test_one_member_is_its_own_stack() -> None:
    Vh = torch.empty(3, 4)
    assert stacked([Vh]) is Vh


def test_groups_that_share_no_input_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack_factors([])
    one, two = group()[0], Factors(torch.empty(4, 2), None, torch.empty(2, K + 1))
    with pytest.raises(ValueError, match="agree in K, dtype and device"):
        pack_factors([one, two])


def held() -> list[Factors]:
    """The group without s, whose factors lie in packed memory, with gradients."""
    given = [member._replace(s=None) for member in group()]
    Vhs = stack_rows([member.Vh for member in given])
    return [
        Factors(nn.Parameter(pad_columns(member.U)), None, nn.Parameter(Vh), member.bias)
        for member, Vh in zip(given, Vhs, strict=True)
    ]


@pytest.mark.parametrize(("N", "R"), [(1, 1), (1, 17), (5, 1)])
def test_the_smallest_factors_can_be_packed(N: int, R: int) -> None:
    member = Factors(pad_columns(torch.ones(N, R)), None, stack_rows([torch.ones(R, K)])[0])
    assert widened(member).U.shape[1] == widened(member).Vh.shape[0] == (16 if R == 1 else 32)
    assert torch.equal(lowrank_linear(torch.ones(2, K), *member), torch.full((2, N), float(K * R)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_in_packed_memory_keep_their_shape_and_have_aligned_rows(dtype: torch.dtype) -> None:
    given = group(dtype=dtype, layout="sliced")
    for member, Vh in zip(given, stack_rows([member.Vh for member in given]), strict=True):
        U = pad_columns(member.U)
        assert torch.equal(U, member.U)
        assert torch.equal(Vh, member.Vh)
        assert Vh.is_contiguous()
        for factor, dim in ((U, 1), (Vh, 0)):
            memory, rank = packed_memory(factor, dim), factor.shape[dim]
            assert memory is not None
            assert memory.data_ptr() == factor.data_ptr()
            assert factor.data_ptr() % 16 == 0
            assert memory.shape[dim] == -(-rank // 16) * 16
            assert not memory.narrow(dim, rank, memory.shape[dim] - rank).any()
        assert U.stride(0) * U.element_size() % 16 == 0


def test_the_vh_of_a_group_lie_one_behind_the_other_in_storages_of_their_own() -> None:
    members = held()
    whole = stacked([widened(member).Vh for member in members])
    assert whole is not None
    assert len(whole) == 16 + 16 + 48
    assert len({member.Vh.untyped_storage().data_ptr() for member in members}) == 3
    assert [member.Vh.untyped_storage().nbytes() for member in members] == [member.Vh.nbytes for member in members]


def test_closed_columns_return_to_their_memory() -> None:
    U = torch.arange(12.0).view(4, 3)
    assert not may_pad(U)
    padded = pad_columns(U)
    closed = close_columns(padded)
    assert closed.is_contiguous()
    assert torch.equal(closed, U)
    assert packed_memory(closed, 1) is None
    assert may_pad(closed)
    assert pad_columns(closed.mul_(2)).data_ptr() == padded.data_ptr()
    assert torch.equal(padded, 2 * U)
    assert close_columns(closed) is closed
    assert not may_pad(closed.clone())


def test_contiguous_columns_are_closed_in_place() -> None:
    U = torch.ones(4, 3)
    assert close_columns(U) is U
    assert may_pad(U)
    assert torch.equal(pad_columns(U), U)


def test_packed_memory_lives_as_long_as_its_factor() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    parameter.data = pad_columns(parameter.data)
    memory = packed_memory(parameter.detach(), 1)
    assert memory is not None
    alive = weakref.ref(memory)
    del memory
    assert alive() is not None
    parameter.data = torch.ones(4, 3)
    assert alive() is None


CALLS: dict[str, Callable[[Tensor, list[Factors]], Any]] = {
    "lowrank_linear": lambda x, members: lowrank_linear(x, *members[0], backend="reference"),
    "lowrank_linear_grouped": lambda x, members: lowrank_linear_grouped(x, members, backend="reference")[0],
    "lowrank_glu": lambda x, members: lowrank_glu(x, members[0], members[0], backend="reference"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_ops_read_the_memory_of_the_factors_at_packed_rank(
    op: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    select = registered.select

    def recorded(*args: Any) -> Callable[..., Any]:
        asked.append(args[5])
        return select(*args)

    monkeypatch.setattr(registered, "select", recorded)
    members, x = held(), normal((7, K), seeded(1))
    with torch.set_grad_enabled(grad):
        y = CALLS[op](x, members)
    assert asked == [48 if op == "lowrank_linear_grouped" else 16]
    loose = [Factors(*(None if t is None else t.detach().clone() for t in member)) for member in members]
    for member in loose:
        member.U.requires_grad_()
        member.Vh.requires_grad_()
    expected = CALLS[op](x, loose)
    torch.testing.assert_close(y, expected)
    if grad:
        y.square().sum().backward()
        expected.square().sum().backward()
        for name in ("U", "Vh"):
            got, want = getattr(members[0], name).grad, getattr(loose[0], name).grad
            torch.testing.assert_close(got, want)
        for factor, dim in ((members[0].U, 1), (members[0].Vh, 0)):
            factor.data -= factor.grad  # a step moves no padding
            memory = packed_memory(factor, dim)
            assert memory is not None
            assert not memory.narrow(dim, 5, 11).any()


def test_a_part_of_a_factor_is_not_widened() -> None:
    member = held()[0]
    for U, Vh in (
        (member.U[:, :4], member.Vh[:4]),
        (member.U[:, 1:], member.Vh[1:]),
        (member.U[2:], member.Vh),
        (member.U.clone(), member.Vh.clone()),
    ):
        part = Factors(U, None, Vh)
        assert not has_padding(U)
        assert widened(part) is part


def test_a_factor_with_singular_values_is_not_widened() -> None:
    member, x = held()[0]._replace(s=torch.ones(5)), normal((7, K), seeded(1))
    assert widened(member) is member
    torch.testing.assert_close(lowrank_linear(x, *member), lowrank_linear(x, *member._replace(s=None)))
