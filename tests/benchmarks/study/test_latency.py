from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from benchmarks.study import latency as study_latency
from benchmarks.study.latency import main, rebuild_, require_right
from benchmarks.study.records import STUDY_RECORDS, StudyLatency, StudyResult, StudySetting
from grasp.bench.decoding import Case, Timed
from grasp.bench.results import append_results, read_results
from grasp.errors import ResultsError
from grasp.model.kernel_linear import KernelLinear
from grasp.model.lowrank_linear import LowRankLinear
from grasp_kernels.dispatch import backend_missing
from tests.bench.records import record
from tests.command_line import run_script, save_tiny_model
from tests.tiny_models import tiny_model

LOW = "model.layers.1.mlp.up_proj"


def cell(method: str, **values: Any) -> Any:
    setting = StudySetting("model", "b", "c", 1, 2, 3, 4, None, "float32")
    empty: dict[str, Any] = {"ranks": {}, "channels": {}, "removed_layers": ()}
    empty |= {"ratio": 0.2, "seed": 0, "setting": setting}
    return record(StudyResult, method=method, **{**empty, **values})


def run(model: Path, output: Path, *cells: Any, arguments: tuple[str, ...] = ()) -> Result:
    append_results(output.parent / "study.jsonl", cells)
    sizes = ["--prompt-tokens", "3", "--new-tokens", "2", "--repeats", "2"]
    return run_script(main, output.parent / "study.jsonl", "-o", output, "--model", model, *sizes, *arguments)


class Wrong(Timed):
    def logits(self, case: Case) -> torch.Tensor:
        return -super().logits(case)


def test_the_models_of_a_ratio_are_timed_with_the_dense_one(tmp_path: Path) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "latency.jsonl"
    cells = [
        cell("low", ranks={LOW: 3}, pivoted=True),
        cell("gone", removed_layers=(1,)),
        cell("other", seed=1),
        cell("dense", ratio=0.0),
    ]
    result = run(model, output, *cells)
    assert result.exit_code == 0, result.output
    latencies = [latency for latency in read_results(output, STUDY_RECORDS) if isinstance(latency, StudyLatency)]
    assert [(latency.method, latency.ratio) for latency in latencies] == [("dense", 0.0), ("low", 0.2), ("gone", 0.2)]
    assert latencies[0].of_dense == 1
    assert all(latency.inter_token_ms.p50 > 0 and latency.of_dense > 0 for latency in latencies)
    assert not any(latency.kernel or latency.mode != "eager" for latency in latencies)


@pytest.mark.parametrize("kind", [Timed, Wrong])
def test_compiled_steps_are_timed_if_their_logits_are_right(
    kind: type[Timed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/bench/test_model.py compiles them."""
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "latency.jsonl"
    compiled: list[str] = []
    monkeypatch.setattr(study_latency.Timed, "of", lambda provider, mode: compiled.append(mode) or kind(provider))
    result = run(model, output, cell("low", ranks={LOW: 3}), arguments=("--compiled",))
    if kind is Wrong:
        assert result.exit_code == 2
        assert "dense gives other logits when it is compiled" in " ".join(result.output.split())
        assert not output.exists()
        return
    assert result.exit_code == 0, result.output
    latencies = [latency for latency in read_results(output, STUDY_RECORDS) if isinstance(latency, StudyLatency)]
    assert [(latency.method, latency.mode) for latency in latencies] == [("dense", "compiled"), ("low", "compiled")]
    assert compiled == ["compiled", "compiled"]


@pytest.mark.skipif(backend_missing("cpu") is not None, reason="the C++ kernels were not built")
def test_all_models_but_one_run_in_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "latency.jsonl"
    timed, time_models = [], study_latency.time_models

    def remember(models: Any, *arguments: Any) -> Any:
        modules = ([*of_one.provider.model.modules()] for of_one in models.values())
        timed.extend(sum(isinstance(module, KernelLinear) for module in of_model) for of_model in modules)
        return time_models(models, *arguments)

    monkeypatch.setattr(study_latency, "time_models", remember)
    result = run(model, output, cell("low", ranks={LOW: 3}), cell("gone", removed_layers=(1,)), arguments=("--kernel",))
    assert result.exit_code == 0, result.output
    latencies = [latency for latency in read_results(output, STUDY_RECORDS) if isinstance(latency, StudyLatency)]
    assert [(latency.method, latency.kernel) for latency in latencies] == [
        *(("dense", kernel) for kernel in (False, True)),
        *((method, True) for method in ("low", "gone")),
    ]
    dense, *in_kernel = timed
    assert dense == 0
    assert in_kernel[0] == in_kernel[1] + 1 > in_kernel[2] + 1


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_rebuilt_model_has_the_cells_shapes(pivoted: bool) -> None:
    model = tiny_model("llama")
    depth = len(model.model.layers)
    narrowed = {"model.layers.1.mlp": 24}
    rebuild_(model, cell("both", ranks={LOW: 3}, removed_layers=(0,), pivoted=pivoted, channels=narrowed))
    assert len(model.model.layers) == depth - 1
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, LowRankLinear)
    assert (module.rank, module.out_features) == (3, 24)
    assert model.model.layers[0].mlp.down_proj.in_features == 24
    assert (module.order is not None) == pivoted
    require_right(model, "both")


@pytest.mark.parametrize(("family", "maps"), [("llama", 0), ("gemma3", 1)])
def test_a_linear_replacement_has_its_map_where_it_cannot_be_merged(family: str, maps: int) -> None:
    model = tiny_model(family)
    of_layers = sum(p.numel() for layer in model.model.layers[:1] for p in layer.parameters())
    rebuild_(model, cell("linear replacement", removed_layers=(1, 2)))
    left = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    assert left - of_layers == maps * model.config.hidden_size**2


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rebuild_(model, cell("low", ranks={LOW: 3}))
    monkeypatch.setattr(LowRankLinear, "forward", lambda self, x: torch.ones(*x.shape[:-1], self.out_features))
    with pytest.raises(ResultsError, match=f"{LOW} of low is off by"):
        require_right(model, "low")


def test_another_model_than_the_studys_is_refused(tmp_path: Path) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "latency.jsonl"
    result = run(model, output, cell("low", ranks={"model.layers.99.up": 3}))
    assert result.exit_code == 2
    assert "has no model.layers.99.up" in " ".join(result.output.split())
    assert not output.exists()


def test_a_model_of_another_name_and_a_seed_without_cells_are_refused(tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    result = run(other, tmp_path / "latency.jsonl", cell("low"))
    assert result.exit_code == 2
    assert "is a study of model, got --model" in " ".join(result.output.split())
    result = run(other, tmp_path / "latency.jsonl", arguments=("--seed", "7"))
    assert result.exit_code == 2
    assert "has no compressed model of seed 7" in " ".join(result.output.split())


def test_a_ratio_that_was_not_studied_is_refused(tmp_path: Path) -> None:
    model, output = save_tiny_model(tmp_path / "model"), tmp_path / "latency.jsonl"
    result = run(model, output, cell("low"), arguments=("--ratios", "0.5"))
    assert result.exit_code == 2
    assert "no cell of ratio 0.5" in " ".join(result.output.split())
    assert "dense" not in result.output
