"""Dense quantised parts in kernels of vLLM. The platform is said to be no CPU, whose kernels are our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grasp.method.storage import FP8, Storage
from grasp_kernels.quantized import pack_int4
from tests.serving.linears import stored, weight

pytest.importorskip("vllm")

from vllm.model_executor.kernels.linear import (
    CPUWNA16LinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.parameter import permute_param_layout_
from vllm.scalar_type import ScalarType, scalar_types

from grasp.serving.vllm_dense import choose_kernel, packed
from tests.vllm.layers import WIDTHS, linear, load, method_for

COLUMNS = 64


class Unpacking(MPLinearKernel):
    """A kernel that unpacks the weight in each call. It lays its parameters out as Marlin and Machete do."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        self._transform_param(layer, self.w_q_name, lambda p: permute_param_layout_(p, 0, 1, packed_dim=0))
        self._transform_param(layer, self.w_s_name, lambda p: permute_param_layout_(p, 0, 1))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, scales, _ = self._get_weight_params(layer)
        kind, (columns, rows) = self.config.weight_type, self.config.partition_weight_shape
        whole = unpack_quantized_values_into_int32(values, kind, 0) - kind.bias
        group = columns if self.config.group_size == -1 else self.config.group_size
        assert whole.shape == (columns, rows)
        assert scales.shape == (columns // group, rows)
        return x @ (whole.to(x.dtype) * scales.repeat_interleave(group, dim=0))


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without vLLM's groups of processes, whose platform is called no CPU."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: False)
    monkeypatch.setattr("grasp.serving.vllm.current_platform", platform)  # vLLM itself is still on a CPU


@pytest.fixture
def _unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp.serving.vllm_dense.choose_mp_linear_kernel", lambda config: Unpacking)


def merged(storages: dict[str, Storage], ranks: dict[str, int]) -> tuple[LinearBase, Any]:
    """A linear of q, k and v, without weights, and its method."""
    layer = linear(QKVParallelLinear)
    config: list[Any] = [{f"m.{part}_proj": own for part, own in fields.items()} for fields in (ranks, storages)]
    outputs = list(WIDTHS.values())
    return layer, method_for(layer, "m.qkv_proj", config[0], COLUMNS, outputs, (), config[1], torch.bfloat16)


def fill(layer: LinearBase, storages: dict[str, Storage], ranks: dict[str, int]) -> Tensor:
    """Load random tensors. Returns their weight in fp32."""
    weights = []
    for part, storage in storages.items():
        own = stored(WIDTHS[part], COLUMNS, ranks.get(part, 0), storage=storage)
        own = {name: t.bfloat16() if t.is_floating_point() else t for name, t in own.items()}
        weights.append(weight({name: t.float() if t.is_floating_point() else t for name, t in own.items()}, COLUMNS))
        for name, tensor in own.items():
            load(layer, name, tensor, part)
    return torch.cat(weights)


def assert_computes(layer: LinearBase, method: Any, expected: Tensor) -> None:
    bias = torch.randn(len(expected))
    for rows in (1, 100):
        x = torch.randn(rows, COLUMNS).bfloat16()
        y = method.apply(layer, x, bias.bfloat16()).float()
        torch.testing.assert_close(y, F.linear(x.float(), expected, bias), rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(("values", "kind"), [((-128, 128), scalar_types.uint8b128), ((-8, 8), scalar_types.uint4b8)])
def test_packed_integers_are_those_that_vllm_unpacks(values: tuple[int, int], kind: ScalarType) -> None:
    integers = torch.randint(*values, (6, COLUMNS), dtype=torch.int8)
    unpacked = unpack_quantized_values_into_int32(
        packed(pack_int4(integers) if kind.size_bits == 4 else integers), kind, 1
    )
    assert torch.equal(unpacked - kind.bias, integers.int())


MERGED = {
    "one storage": ({"q": Storage(8), "k": Storage(8), "v": Storage(8)}, {}, [3]),
    "groups": ({"q": Storage(4, 32), "k": Storage(4, 32), "v": Storage(4, 32)}, {}, [3]),
    "several": ({"q": Storage(4), "k": Storage(8), "v": Storage(8)}, {}, [1, 2]),
    "a low-rank part between": ({"q": Storage(8), "k": Storage(4, 32), "v": Storage(8)}, {"k": 5}, [1, 1, 1]),
}


@pytest.mark.usefixtures("_unpacking")
@pytest.mark.parametrize("case", MERGED)
def test_neighbours_of_one_storage_are_one_kernel_and_the_layer_keeps_no_copy(case: str) -> None:
    storages, ranks, sizes = MERGED[case]
    layer, method = merged(storages, ranks)
    expected = fill(layer, storages, ranks)
    method.process_weights_after_loading(layer)
    assert [len(method.parts[run.parts]) for run in method.runs] == sizes
    assert layer.weight.numel() == layer.weight_scales.numel() == 0
    assert_computes(layer, method, expected)


@pytest.mark.usefixtures("_unpacking")
def test_weights_that_vllm_loads_again_are_in_the_memory_of_the_first() -> None:
    """CUDA graphs read them there."""
    storages = {"q": Storage(8), "k": Storage(4), "v": Storage(4)}
    layer, method = merged(storages, {})
    layer.quant_method = method
    record_metadata_for_reloading(layer)
    fill(layer, storages, {})
    method.process_weights_after_loading(layer)
    addresses = [run.kernel.linear.weight_packed.data_ptr() for run in method.runs]
    initialize_layerwise_reload(layer)
    expected = fill(layer, storages, {})
    finalize_layerwise_reload(layer, None)
    assert layer.weight.numel() == 0
    assert [run.kernel.linear.weight_packed.data_ptr() for run in method.runs] == addresses
    assert_computes(layer, method, expected)


def test_the_kernel_that_vllm_has_on_this_cpu_computes_the_columns_of_each_process() -> None:
    """Two processes share the 192 columns of a row-parallel linear, and each cuts groups of 64."""
    own, x = stored(32, 192, storage=Storage(4, 64)), torch.randn(7, 192).bfloat16()
    own["weight_scales"] = own["weight_scales"].bfloat16()
    outputs = []
    for process, columns in enumerate(x.chunk(2, dim=1)):
        layer = linear(RowParallelLinear, process, 2)
        method = method_for(layer, "m.o_proj", {}, 96, [32], (), {"m.o_proj": Storage(4, 64)}, torch.bfloat16)
        for name, tensor in own.items():
            load(layer, name, tensor)
        method.process_weights_after_loading(layer)
        (run,) = method.runs
        assert isinstance(run.kernel.kernel, CPUWNA16LinearKernel)
        outputs.append(torch.compile(method.apply, backend="eager", fullgraph=True, dynamic=True)(layer, columns))
    expected = x.float() @ weight({**own, "weight_scales": own["weight_scales"].float()}, 192).mT
    torch.testing.assert_close(sum(outputs).float(), expected, rtol=2e-2, atol=0.2)


def test_a_linear_for_which_vllm_has_no_kernel_keeps_its_weight_and_is_dequantised() -> None:
    """On a CPU vLLM has none for 8 bits."""
    storages = {"q": Storage(4), "k": Storage(4), "v": Storage(8)}
    layer, method = merged(storages, {})
    expected = fill(layer, storages, {})
    method.process_weights_after_loading(layer)
    assert [run.kernel for run in method.runs] == [None]
    assert layer.weight.numel() > 0
    assert_computes(layer, method, expected)


@pytest.mark.usefixtures("_unpacking")
@pytest.mark.parametrize(
    ("storage", "columns", "dtype"),
    [
        (FP8, 64, torch.bfloat16),
        (Storage(8), 64, torch.float32),
        (Storage(4, 64), 96, torch.bfloat16),
        (Storage(8), 66, torch.float16),
    ],
)
def test_kernels_of_vllm_are_not_asked_for_what_some_of_them_do_not_check(
    storage: Storage, columns: int, dtype: torch.dtype
) -> None:
    assert choose_kernel(storage, 32, columns, dtype) is None
    assert choose_kernel(Storage(storage.bits, storage.group), 32, 128, torch.bfloat16) is not None
