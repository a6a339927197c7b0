from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.method import blocks
from grasp.method import svd as module
from grasp.method.ranks import break_even_rank
from grasp.method.svd import DAMPING, SVD, Projected, decompose_in, decomposition_bytes, decomposition_flops
from tests.method.resources import matmul_flops, peaks_of

N, K, T = 12, 9, 200


def tokens(width: int, count: int = T, seed: int = 0) -> Tensor:
    """Correlated tokens of very different scales, (count, width) fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 1, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ mixing


def second_moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def cut(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> Tensor:
    U, S, Vh = svd
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def root(covariance: Tensor) -> Tensor:
    """A matrix C½ with C½ C½ᵀ = C, damped."""
    damped = covariance.double() + DAMPING * covariance.double().diagonal().mean() * torch.eye(
        len(covariance), dtype=torch.float64
    )
    return torch.linalg.cholesky(damped)


@pytest.mark.parametrize("shape", [(N, K), (K, N)])
def test_a_covariance_that_rounding_made_indefinite_counts_its_negative_eigenvalues_as_0(shape: tuple) -> None:
    size = min(shape)
    vectors, _ = torch.linalg.qr(tokens(size, size))
    values = torch.linspace(0, 8, size, dtype=torch.float64)
    values[0] = -0.1  # far below the damping
    covariance = vectors * values @ vectors.mT
    floor = DAMPING * covariance.diagonal().mean()
    W = torch.eye(*shape, dtype=torch.float64)
    svd = decompose_in(W, covariance, None) if size == shape[1] else decompose_in(W, None, covariance)
    torch.testing.assert_close(svd.S.square(), values.clamp_min(0).add(floor).flip(0))
    torch.testing.assert_close(cut(svd, size), W)


@pytest.mark.parametrize("shape", [(N, K), (K, N), (1, K), (K, 1)])
def test_groups_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one = torch.eye(shape[1], dtype=torch.float64) / (1 + DAMPING)
    U, S, Vh = decompose_in(W, one, None)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))
    for factor in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(factor, torch.eye(len(S), dtype=torch.float64))


def test_groups_of_a_matrix_without_full_rank_are_finite_and_give_it_back() -> None:
    W = weight()
    W[:, 3] = W[:, 4]
    W[5] = 0
    for matrix in (W, W.mT, torch.zeros(3, 4, dtype=torch.float64)):
        one = torch.eye(matrix.shape[1], dtype=torch.float64)
        svd = decompose_in(matrix, one, None)
        assert all(torch.isfinite(factor).all() for factor in svd)
        torch.testing.assert_close(cut(svd, len(svd.S)), matrix, rtol=0, atol=1e-7)


def test_all_groups_give_the_weight_back_in_every_basis() -> None:
    W, A, B = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))
    for inputs, outputs in [(None, None), (A, None), (None, B), (A, B)]:
        torch.testing.assert_close(cut(decompose_in(W, inputs, outputs), K), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_whitened_cut_changes_the_outputs_least(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DAMPING", 1e-12)
    W, x = weight(), tokens(K)
    got = cut(decompose_in(W, second_moment(x), None), rank)
    outputs = x @ W.mT
    _, _, directions = torch.linalg.svd(outputs, full_matrices=False)  # Eckart-Young, on the outputs themselves
    best = outputs @ directions[:rank].mT @ directions[:rank]
    assert (x @ got.mT - outputs).norm() == pytest.approx((best - outputs).norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_kfac_cut_is_optimal_and_its_dropped_values_say_what_it_costs(rank: int) -> None:
    W, A, B = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))
    svd = decompose_in(W, A, B)

    def cost(approximation: Tensor) -> float:
        return (root(B).mT @ (W - approximation) @ root(A)).norm().item()

    best = cost(cut(svd, rank))
    assert best == pytest.approx(svd.S[rank:].norm().item(), rel=1e-8)  # 3e-9 on one CPU
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            left, right = svd.U[:, :rank] * svd.S[:rank], svd.Vh[:rank]
            left = left + scale * left.std() * torch.randn(left.shape, generator=generator, dtype=left.dtype)
            right = right + scale * right.std() * torch.randn(right.shape, generator=generator, dtype=right.dtype)
            assert cost(left @ right) > best
    assert best <= cost(cut(decompose_in(W, A, None), rank))
    assert best <= cost(cut(decompose_in(W, None, None), rank))


def test_fewer_tokens_than_features_and_dead_features_are_damped_not_amplified() -> None:
    x = tokens(K, count=3)
    x[:, 0] = 0
    W = weight().float()
    svd = decompose_in(W, second_moment(x).float(), None)
    assert all(torch.isfinite(factor).all() for factor in svd)
    torch.testing.assert_close(cut(svd, K), W, rtol=0, atol=1e-3)
    error = x.float() @ (cut(svd, 3) - W).mT  # three tokens: three groups reproduce their outputs
    assert error.norm() <= 0.02 * (x.float() @ W.mT).norm()


def test_fp32_covariances_of_a_wide_range_agree_with_fp64() -> None:
    W, A = weight(), second_moment(tokens(K))
    exact, single = (cut(decompose_in(W.to(dtype), A.to(dtype), None), 4) for dtype in (torch.float64, torch.float32))
    assert single.dtype == torch.float32
    x = tokens(K, seed=9)
    assert (x @ (single.double() - exact).mT).norm() <= 1e-3 * (x @ (W - exact).mT).norm()


def test_the_first_groups_are_those_of_all_groups() -> None:
    W, A, B = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))
    for inputs, outputs in [(None, None), (A, None), (None, B), (A, B)]:
        for matrix, right, left in [(W, inputs, outputs), (W.mT, outputs, inputs)]:
            U, S, Vh = decompose_in(matrix, right, left)
            first = decompose_in(matrix, right, left, rank=4)
            torch.testing.assert_close(first, SVD(U[:, :4], S, Vh[:4]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens_seen", [10, 100_000_000])
def test_covariances_are_shrunk_to_their_mean_eigenvalue_the_fewer_tokens_the_more(tokens_seen: int) -> None:
    W, A, B = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))

    def shrunk(covariance: Tensor | None) -> Tensor | None:
        if covariance is None:
            return None
        share = len(covariance) / (tokens_seen + len(covariance))
        return (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(len(covariance)).double()

    for inputs, outputs in [(A, None), (None, B), (A, B)]:
        sums = [None if mean is None else tokens_seen * mean for mean in (inputs, outputs)]
        got = decompose_in(W, *sums, tokens=tokens_seen)
        torch.testing.assert_close(got, decompose_in(W, shrunk(inputs), shrunk(outputs)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tokens_seen", [None, 10])
@pytest.mark.parametrize("inputs", [None, second_moment(tokens(K))])
def test_a_projected_covariance_has_all_that_a_decomposition_reads(
    inputs: Tensor | None, tokens_seen: int | None
) -> None:
    W, B = weight(), second_moment(tokens(N, seed=1))
    projected = Projected(W.mT @ B @ W, B.diagonal())
    expected = decompose_in(W, inputs, B, tokens=tokens_seen)
    torch.testing.assert_close(decompose_in(W, inputs, projected, tokens=tokens_seen), expected)


def test_a_projected_covariance_of_nothing_and_one_that_is_not_finite_are_refused() -> None:
    W, gram, squares = weight(), torch.zeros(K, K), torch.zeros(N)
    with pytest.raises(ValueError, match="a covariance of weight is 0"):
        decompose_in(W, None, Projected(gram, squares))
    with pytest.raises(NonFiniteError, match="a covariance of the weight has NaN or infinite entries"):
        decompose_in(W, None, Projected(gram.fill_(torch.inf), squares + 1), "the weight")


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W, A, B = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))
    whole = [decompose_in(W, A, B), decompose_in(W.mT, B, A)]
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 5)
    torch.testing.assert_close([decompose_in(W, A, B), decompose_in(W.mT, B, A)], whole)


def test_arguments_are_left_as_they_are() -> None:
    arguments = weight(), second_moment(tokens(K)), second_moment(tokens(N, seed=1))
    copies = [argument.clone() for argument in arguments]
    decompose_in(*arguments)
    assert all(map(torch.equal, arguments, copies))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shape", [(N, K), (K, N)])
def test_a_covariance_of_nothing_and_one_that_is_not_finite_are_refused(shape: tuple[int, int], side: int) -> None:
    W = torch.ones(shape)
    covariances = [torch.eye(shape[1]), torch.eye(shape[0])]
    covariances[side] = torch.zeros_like(covariances[side])
    with pytest.raises(ValueError, match="a covariance of weight is 0"):
        decompose_in(W, *covariances)
    covariances[side][2, 1] = covariances[side][1, 2] = float("nan")
    covariances[side].diagonal().fill_(1)
    with pytest.raises(NonFiniteError, match="a covariance of the weight has NaN or infinite entries"):
        decompose_in(W, *covariances, "the weight")
    W[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="the weight has 1 non-finite entries of 108"):
        decompose_in(W, *covariances, "the weight")


@pytest.mark.parametrize("shape", [(240, 160), (160, 240)])
@pytest.mark.parametrize(("inputs", "outputs"), [(True, False), (False, True), (True, True)])
def test_flops_are_those_of_the_matrix_products(
    shape: tuple[int, int], inputs: bool, outputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 8)
    (n, k), d, rank = shape, 160, 90
    covariances = [torch.eye(k) if inputs else None, torch.eye(n) if outputs else None]
    W = torch.randn(n, k)
    counted = matmul_flops(lambda: decompose_in(W, *covariances, rank=rank))
    small = inputs if n >= k else outputs
    other = 14 * d**3 // 3 + (d**3 // 3 + d**2 * rank if small else 0)  # PyTorch does not count solvers
    expected = decomposition_flops(shape, inputs=inputs, outputs=outputs, rank=rank)
    assert counted + other == pytest.approx(expected, rel=0.05)
    if n >= k and outputs:
        projected = Projected(torch.eye(k), torch.ones(n))
        counted = matmul_flops(lambda: decompose_in(W, covariances[0], projected, rank=rank))
        expected = decomposition_flops(shape, inputs=inputs, outputs=True, projected=True, rank=rank)
        assert counted + other == pytest.approx(expected, rel=0.05)


def test_the_peaks_are_the_estimates() -> None:
    square, tall, wide, long = (800, 800), (1200, 600), (600, 1200), (4800, 600)
    shapes = {"both": [tall, wide], "inputs": [square], "outputs": [tall], "none": [tall], "projected": [long]}
    cases = [(which, shape, break_even_rank(shape, "factored")) for which in shapes for shape in shapes[which]]
    for (which, shape, rank), measured in zip(cases, peaks_of(cases), strict=True):
        given = {name: which in ("both", "projected", name) for name in ("inputs", "outputs")}
        given["projected"] = which == "projected"
        assert measured == pytest.approx(decomposition_bytes(shape, **given, rank=rank), rel=0.1)


def hard_problem(n: int, k: int, count: int, massive: float) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B in fp32: few tokens, spectra over four decades, and a massive direction that W does not use."""
    generator = torch.Generator().manual_seed(0)

    def tokens_of(width: int) -> tuple[Tensor, Tensor]:
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        rows = torch.randn(count, width, generator=generator) * torch.logspace(0, -4, width) @ basis
        return rows + massive * torch.randn(count, 1, generator=generator) * direction, direction

    (x, right), (d, left), W = tokens_of(k), tokens_of(n), torch.randn(n, k, generator=generator)
    W = W - torch.outer(left, left @ W)
    return W - torch.outer(W @ right, right), x.mT @ x, d.mT @ d


@pytest.mark.parametrize(("count", "massive"), [(400, 1e3), (40, 1e3), (400, 1e5)])
@pytest.mark.parametrize("shape", [(140, 100), (100, 140)])
def test_losses_of_a_hard_weight_are_those_of_fp64(shape: tuple[int, int], count: int, massive: float) -> None:
    """A product with the larger covariance in fp32 changes the predicted losses by 5e-3, and the real ones by 5e-2."""
    W, A, B = hard_problem(*shape, count, massive)
    scaled = root(B).mT @ W.double() @ root(A)
    U, S, Vh = (factor.double() for factor in decompose_in(W, A, B))
    exact = torch.linalg.svdvals(scaled)
    for rank in (30, 60, 90):
        lost = exact[rank:].square().sum().item()
        assert S[rank:].square().sum().item() == pytest.approx(lost, rel=1e-5)
        error = root(B).mT @ (W - (U[:, :rank] * S[:rank]) @ Vh[:rank]) @ root(A)
        assert error.square().sum().item() == pytest.approx(lost, rel=1e-5)
