from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from grasp.bench import costs
from grasp.bench.costs import costs_for, linear_shapes, measure_costs, measured_ranks
from grasp.config import GraspConfig
from grasp.errors import CostTableError, ResultsError
from grasp.evaluation.generation import GenerationTime
from grasp.method import channels
from grasp.method.cost_table import CostTable
from grasp.method.ranks import break_even_rank
from grasp.method.storage import STORAGES, Storage
from grasp.model.dense import dense_shape
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QUANTIZED, QuantizedLinear, QuantizedLowRankLinear
from grasp.model.targets import decoder, layer_targets
from speedgate import timing
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.001)
    monkeypatch.setattr(timing, "CPU_BATCH", 0.0005)
    monkeypatch.setattr(costs, "ROTATE_BYTES", 1 << 16)
    monkeypatch.setattr(costs, "DECODES", 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_linear_of_the_model_is_timed_and_the_parts_add_up_to_its_decoding(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    table = measure_costs(model)
    shapes = [dense_shape(target.module) for layer in range(3) for target in layer_targets(model, layer)[0]]
    assert set(table.linears) == {(shape, None) for shape in shapes}
    assert (table.dtype, table.source, table.threads) == ("bfloat16", "measured", torch.get_num_threads())
    times = [table.rest, *(time for linear in table.linears.values() for time in (linear.dense, *linear.seconds))]
    assert all(0 < time < 1 for time in times)
    assert table.predict([(shape, None) for shape in shapes], 3) >= table.rest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder(model).layers)


def test_the_narrowest_mlps_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", intermediate_size=96)
    monkeypatch.setattr(channels, "MULTIPLE", 8)
    whole, narrowest = set(linear_shapes(model)), {(48, 32), (32, 48)}
    table = measure_costs(model, storages=[Storage(8)])
    assert table.linears.keys() == set(product(whole | narrowest, (None, Storage(8))))
    assert costs_for(model, "A100", "pivoted").linears.keys() == {(shape, None) for shape in whole | narrowest}


def test_ranks_are_multiples_of_the_kernels_up_to_the_break_even() -> None:
    assert measured_ranks((4096, 4096), "factored") == (16, 496, 1008, 1520, 2032)
    assert measured_ranks((192, 576), "factored") == (16, 32, 64, 96, 128)
    for shape in [(192, 576), (32, 32), (16, 32), (2, 3)]:
        ranks = measured_ranks(shape, "factored")
        assert list(ranks) == sorted(set(ranks))
        assert ranks[0] >= 1
        assert ranks[-1] <= break_even_rank(shape, "factored")
        assert all(rank % 16 == 0 for rank in ranks if rank > 16)


def test_a_linear_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LowRankLinear, "forward", lambda self, x: torch.nn.functional.linear(x, self.dense_weight()) * 1.05
    )
    with pytest.raises(ResultsError, match=r"32x16r\d+ is off by 5\.0e-02, expected at most 2e-02"):
        measure_costs(tiny_model("llama"))


@pytest.mark.parametrize(("bits", "storages"), [("auto", ("int8", "int4/64")), ("fp8", ("fp8",))])
def test_quantised_linears_are_timed_as_they_are_served(
    bits: str, storages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "ROTATE_BYTES", 1 << 12)
    checked, require_product = [], costs.require_product
    decoded, generate = [], costs.time_generation

    def checks(linear: QuantizedLinear | QuantizedLowRankLinear, name: str) -> None:
        checked.append((type(linear), name))
        require_product(linear, name)

    def noted(model: PreTrainedModel, **sizes: int) -> GenerationTime:
        decoded.append(sum(isinstance(module, QUANTIZED) for module in model.modules()))
        return generate(model, **sizes)

    monkeypatch.setattr(costs, "require_product", checks)
    monkeypatch.setattr(costs, "time_generation", noted)
    config = GraspConfig.best(target_latency=0.5, bits=bits)
    model = tiny_model("llama", torch.bfloat16)
    modules = dict(model.named_modules())
    table = costs_for(model, None, "pivoted", config.storages)
    assert dict(model.named_modules()) == modules
    assert {storage for _, storage in table.linears} == {None, *map(STORAGES.get, storages)}
    assert (QuantizedLinear, f"the {storages[-1]} linear 32x16") in checked
    assert (QuantizedLowRankLinear, f"the {storages[0]} linear 32x16r15") in checked
    assert decoded.count(0) == costs.DECODES + 1
    assert decoded.count(23) == costs.DECODES + 1  # the linears of three layers, the embedding and the output layer
    assert all(seconds is not None and seconds < 1 for seconds in (table.layer_quantized, table.rest_quantized))


def test_costs_come_from_a_file_a_card_or_this_machine(tmp_path: Path) -> None:
    model = tiny_model("llama")
    measured = costs_for(model, None, "pivoted")
    measured.save(tmp_path / "costs.json")
    assert costs_for(model, str(tmp_path / "costs.json"), "pivoted") == measured
    assert costs_for(model, None, "pivoted", measured=measured) is measured
    again = costs_for(model, None, "pivoted", [Storage(8)], measured=measured)  # of an interrupted run without bits
    assert {storage for _, storage in again.linears} == {None, Storage(8)}
    linears = dict(list(measured.linears.items())[1:])  # of an interrupted run of an earlier version
    again = costs_for(model, None, "pivoted", measured=dataclasses.replace(measured, linears=linears))
    assert again.linears.keys() == measured.linears.keys()
    card = costs_for(model, "A100", "pivoted")
    assert (card.device, card.source, card.dtype) == ("A100", "roofline", "float32")
    assert {shape for shape, _ in card.linears} == set(linear_shapes(model))
    head = model.get_output_embeddings().weight.nbytes
    assert card.rest == pytest.approx(head / 2.039e12 + 2e-6, rel=1e-3)
    with pytest.raises(CostTableError, match=r"costs must be a file .* or a card \(A100.*got 'costs\.json'"):
        costs_for(model, "costs.json", "pivoted")


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    CostTable.save(measure_costs(tiny_model("llama")), tmp_path / "costs.json")
    with pytest.raises(CostTableError, match="no linear of"):
        costs_for(tiny_model("gpt2"), str(tmp_path / "costs.json"), "pivoted")
    with pytest.raises(CostTableError, match="the model has bfloat16"):
        costs_for(tiny_model("llama", torch.bfloat16), str(tmp_path / "costs.json"), "pivoted")
