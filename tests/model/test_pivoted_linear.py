from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from grasp.method.storage import Storage
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedLowRankLinear
from grasp_kernels import lowrank_linear_grouped
from grasp_kernels.packing import widened
from tests.lowrank_models import Attention

SHAPES = [(24, 16, 5), (16, 24, 15), (24, 16, 1), (16, 16, 15), (9, 7, 6)]  # K, N, R


def low_rank(k: int = 24, n: int = 16, rank: int = 5, bias: bool = True) -> LowRankLinear:
    torch.manual_seed(k + n + rank)
    layer = LowRankLinear(k, n, rank, bias=bias, dtype=torch.float64)
    return layer if layer.bias is None else layer.requires_grad_(True)


def ascends(order: Tensor, rank: int) -> bool:
    """Whether an order has each row once: the first ones ascending, then the others."""
    pivots, others = order.tolist()[:rank], order.tolist()[rank:]
    return [sorted(pivots), sorted(others)] == [pivots, others] and sorted(pivots + others) == list(range(len(order)))


@pytest.mark.parametrize(("k", "n", "rank"), SHAPES)
def test_pivoting_keeps_the_output_and_saves_the_square_of_the_rank(k: int, n: int, rank: int) -> None:
    layer = low_rank(k, n, rank)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x, before = torch.randn(2, 3, k, dtype=torch.float64), sum(p.numel() for p in layer.parameters())
    expected, weight = layer(x), layer.dense_weight()
    assert layer.pivot_() is None
    assert layer.U.shape == (n - rank, rank)
    assert sum(p.numel() for p in layer.parameters()) == before - rank**2
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-12)
    assert layer.order is not None
    pivots = layer.order[:rank].tolist()
    assert ascends(layer.order, rank)
    assert torch.equal(layer.Vh, layer.dense_weight()[pivots])
    table = layer.order
    assert layer.pivot_() is None
    assert layer.order is table
    layer.factor_()
    assert layer.order is None
    assert layer.U.shape == (n, rank)
    assert torch.equal(layer.U[pivots], torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_layer_of_all_its_rows_is_not_pivoted() -> None:
    layer = low_rank(24, 16, 16)
    assert layer.pivot_() == "its rank is the number of its outputs, 16"
    assert layer.order is None
    with pytest.raises(ValueError, match="between 1 and 15 for a pivoted linear of 24 inputs and 16 outputs, got 16"):
        LowRankLinear(24, 16, 16, pivoted=True)


def test_a_layer_whose_rounding_errors_would_grow_is_not_pivoted() -> None:
    layer = low_rank(64, 400, 2, bias=False)
    with torch.no_grad():  # all rows but the pivots are differences of large ones
        layer.Vh.copy_(torch.cat([torch.ones(1, 64), torch.ones(1, 64) + 1e-6 * torch.randn(1, 64)]))
        layer.U.copy_(torch.tensor([1.0, -1.0]).expand(400, 2))
        layer.U[:2] = torch.eye(2)
    weight = layer.dense_weight()
    reason = layer.pivot_()
    assert reason is not None
    assert "rounding errors would grow 28.2-fold; the limit is 16" in reason
    assert layer.order is None
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-9)
    with torch.no_grad():  # fp32 has no such weight
        layer.Vh.fill_(1e30)
        layer.U.mul_(1e30)
    assert "rounding errors would grow nan-fold" in (layer.float().pivot_() or "")


def test_a_random_pivoted_layer_is_one_of_random_rows() -> None:
    layer = LowRankLinear(256, 256, 64, pivoted=True)
    assert layer.order is not None
    assert ascends(layer.order, 64)
    weight = layer.dense_weight()
    assert weight.std().item() == pytest.approx(nn.Linear(256, 256).weight.std().item(), rel=0.1)


def test_moves_copies_and_reloads() -> None:
    layer = low_rank()
    layer.pivot_()
    x = torch.randn(4, 24, dtype=torch.float64)
    assert set(layer.state_dict()) == {"U", "Vh", "bias", "order"}
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    twin = LowRankLinear(24, 16, 5, pivoted=True, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    rebuilt = LowRankLinear.from_factors(nn.Linear(24, 16, dtype=torch.float64), layer.state_dict())
    assert torch.equal(rebuilt(x), layer(x))
    halved = copy.deepcopy(layer).to(torch.bfloat16)
    assert halved.order is not None
    assert halved.order.dtype == torch.int32
    assert halved(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.index_fill_(0, torch.tensor([0]), 99),
        lambda table: table.index_fill_(0, torch.tensor([0]), -1),
        lambda table: table.copy_(table.flip(0)),
        lambda table: table.index_fill_(0, torch.tensor([1]), int(table[0])),
        lambda table: table.copy_(table.roll(1)),
        lambda table: table.zero_(),
    ],
    ids=["too high", "negative", "descending", "twice", "rolled", "zeros"],
)
def test_a_table_that_is_no_order_is_refused_and_not_loaded(edit, quantised: bool) -> None:  # type: ignore[no-untyped-def]
    layer: LowRankLinear | QuantizedLowRankLinear = low_rank()
    assert isinstance(layer, LowRankLinear)
    layer.pivot_()
    if quantised:
        layer = QuantizedLowRankLinear(layer, Storage(8))
    model, state = nn.ModuleDict({"q_proj": layer}), copy.deepcopy(layer.state_dict())
    edit(state["order"])
    with pytest.raises(RuntimeError, match=r"q_proj\.order is not the order of pivoted factors: 5 distinct rows"):
        model.load_state_dict({f"q_proj.{name}": tensor for name, tensor in state.items()})
    assert layer.order is not None
    assert ascends(layer.order, 5)


def test_factors_with_a_table_that_is_no_order_are_refused() -> None:
    layer, factors = low_rank(), low_rank()
    layer.pivot_()
    assert layer.order is not None
    twice = layer.order.clone()
    twice[1] = twice[0]
    for order in (twice, layer.order - 1, layer.order.long(), layer.order[1:]):
        with pytest.raises(ValueError, match=r"order is not the order of pivoted factors: 5 distinct rows of 0\.\.15"):
            factors.set_factors_(layer.U.detach(), layer.Vh.detach(), order)
    assert (factors.form, factors.U.shape) == ("factored", (16, 5))


def test_gradients_are_those_of_the_weight() -> None:
    layer, x = low_rank(), torch.randn(4, 24, dtype=torch.float64)
    layer.pivot_()
    layer(x).square().sum().backward()
    plain = copy.deepcopy(layer)
    plain.factor_()
    plain.zero_grad()
    plain(x).square().sum().backward()
    assert layer.order is not None
    others = layer.order[5:].long()
    torch.testing.assert_close(layer.U.grad, plain.U.grad[others])  # type: ignore[index]
    torch.testing.assert_close(layer.Vh.grad, plain.Vh.grad)
    assert layer.bias is not None
    assert plain.bias is not None
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def with_a_pivoted_linear() -> Attention:
    """A pivoted linear between two others."""
    model = Attention(low_rank(24, 16, 5), low_rank(24, 8, 3, False), low_rank(24, 8, 7))
    model.k_proj.pivot_()
    return model


def test_a_group_may_have_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[bool]] = []

    def counted(x, factors, *, backend):  # type: ignore[no-untyped-def]
        calls.append([group.order is not None for group in factors])
        return lowrank_linear_grouped(x, factors, backend=backend)

    model, x = with_a_pivoted_linear(), torch.randn(3, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    monkeypatch.setattr("grasp.model.input_group.lowrank_linear_grouped", counted)
    assert group_linears_(model) == [("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert calls == [[False, True, False]]


def test_factors_of_a_pivoted_layer_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp.model.input_group._gains_by_packing", lambda factor: True)
    model, x = with_a_pivoted_linear(), torch.randn(3, 24, dtype=torch.float64)
    expected = model(x)
    group_linears_(model)
    model.eval()
    assert model.k_proj.U.stride() == (16, 1)
    wide = widened(model.k_proj.factors, pivoted=True)
    assert (wide.U.shape, wide.Vh.shape, wide.pivots, wide.out_features) == ((5, 16), (16, 24), 3, 8)
    assert widened(model.k_proj.factors).U.shape == (5, 3)  # for other backends
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.eval().train()(x), expected, rtol=0, atol=1e-12)


def test_a_pivoted_layer_compiles_to_one_graph() -> None:
    layer, x = low_rank(), torch.randn(4, 24, dtype=torch.float64)
    layer.pivot_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)


def test_repr_has_the_form() -> None:
    layer = LowRankLinear(32, 32, 4, bias=False, pivoted=True)
    assert repr(layer) == (
        "LowRankLinear(in_features=32, out_features=32, rank=4, bias=False, pivoted, parameters=23.4% of dense)"
    )
