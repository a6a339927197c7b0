from __future__ import annotations

import pytest
import torch

from grasp_kernels import Factors, lowrank_glu, lowrank_linear, lowrank_linear_grouped, pack_factors
from grasp_kernels.packing import stacked
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
