from __future__ import annotations

import pytest
import torch
from torch import nn

from grasp.errors import UnsupportedModelError
from grasp.model import kernel_linear
from grasp.model.kernel_linear import KernelLinear, use_kernel_
from grasp_kernels.dispatch import CPU_ROWS, backend_missing
from tests.numerics import assert_accurate
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(backend_missing("cpu") is not None, reason="the CPU kernels are not built")


def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    run = kernel_linear.lowrank_linear
    monkeypatch.setattr(kernel_linear, "lowrank_linear", lambda x, *args: calls.append(len(x)) or run(x, *args))
    return calls


@pytest.mark.parametrize("dtype", list(CPU_ROWS), ids=str)
def test_few_rows_take_the_kernel_and_are_as_accurate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, limit = kernel_calls(monkeypatch), CPU_ROWS[dtype]
    linear = nn.Linear(130, 70, dtype=dtype)
    x = torch.randn(limit + 1, 130, dtype=dtype)
    expected = [linear(x[:rows]) for rows in (1, limit, limit + 1)]
    assert use_kernel_(linear) == 1
    with torch.inference_mode():
        for rows, y in zip((1, limit, limit + 1), expected, strict=True):
            exact = nn.functional.linear(x[:rows].double(), linear.weight.double(), linear.bias.double())
            assert_accurate("linear", dtype, linear(x[:rows]), y.detach(), exact.detach())
    assert calls == [1, limit]


def test_gradients_take_pytorchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = kernel_calls(monkeypatch)
    use_kernel_(linear := nn.Linear(8, 4))
    linear(torch.ones(1, 8)).sum().backward()
    assert linear.weight.grad is not None
    assert calls == []


def test_a_model_keeps_its_parameters_and_compiles() -> None:
    model = tiny_model("gemma3").eval()  # tied embeddings
    tokens = torch.arange(1, 5)[None]
    state = model.state_dict()
    with torch.inference_mode():
        expected = model(tokens).logits
    count = use_kernel_(model)
    assert count == sum(isinstance(module, KernelLinear) for module in model.modules()) > 7
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens).logits, expected)


def test_a_weight_may_be_replaced_by_one_of_another_dtype_or_size() -> None:
    use_kernel_(linear := nn.Linear(8, 4))
    with torch.no_grad():
        linear.weight.data, linear.bias.data = linear.weight.bfloat16(), linear.bias.bfloat16()
        x = torch.randn(1, 8, dtype=torch.bfloat16)
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        linear.weight, linear.bias = nn.Parameter(torch.randn(6, 8)), None
        torch.testing.assert_close(linear(x.float()), nn.functional.linear(x.float(), linear.weight))


def test_an_exported_linear_takes_any_number_of_rows() -> None:
    use_kernel_(linear := nn.Linear(8, 4))
    with torch.no_grad():
        dynamic_shapes = {"x": {0: torch.export.Dim("M", max=4096)}}
        program = torch.export.export(linear, (torch.ones(3, 8),), dynamic_shapes=dynamic_shapes)
        for rows in (1, 2048):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(program.module()(x), linear(x))


def test_a_model_without_linears_on_the_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no nn\.Linear on the CPU"):
        use_kernel_(nn.Linear(2, 2, device="meta"))
