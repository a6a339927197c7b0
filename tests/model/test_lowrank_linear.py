from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import Conv1D

from grasp.errors import NonFiniteError
from grasp.method.svd import decompose, decompose_in
from grasp.model import input_group
from grasp.model.dense import dense_weight
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear, set_backend_
from grasp_kernels import Factors, lowrank_linear, lowrank_linear_grouped
from tests.lowrank_models import Attention


def conv1d(out_features: int, in_features: int) -> Conv1D:
    module = Conv1D(out_features, in_features)
    nn.init.normal_(module.bias)
    return module


DENSE = {
    "linear": lambda: nn.Linear(24, 16),
    "no bias": lambda: nn.Linear(24, 16, bias=False),
    "conv1d": lambda: conv1d(16, 24),
}


@pytest.mark.parametrize("kind", DENSE)
def test_full_rank_is_the_dense_linear(kind: str) -> None:
    dense = DENSE[kind]().double()
    low_rank = LowRankLinear.from_dense(dense, torch.arange(16))
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(low_rank(x), dense(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_rank.dense_weight(), dense_weight(dense), rtol=0, atol=1e-12)


def test_the_given_groups_are_retained() -> None:
    dense = nn.Linear(24, 16).double()
    U, S, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    retained = [0, 3, 15]
    low_rank = LowRankLinear.from_dense(dense, torch.tensor(retained))
    expected = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in retained)
    torch.testing.assert_close(low_rank.dense_weight(), expected, rtol=0, atol=1e-12)


def test_no_random_numbers_are_drawn_for_given_factors() -> None:
    dense, state = nn.Linear(6, 8), torch.get_rng_state()
    layer = LowRankLinear.from_dense(dense, torch.arange(3))
    LowRankLinear.from_factors(dense, layer.state_dict())
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_singular_values_have_zero_factors(dtype: torch.dtype) -> None:
    dense = nn.Linear(16, 16, bias=False).to(dtype)
    dense.weight.data = torch.diag(torch.tensor([1.0] * 2 + [0.0] * 14)).to(dtype)
    low_rank = LowRankLinear.from_dense(dense, torch.arange(3))
    assert torch.equal(low_rank.dense_weight(), dense.weight)


def test_factors_share_the_singular_values_evenly() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(4))
    S = torch.linalg.svdvals(low_rank.dense_weight())[:4]
    torch.testing.assert_close(low_rank.U.norm(dim=0), S.sqrt())
    torch.testing.assert_close(low_rank.Vh.norm(dim=1), S.sqrt())


@pytest.mark.parametrize("indices", [[], [0, 0], [16], [-1]])
def test_impossible_indices_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"distinct .* 0\.\.15"):
        LowRankLinear.from_dense(nn.Linear(24, 16), torch.tensor(indices, dtype=torch.int64))


@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 16 .* got {rank}"):
        LowRankLinear(24, 16, rank)


def test_non_finite_weights_are_refused_by_name() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = float("nan")
    weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layer\.q has 2 non-finite entries of 12"):
        decompose(weight, "layer.q")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_fp32(dtype: torch.dtype) -> None:
    dense = nn.Linear(24, 16).to(dtype)
    assert decompose(dense.weight).S.dtype == torch.float32
    low_rank = LowRankLinear.from_dense(dense, torch.arange(16))
    assert low_rank.U.dtype == low_rank.Vh.dtype == dtype
    assert low_rank.bias is not None
    assert torch.equal(low_rank.bias, dense.bias)
    error = (low_rank.dense_weight() - dense.weight.float()).norm() / dense.weight.float().norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_autocast_computes_in_its_dtype() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, low_rank.bfloat16()(x.bfloat16()))


def test_moves_copies_and_reloads() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    x = torch.randn(5, 24)
    twin = LowRankLinear(24, 16, 8)
    assert not torch.equal(twin(x), low_rank(x))
    twin.load_state_dict(low_rank.state_dict())
    assert torch.equal(twin(x), low_rank(x))
    assert torch.equal(copy.deepcopy(low_rank)(x), low_rank(x))
    assert set(low_rank.state_dict()) == {"U", "Vh", "bias"}
    assert copy.deepcopy(low_rank).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_random_factors_have_the_variance_of_a_fresh_linear() -> None:
    torch.manual_seed(0)
    weight = LowRankLinear(256, 256, 64).dense_weight()
    assert weight.std().item() == pytest.approx(nn.Linear(256, 256).weight.std().item(), rel=0.1)


def test_trains() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    low_rank(torch.randn(5, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in low_rank.parameters())


def test_repr_has_the_percentage_of_dense_parameters() -> None:
    assert repr(LowRankLinear(32, 32, 4, bias=False)) == (
        "LowRankLinear(in_features=32, out_features=32, rank=4, bias=False, parameters=25.0% of dense)"
    )


def three_linears() -> Attention:
    """Unequal ranks and widths, one of them with a bias."""
    return Attention(LowRankLinear(24, 16, 5), LowRankLinear(24, 8, 3, bias=False), LowRankLinear(24, 8, 7, bias=False))


@pytest.fixture
def grouped_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(x: Tensor, factors: Sequence[Factors], *, backend: str) -> tuple[Tensor, ...]:
        calls.append(len(factors))
        return lowrank_linear_grouped(x, factors, backend=backend)

    monkeypatch.setattr(input_group, "lowrank_linear_grouped", counted)
    return calls


@pytest.fixture
def always_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are used on the CPU too, as on a GPU."""
    monkeypatch.setattr("grasp.model.lowrank_linear._faster_alone", lambda x: False)


def test_linears_that_share_an_input_are_computed_by_one_op(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(2, 3, 24)
    expected, names = attention(x), set(attention.state_dict())
    assert grouped_calls == []
    assert group_linears_(attention) == [("q_proj", "k_proj", "v_proj")]
    assert torch.equal(attention(x), expected)
    assert grouped_calls == [3]
    assert set(attention.state_dict()) == names
    assert attention.q_proj.group._pending == {}


def test_groups_can_be_taken_apart(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    expected = attention(x)
    group_linears_(attention)
    assert group_linears_(attention, enabled=False) == []
    assert torch.equal(attention(x), expected)
    assert grouped_calls == []


def test_a_member_called_with_another_input_or_out_of_order_computes_its_output() -> None:
    attention, x, other = three_linears(), torch.randn(3, 24), torch.randn(3, 24)
    expected = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(x), attention.v_proj(other)]
    group_linears_(attention)
    got = [attention.q_proj(x), attention.k_proj(other), attention.v_proj(x), attention.v_proj(other)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_groups_train_and_see_new_weights() -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    attention(x).square().sum().backward()
    expected = {name: p.grad for name, p in attention.named_parameters()}
    attention.zero_grad()
    group_linears_(attention)
    attention(x).square().sum().backward()
    for name, parameter in attention.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    with torch.no_grad():
        attention.k_proj.U.zero_()
    assert torch.equal(attention(x)[:, 16:24], torch.zeros(3, 8))


def test_a_copy_has_new_groups(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    group_linears_(attention)
    twin = copy.deepcopy(attention)
    assert twin.q_proj.group.members == [twin.q_proj, twin.k_proj, twin.v_proj]
    assert torch.equal(twin(x), attention(x))
    assert grouped_calls == [3, 3]


def test_groups_run_on_the_meta_device() -> None:
    linears = nn.ModuleDict({name: LowRankLinear(16, 8, 3) for name in ("q_proj", "k_proj", "v_proj")}).to("meta")
    assert group_linears_(linears) == [("q_proj", "k_proj", "v_proj")]
    assert linears["q_proj"](torch.empty(2, 16, device="meta")).shape == (2, 8)


def test_groups_are_not_used_on_a_cpu_without_gradients(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(2, 3, 24)
    group_linears_(attention)
    expected = attention(x)
    assert grouped_calls == [3]
    with torch.no_grad():
        assert torch.equal(attention(x), expected)
    with torch.inference_mode():
        assert torch.equal(attention(x), expected)
    assert grouped_calls == [3]


def test_a_parametrized_factor_is_the_one_used() -> None:
    linear, x = LowRankLinear(24, 16, 5, bias=False), torch.randn(3, 24)

    class Doubled(nn.Module):
        def forward(self, U: Tensor) -> Tensor:
            return 2 * U

    with torch.no_grad():
        expected = 2 * linear(x)
        parametrize.register_parametrization(linear, "U", Doubled())
        torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("name", ["U", "Vh", "bias"])
def test_a_pruned_factor_is_the_one_used(name: str) -> None:
    linear, x = LowRankLinear(24, 16, 5), torch.randn(3, 24)
    linear.bias.data.normal_()
    prune.l1_unstructured(linear, name, 0.5)
    expected = linear(x)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
        torch.testing.assert_close(expected, x @ linear.dense_weight().mT + linear.bias)


@pytest.mark.usefixtures("always_grouped")
def test_threads_do_not_share_outputs() -> None:
    attention = three_linears()
    group_linears_(attention)
    inputs = [torch.randn(3, 24) for _ in range(64)]
    expected = [attention(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        got = list(pool.map(attention, inputs * 8))
    assert all(torch.equal(y, expected[i % 64]) for i, y in enumerate(got))


def test_groups_compile_to_one_graph_with_one_op(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    expected = attention(x)
    group_linears_(attention)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert grouped_calls == [3]


def first_then(change: Callable[[Attention, Tensor], None]) -> tuple[Attention, Tensor]:
    attention, x = three_linears(), torch.randn(3, 24)
    group_linears_(attention)
    with torch.no_grad():
        attention.q_proj(x)
        change(attention, x)
    return attention, x


CHANGES: dict[str, Callable[[Attention, Tensor], None]] = {
    "input": lambda _, x: x.mul_(3),
    "weights": lambda attention, _: attention.k_proj.U.mul_(2),
}


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("changed", CHANGES)
def test_an_output_is_computed_again_after_a_change(changed: str) -> None:
    attention, x = first_then(CHANGES[changed])
    with torch.no_grad():
        assert torch.equal(attention.k_proj(x), lowrank_linear(x, *attention.k_proj.factors))


@pytest.mark.usefixtures("always_grouped")
def test_an_output_is_computed_again_in_another_gradient_or_autocast_mode() -> None:
    attention, x = first_then(lambda *_: None)
    assert attention.k_proj(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention.q_proj(x)
    assert attention.k_proj(x).dtype == torch.float32


@pytest.mark.usefixtures("always_grouped")
@pytest.mark.parametrize("changed", ["input", "weights"])
def test_an_output_is_computed_again_if_something_requires_a_gradient_since(changed: str) -> None:
    attention, x = three_linears().requires_grad_(False), torch.randn(3, 24)
    group_linears_(attention)
    assert not attention.q_proj(x).requires_grad
    (x if changed == "input" else attention.k_proj.U).requires_grad_()
    assert attention.k_proj(x).requires_grad


def test_a_replica_computes_its_output() -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    group_linears_(attention)
    replica = copy.copy(attention.k_proj)
    assert torch.equal(replica(x), attention.k_proj(x))


def test_a_member_without_the_others_computes_alone(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(3, 24)
    group_linears_(attention)
    expected = lowrank_linear(x, *attention.q_proj.factors)
    for layer in (copy.deepcopy(attention.q_proj), pickle.loads(pickle.dumps(attention.q_proj))):
        assert torch.equal(layer(x), expected)
    del attention.k_proj
    assert torch.equal(attention.q_proj(x), expected)
    assert grouped_calls == []


def test_fp16_factors_do_not_overflow_where_the_dense_linear_does_not() -> None:
    dense = nn.Linear(64, 4096, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.full((4096, 64), 10.0))
    dense = dense.half()
    x = torch.full((1, 64), 60.0, dtype=torch.float16)
    assert torch.isfinite(dense(x)).all()
    low_rank = LowRankLinear.from_dense(dense, torch.arange(1))
    torch.testing.assert_close(low_rank(x), dense(x), rtol=1e-2, atol=0)


def test_a_member_with_another_backend_computes_alone(grouped_calls: list[int]) -> None:
    attention, x = three_linears(), torch.randn(2, 24)
    group_linears_(attention)
    attention.k_proj.backend = "reference"
    outputs = [attention.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert grouped_calls == []
    assert all(output.requires_grad for output in outputs)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_model_can_be_set_to_one_backend(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    asked: list[str] = []

    def lowrank(x: Tensor, *factors: object, backend: str) -> Tensor:
        asked.append(backend)
        return lowrank_linear(x, *factors, backend=backend)  # type: ignore[arg-type]

    def several(x: Tensor, factors: Sequence[Factors], *, backend: str) -> tuple[Tensor, ...]:
        asked.append(backend)
        return lowrank_linear_grouped(x, factors, backend=backend)

    monkeypatch.setattr(input_group, "lowrank_linear", lowrank)
    monkeypatch.setattr(input_group, "lowrank_linear_grouped", several)
    attention, x = three_linears(), torch.randn(2, 3, 24)
    group_linears_(attention, grouped)
    for backend, calls in (("reference", 1 if grouped else 3), ("auto", 1 if grouped else 3)):
        set_backend_(attention, backend)
        attention(x)
        assert asked == [backend] * calls
        asked.clear()
    with pytest.raises(ValueError, match="unknown backend 'warp'; expected one of auto, cuda"):
        set_backend_(attention, "warp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_and_rows_have_equal_norms_in_every_basis(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 16).to(dtype)
    left, right = (
        torch.rand(16) * 100 + 1,
        torch.rand(24) / 100 + 1e-3,
    )  # for example with small gradients and large inputs
    inputs, outputs = torch.diag(right.square()), torch.diag(left.square())
    svd = decompose_in(linear.weight.detach().float(), inputs, outputs)
    module = LowRankLinear.from_dense(linear, torch.arange(16), svd)
    torch.testing.assert_close(module.dense_weight(), linear.weight.float(), rtol=2e-3, atol=2e-4)
    columns, rows = module.U.detach().float().norm(dim=0), module.Vh.detach().float().norm(dim=1)
    torch.testing.assert_close(rows, torch.ones(16) if dtype == torch.float16 else columns, rtol=2e-3, atol=1e-3)
