"""Prepared pairs, whose compiled launches are stood for by the interpreter."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from grasp_kernels import Factors, launch_configs, pack_factors
from grasp_kernels.launch_configs import Config, LaunchKey
from grasp_kernels.triton import lowrank_glu as glu
from grasp_kernels.triton import lowrank_linear as linear
from grasp_kernels.triton import prepared
from grasp_kernels.triton.launch import Launch
from grasp_kernels.triton.prepared import PREPARED, describe
from tests.ops.inputs import factors, normal, seeded
from tests.ops.test_triton_lowrank import PAIR

BF16 = torch.bfloat16
K = 64
SHAPES = ((24, 5), (32, 17), (16, 16))  # (N, R) of each member


class Binary:
    """Stands for a compiled kernel: launches it with positional arguments, of which some are addresses."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    function, packed_metadata = "function", "metadata"

    def run(self, x: int, y: int, z: int, stream: int, *values: Any) -> None:
        """Triton's launcher of a binary."""
        kernel, arguments = self.launch.kernel, dict(self.launch.arguments)
        dtypes = {name: _dtype(value) for name, value in arguments.items()}
        assert values[:5] == (self.function, self.packed_metadata, None, None, None)  # and no metadata, no hooks
        names, values = kernel.arg_names, values[5:]
        given = {name: _tensors(value, dtypes[name]) for name, value in zip(names, values, strict=True)}
        kernel[x, y, z](**given)


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of a tensor argument, or of a tuple of them; ``None`` for numbers."""
    first = value[0] if isinstance(value, tuple) else value
    return first.dtype if isinstance(first, Tensor) else None


def _tensors(value: Any, dtype: torch.dtype | None) -> Any:
    """An argument for the interpreter; addresses become tensors of one element, of which it reads the address."""
    if dtype is None:
        return value
    if isinstance(value, tuple):
        return tuple(_tensors(address, dtype) for address in value)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(value), dtype=dtype)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches return binaries. The list has all launches that were planned and run."""
    planned: list[Launch] = []

    def run(launch: Launch) -> Binary:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)
        planned.append(launch)
        return Binary(launch)

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(linear, "choose", lambda *_: PAIR)
    active = SimpleNamespace(get_current_stream=lambda _: 0)
    monkeypatch.setattr(prepared, "driver", SimpleNamespace(active=active))
    PREPARED.clear()
    yield planned
    PREPARED.clear()


def group(
    generator: torch.Generator,
    *,
    s: bool = False,
    bias: bool = True,
    members: int = 3,
    packed: bool = False,
    pivoted: bool = False,
) -> list[Factors]:
    """The second member never has an s, the third never a bias; only the second may be pivoted."""
    created = [
        factors(N, K, R, generator, s=s and index != 1, bias=bias and index != 2, dtype=BF16)
        for index, (N, R) in enumerate(SHAPES[:members])
    ]
    if pivoted:
        created[1] = pivot(created[1], generator)
    return pack_factors(created) if packed else created


def pivot(member: Factors, generator: torch.Generator) -> Factors:
    """Random pivoted factors of the same shape."""
    N, R = member.U.shape
    order = torch.randperm(N, generator=generator).to(torch.int32)
    return member._replace(U=member.U[R:].clone(), s=None, order=order)


def check(x: Tensor, members: Sequence[Factors], config: Config = PAIR) -> list[Tensor]:
    """Run a call through ``lowrank_linear_grouped``; it must equal a call that is planned."""
    expected = linear.run(x, members, config)
    ys = linear.lowrank_linear_grouped(x, members)
    assert all(map(torch.equal, ys, expected))
    return ys


CALLS = {
    "one": {"members": 1},
    "group": {},
    "packed": {"packed": True},
    "s": {"s": True},
    "no bias": {"bias": False},
    "pivoted": {"pivoted": True},
}


@pytest.mark.parametrize(("call", "rows"), list(zip(CALLS, (1, 5, 1, 5, 5, 5), strict=True)))
def test_a_second_call_with_other_tensors_plans_nothing(call: str, rows: int, compiled: list[Launch]) -> None:
    generator = seeded()
    linear.lowrank_linear_grouped(normal((rows, K), generator, dtype=BF16), group(generator, **CALLS[call]))
    assert len(PREPARED) == 1
    x, members = normal((rows, K), generator, dtype=BF16), group(generator, **CALLS[call])
    expected = linear.run(x, members, PAIR)
    compiled.clear()
    assert all(map(torch.equal, linear.lowrank_linear_grouped(x, members), expected))
    assert compiled == []


def test_reduced_and_given_outputs_are_replayed(monkeypatch: pytest.MonkeyPatch, compiled: list[Launch]) -> None:
    config = replace(PAIR, reduce=True)
    monkeypatch.setattr(linear, "choose", lambda *_: config)
    generator = seeded()
    members = group(generator, members=2)
    for repetition in range(2):
        x = normal((5, K), generator, dtype=BF16)
        expected = linear.run(x, members, config)
        whole = torch.full((5, 24 + 32), torch.nan, dtype=BF16)
        compiled.clear()
        linear.lowrank_linear_grouped(x, members, list(whole.split([24, 32], dim=1)))
        assert torch.equal(whole, torch.cat(expected, 1))
        assert len(compiled) == 2 * (repetition == 0)


GATED_CALLS = [  # reduce, rows, s, packed, which members are pivoted
    (False, 1, False, True, ()),
    (True, 5, True, False, ()),
    (True, 5, False, False, (0, 1)),
    (False, 1, False, False, (1,)),
]


@pytest.mark.parametrize("call", GATED_CALLS)
def test_a_gated_unit_is_replayed(
    call: tuple[bool, int, bool, bool, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, compiled: list[Launch]
) -> None:
    reduce, rows, s, packed, pivoted = call
    config = replace(PAIR, reduce=reduce)
    monkeypatch.setattr(glu, "choose", lambda *_: config)
    generator = seeded()
    for repetition in range(2):
        x = normal((rows, K), generator, dtype=BF16)
        members = [factors(24, K, R, generator, s=s and R == 5, bias=R == 17, dtype=BF16) for R in (5, 17)]
        for index in pivoted:
            members[index] = pivot(members[index], generator)
        gate, up = pack_factors(members) if packed else members
        expected = glu.run(x, gate, up, "silu", config)
        compiled.clear()
        assert torch.equal(glu.lowrank_glu(x, gate, up, "silu"), expected)
        assert len(compiled) == 2 * (repetition == 0)
    key = next(iter(PREPARED))
    assert key[:2] == ("lowrank_glu", "silu")


def test_calls_whose_plans_differ_do_not_share_one() -> None:
    generator = seeded()
    x, wide = normal((5, K), generator, dtype=BF16), normal((5, 2 * K), generator, dtype=BF16)
    plain = group(generator, members=2)
    (U, s, Vh, bias, *_), second = plain
    calls = [
        (x, plain),
        (x[:4], plain),
        (wide[:, :K], plain),  # another row stride
        (x, plain[:1]),
        (x, group(generator, members=2, packed=True)),
        (x, [Factors(U, torch.ones(5), Vh, bias), second]),
        (x, [Factors(U, torch.ones(5, dtype=BF16), Vh, bias), second]),
        (x, [Factors(U, s, Vh, None), second]),
        (x, [Factors(U, s, Vh, None, torch.arange(29, dtype=torch.int32)), second]),
        (x, [Factors(U, s, Vh, None, torch.arange(28, dtype=torch.int32)), second]),  # a rank of 4, padded
        (x, [Factors(normal((24, 8), generator, dtype=BF16)[:, :5], s, Vh, bias), second]),
    ]
    planned = [linear.lowrank_linear_grouped(*call) for call in calls]
    assert len(PREPARED) == len(calls)
    for call, ys in zip(calls, planned, strict=True):
        assert all(map(torch.equal, linear.lowrank_linear_grouped(*call), ys))


def test_a_vh_that_is_not_stacked_in_a_later_call_is_read_where_it_lies() -> None:
    generator = seeded()
    x = normal((5, K), generator, dtype=BF16)
    packed = group(generator, packed=True)
    linear.lowrank_linear_grouped(x, packed)
    check(x, [member._replace(Vh=member.Vh.clone()) for member in packed])
    assert len(PREPARED) == 2


@pytest.mark.parametrize("what", ["x", "U", "columns", "s of two dtypes"])
def test_a_call_with_copies_or_an_unaligned_address_is_not_prepared(what: str) -> None:
    generator = seeded()
    members = group(generator, members=2)
    x = normal((5, K), generator, dtype=BF16)
    (U, _, Vh, bias, *_), second = members
    if what == "x":
        x = normal((5 * K + 1,), generator, dtype=BF16)[1:].view(5, K)
    elif what == "U":
        members = [Factors(normal((24 * 5 + 1,), generator, dtype=BF16)[1:].view(24, 5), None, Vh, bias), second]
    elif what == "columns":
        members = [Factors(U.mT.contiguous().mT, None, Vh, bias), second]
    else:
        members = [Factors(U, torch.ones(5), Vh, bias), second._replace(s=torch.ones(17, dtype=BF16))]
    linear.lowrank_linear_grouped(x, members)
    assert not PREPARED


def test_an_unaligned_call_does_not_use_the_pair_of_an_aligned_one() -> None:
    generator = seeded()
    members = group(generator)
    linear.lowrank_linear_grouped(normal((5, K), generator, dtype=BF16), members)
    x = normal((5 * K + 1,), generator, dtype=BF16)[1:].view(5, K)
    key, addresses = describe(x, members, None)
    assert not addresses.aligned
    assert PREPARED[key].replay(x, addresses, None) is None


def test_hooks_of_triton_see_every_launch(compiled: list[Launch]) -> None:
    generator = seeded()
    x, members = normal((5, K), generator, dtype=BF16), group(generator)
    linear.lowrank_linear_grouped(x, members)
    compiled.clear()
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(len)
    try:
        linear.lowrank_linear_grouped(x, members)
    finally:
        hook.remove(len)
    assert len(compiled) == 2


def test_nothing_that_a_call_allocates_or_takes_stays_alive(
    monkeypatch: pytest.MonkeyPatch, compiled: list[Launch]
) -> None:
    generator = seeded()
    allocated: list[weakref.ref[Tensor]] = []
    new_hidden = linear.new_hidden

    def record(*arguments: Any) -> Tensor:
        hidden = new_hidden(*arguments)
        allocated.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(linear, "new_hidden", record)
    monkeypatch.setattr(linear, "choose", lambda *_: replace(PAIR, reduce=True))
    x, members = normal((5, K), generator, dtype=BF16), group(generator, s=True)
    ys = linear.lowrank_linear_grouped(x, members)
    assert PREPARED
    allocated += [
        weakref.ref(tensor) for tensor in (x, *ys, *(part for member in members for part in member if part is not None))
    ]
    (pair,) = PREPARED.values()
    assert all(
        isinstance(value, int | bool | tuple | None) for kernel in (pair.shrink, pair.expand) for value in kernel.rest
    )
    PREPARED.update({key: kept._replace(shrink=None, expand=None) for key, kept in PREPARED.items()})  # the stand-ins
    del x, members, ys, pair
    compiled.clear()
    assert [reference for reference in allocated if reference() is not None] == []


def test_new_configurations_are_used(tmp_path: Path) -> None:
    generator = seeded()
    linear.lowrank_linear_grouped(normal((5, K), generator, dtype=BF16), group(generator, members=1))
    assert PREPARED
    key = LaunchKey.of(5, 72, K, 38, BF16, 3)
    launch_configs.save("lowrank_linear", "any", {key: (PAIR, 1.0)}, tmp_path)
    assert not PREPARED


def test_matrix_products_and_interpreted_launches_are_not_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = seeded()
    x, members = normal((5, K), generator, dtype=BF16), group(generator)
    monkeypatch.setattr(linear, "choose", lambda *_: replace(PAIR, path="gemms"))
    linear.lowrank_linear_grouped(x, members)
    monkeypatch.setattr(linear, "choose", lambda *_: PAIR)
    monkeypatch.setattr(Launch, "run", lambda launch: launch.kernel[launch.grid](**launch.arguments))
    check(x, members)
    assert not PREPARED
