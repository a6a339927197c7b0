from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from grasp_kernels import products
from tests.numerics import relative_error


def tokens(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, width, generator=generator) * torch.logspace(-2, 1, width)).to(dtype)


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PANEL", {"cpu": 16})


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 40])
def test_a_gram_summed_over_calls_is_exactly_symmetric_and_as_precise_as_its_dtype(
    dtype: torch.dtype, width: int
) -> None:
    x = tokens(70, width, dtype)
    gram = torch.zeros(width, width, dtype=torch.promote_types(dtype, torch.float32))
    for rows in (slice(0, 33), slice(33, 33), slice(33, 70)):
        assert products.accumulate_gram_(gram, x[rows]) is gram
    assert products.mirror_(gram) is gram
    assert torch.equal(gram, gram.mT)
    exact = x.double().mT @ x.double()
    assert relative_error(gram, exact) <= (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.usefixtures("small_panels")
def test_elements_below_the_diagonal_blocks_are_neither_computed_nor_kept() -> None:
    x = tokens(50, 40, torch.float32)
    gram = torch.zeros(40, 40)
    below = torch.ones(40, 40, dtype=torch.bool).tril(-1)
    below[:16, :16] = below[16:32, 16:32] = below[32:, 32:] = False
    gram[below] = torch.nan
    products.accumulate_gram_(gram, x)
    assert gram[below].isnan().all()
    assert not gram[~below].isnan().any()
    assert relative_error(products.mirror_(gram), x.double().mT @ x.double()) <= 1e-6


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_projection_has_the_dtype_of_sums(dtype: torch.dtype, weights: torch.dtype) -> None:
    x, weight = tokens(20, 50, dtype), tokens(50, 40, weights)
    wide = torch.promote_types(torch.promote_types(dtype, weights), torch.float32)
    projected = products.project(x, weight, wide)
    assert projected.dtype == wide
    assert relative_error(projected, x.double() @ weight.double()) <= (1e-14 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("shape", [(64, 48, 96), (512, 192, 257)])
def test_bf16_products_are_summed_in_fp32(shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    a, b = tokens(rows, n, torch.bfloat16), tokens(rows + 1, k, torch.bfloat16)[:rows]
    total = torch.zeros(n, k)
    with products.exact_bf16(a, b):
        products.add_product_(total, products.widen(a, total.dtype).mT, products.widen(b, total.dtype))
    assert relative_error(total, a.double().mT @ b.double()) <= 1e-6  # rounded to bf16 once: 2e-3


@pytest.fixture
def precision() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    yield
    settings.fp32_precision = before


@pytest.mark.usefixtures("precision")
def test_only_bf16_tensors_lower_the_precision_of_fp32_matmuls_and_only_inside_the_block() -> None:
    settings = torch.backends.mkldnn.matmul
    settings.fp32_precision = "ieee"
    narrow, wide = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    with products.exact_bf16(narrow, wide):
        assert settings.fp32_precision == "ieee"
    with products.exact_bf16(narrow, narrow):
        assert settings.fp32_precision == "bf16"
    assert settings.fp32_precision == "ieee"
    with pytest.raises(KeyError), products.exact_bf16(narrow):
        raise KeyError
    assert settings.fp32_precision == "ieee"


@pytest.mark.usefixtures("precision")
def test_threads_take_turns_so_the_original_precision_is_restored() -> None:
    settings = torch.backends.mkldnn.matmul
    settings.fp32_precision = "ieee"
    inside, leave, entered_second = threading.Event(), threading.Event(), threading.Event()
    narrow = torch.ones(1, dtype=torch.bfloat16)

    def first() -> None:
        with products.exact_bf16(narrow):
            inside.set()
            leave.wait(10)

    def second() -> None:
        with products.exact_bf16(narrow):
            entered_second.set()

    threads = [threading.Thread(target=each) for each in (first, second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert not entered_second.wait(0.05)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert entered_second.is_set()
    assert settings.fp32_precision == "ieee"
