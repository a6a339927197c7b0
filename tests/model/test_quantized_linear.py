"""Layers with int8, int4 and fp8 weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Conv1D
from transformers.models.falcon.modeling_falcon import FalconLinear

from grasp.method.storage import FP8, Storage
from grasp.model.kernel_linear import KernelLinear
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedLowRankLinear, quantized_like
from grasp_kernels.quantized import pack_int4
from tests.quantized_models import quantized_model

STORAGES = [Storage(8), Storage(4), Storage(4, 32), FP8]
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)  # outputs are in the tens


def fill_(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in layer.named_parameters():
        if name.endswith("_scales") or name == "bias":
            tensor.data = torch.rand(tensor.shape, generator=generator) / 16
        elif tensor.dtype == torch.uint8:
            depth = layer.counts[name] // len(tensor)
            tensor.data = pack_int4(torch.randint(-8, 8, (len(tensor), depth), generator=generator))
        else:
            tensor.data = torch.randint(-127, 128, tensor.shape, generator=generator).to(tensor.dtype)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_quantised_low_rank_layer_is_its_dequantised_layer(storage: Storage, pivoted: bool) -> None:
    layer = QuantizedLowRankLinear(LowRankLinear(41, 20, 7, pivoted=pivoted), storage)
    fill_(layer)
    x = torch.randn(3, 41)
    close(layer(x), layer.dequantized()(x))
    close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_scales_that_require_gradients_get_those_of_the_dequantised_layer(storage: Storage, low_rank: bool) -> None:
    layer: Any = quantized_like(LowRankLinear(41, 20, 7, pivoted=True) if low_rank else nn.Linear(41, 20), storage)
    fill_(layer)
    scales = [tensor for name, tensor in layer.named_parameters() if name.endswith("_scales")]
    x, weights = torch.randn(3, 41), torch.randn(3, 20)
    expected = []
    for tensor in scales:  # the output is linear in each of them
        tensor.data, before = torch.zeros_like(tensor), tensor.data
        zero = layer(x)
        units = torch.eye(tensor.numel()).view(-1, *tensor.shape)
        outputs = []
        for unit in units:
            tensor.data = unit
            outputs.append(((layer(x) - zero) * weights).sum())
        expected.append(torch.stack(outputs).view(tensor.shape))
        tensor.data = before
    for tensor in scales:
        tensor.requires_grad_(True)
    (layer(x) * weights).sum().backward()
    for tensor, gradient in zip(scales, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-2)
    for tensor, gradient in zip(scales, expected, strict=True):  # each alone
        layer.requires_grad_(False)
        tensor.requires_grad_(True).grad = None
        (layer(x) * weights).sum().backward()
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_an_input_of_another_width_or_dtype_is_refused(storage: Storage, low_rank: bool, rows: int) -> None:
    layer: Any = quantized_like(LowRankLinear(40, 20, 7) if low_rank else nn.Linear(40, 20), storage)
    for width in (30, 39, 41):
        with pytest.raises(ValueError, match=rf"x must be \(\.\.\., 40\), got \({rows}, {width}\)"):
            layer(torch.ones(rows, width))
    with pytest.raises(ValueError, match=r"x must have the dtype of \w+_scales, torch.float32, got torch.bfloat16"):
        layer(torch.ones(rows, 40, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(rows, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_an_exported_layer_takes_any_number_of_rows(storage: Storage) -> None:
    layer = QuantizedLinear(nn.Linear(41, 20), storage)
    fill_(layer)
    program = torch.export.export(layer, (torch.ones(5, 41),), dynamic_shapes=({0: torch.export.Dim("M", max=1024)},))
    for rows in (1, 128, 300):
        x = torch.randn(rows, 41)
        close(program.module()(x), layer(x))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_quantised_linear_is_a_linear_with_the_dequantised_weight(storage: Storage, rows: int) -> None:
    layer = QuantizedLinear(nn.Linear(41, 20), storage)
    fill_(layer)
    x = torch.randn(rows, 41)
    close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_a_quantised_embedding_gives_scaled_rows(storage: Storage) -> None:
    layer = QuantizedEmbedding(nn.Embedding(10, 41), storage)
    fill_(layer)
    ids = torch.tensor([[3, 0], [9, 3]])
    torch.testing.assert_close(layer(ids), layer.dense_weight()[ids])
    assert layer(ids.to(torch.int32)[:0]).shape == (0, 2, 41)


@pytest.mark.parametrize("storage", [Storage(8), FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_the_values(dtype: torch.dtype, storage: Storage) -> None:
    layer = QuantizedLinear(nn.Linear(8, 4), storage)
    fill_(layer)
    values: Tensor = layer.weight.clone()
    y = layer.to(dtype)(torch.ones(2, 8, dtype=dtype))
    assert y.dtype == dtype
    replaced = QuantizedLinear(nn.Linear(8, 4), storage)
    for name, parameter in layer.named_parameters():
        replaced.get_parameter(name).data = parameter.data  # whose buffers are as they were
    torch.testing.assert_close(replaced(torch.ones(2, 8, dtype=dtype)), y, rtol=0, atol=0)
    assert layer.weight.dtype == values.dtype
    assert torch.equal(layer.weight.float(), values.float())


def test_a_quantised_model_compiles_to_one_graph() -> None:
    model, tokens = quantized_model().eval(), torch.arange(9)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens).logits, expected)


class Router(nn.Linear):
    """Returns more than the product."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_subclasses_of_linears_that_return_more_are_left_as_they_are() -> None:
    assert quantized_like(Router(8, 4), Storage(8)) is None
    assert quantized_like(nn.MultiheadAttention(8, 2).out_proj, Storage(8)) is None  # whose weight alone is read
    kernel, same = nn.Linear(8, 4), type("Same", (nn.Linear,), {})(8, 4)
    KernelLinear.convert_(kernel)
    for linear in (kernel, same, FalconLinear(8, 4), Conv1D(4, 8)):
        assert isinstance(quantized_like(linear, Storage(8)), QuantizedLinear)
