from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.compression import held_out as choice
from grasp.compression.budget import Plan, Prices
from grasp.compression.candidates import Candidate
from grasp.compression.refit import Refit
from grasp.config import GraspConfig
from grasp.errors import NonFiniteError
from grasp.method import least_squares
from grasp.method.storage import Storage
from grasp.model.layer_removal import remove_layers_
from grasp.model.quantized_linear import QuantizedLinear
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from tests.interrupted import Killed, stop_at
from tests.tiny_models import tiny_batches, tiny_model


def with_idle_layer(**sizes: int) -> PreTrainedModel:
    """A model whose layer 1 nearly returns its input."""
    model = tiny_model("llama", **sizes)
    with torch.no_grad():
        decoder(model).layers[1].self_attn.o_proj.weight.mul_(3e-3)
        decoder(model).layers[1].mlp.down_proj.weight.mul_(3e-3)
    return model


@torch.no_grad()
def said_by(model: PreTrainedModel, seed: int) -> list[Tensor]:
    """Tokens that the model finds likely, so that other models lose on them."""
    tokens = tiny_batches(1, 8, 2, seed=seed)[0]
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return list(tokens.split(2))


def compressed(
    model: PreTrainedModel, *, state: RunState | None = None, progress: Progress = no_progress, **options: Any
) -> CompressionReport:
    config = GraspConfig.best(schedule="single-sweep", **options)
    return compress_(*(model, said_by(model, 1), config), held_out=said_by(model, 2), state=state, progress=progress)


def of_one_layer(model: PreTrainedModel) -> float:
    return 0.999 * sum(p.numel() for p in decoder(model).layers[0].parameters()) / model.num_parameters()


def test_a_layer_that_returns_its_input_is_removed_also_by_a_resumed_run(tmp_path: Path) -> None:
    model, dense, resumed = (with_idle_layer() for _ in range(3))
    ratio = of_one_layer(model)
    report = compressed(model, compression_ratio=ratio)
    assert report.removed_layers == (1,)
    assert not report.compressed
    assert {module.reason for module in report.left if module.layer == 1} == {"its layer is removed"}
    rows = {candidate.name: candidate for candidate in report.candidates}
    assert {"dense", "low-rank", "layers 1 removed", "compressed"} <= rows.keys()
    assert report.held_out_text.endswith(", layers 1 removed")
    assert rows["layers 1 removed"].bytes == rows["compressed"].bytes == report.after.bytes
    assert rows["dense"].bytes == report.before.bytes
    assert rows["low-rank"].bytes < report.before.bytes
    assert rows["compressed"].loss == pytest.approx(rows["dense"].loss, rel=1e-3)
    assert CompressionReport.from_json(report.to_json()) == report
    remove_layers_(dense, (1,))
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(Killed), RunState(tmp_path / "run") as state:
        compressed(with_idle_layer(), compression_ratio=ratio, state=state, progress=stop_at("refit", 1))
    with RunState(tmp_path / "run") as state:
        again = compressed(resumed, compression_ratio=ratio, state=state)
    assert (again.removed_layers, again.candidates, again.modules) == ((1,), report.candidates, report.modules)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize(("again", "expected"), [(False, {1: 1.0, 2: 2.0}), (True, {1: 1.0, 3: 0.5})])
def test_layers_are_removed_by_loss_and_the_next_ones_are_measured_again(
    again: bool, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def divergences(reference: Any, layers: list[int], removed: list[int]) -> dict[int, float]:
        asked.append((list(removed), sorted(layers)))
        return {2: 2.0, 3: 0.5}

    monkeypatch.setattr(choice, "RETRIED", 2)
    monkeypatch.setattr(choice, "removal_divergences", divergences)
    reference: Any = "any" if again else None
    prices = Prices(linear=lambda target, rank: 0.0, layer=lambda layer: 10.0, saving=15.0)
    model = tiny_model("llama", num_hidden_layers=5)
    run: Any = SimpleNamespace(prices=prices, model=model, progress=no_progress)
    alone = {0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert choice.removed_in_order(run, Plan(1.0, (), {}), alone, reference) == expected
    assert asked == ([([1], [2, 3])] if again else [])
    run.prices = Prices(prices.linear, prices.layer, saving=50.0)
    monkeypatch.setattr(choice, "removal_divergences", lambda _, layers, *args: dict.fromkeys(layers, 0.0))
    everything = choice.removed_in_order(run, Plan(1.0, (), {}), alone, reference)
    assert len(everything) == 4  # one has to stay
    monkeypatch.setattr(choice, "can_remove", lambda model, removed: 3 not in removed and 0 not in removed)
    assert list(choice.removed_in_order(run, Plan(1.0, (), {}), {**alone, 3: 0.0}, reference)) == [1, 2, 4]
    assert choice._layers_removed(run, Plan(1.0, (), {}), everything) == []


@pytest.mark.parametrize("broken", ["low-rank", "dense", ""])
def test_a_loss_that_is_not_finite_is_never_the_least(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = choice._measured

    def measured(run: Any, start: Any, selections: Any, candidate: Candidate) -> float:
        return float("nan") if candidate.name.startswith(broken) else measure(run, start, selections, candidate)

    monkeypatch.setattr(choice, "_measured", measured)
    model = with_idle_layer()
    if broken != "low-rank":
        what = "the dense model" if broken else "every candidate"
        with pytest.raises(NonFiniteError, match=f"of {what} is NaN or infinite; load the model in bfloat16"):
            compressed(model, compression_ratio=0.2)
        return
    report = compressed(model, compression_ratio=0.2)
    assert report.removed_layers
    assert "low-rank" not in {candidate.name for candidate in report.candidates}
    assert CompressionReport.from_json(report.to_json()) == report


def test_a_compressed_model_whose_loss_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "mean_loss", lambda *_, **__: float("inf"))
    with pytest.raises(NonFiniteError, match="of the compressed model is inf; load the model in bfloat16"):
        compressed(with_idle_layer(), compression_ratio=0.1)


def prefer_fits(monkeypatch: pytest.MonkeyPatch, preferred: bool = True) -> dict[bool, float]:
    """Let fitted low-rank linears be chosen, or those that are not; the losses of both, once they are measured."""
    measure, measured = choice._measured, dict[bool, float]()

    def measure_or_prefer(run: Any, start: Any, selections: Any, candidate: Candidate) -> float:
        value = measure(run, start, selections, candidate)
        if not candidate.ranks:
            return value
        measured[candidate.fitted] = value
        return float(candidate.fitted != preferred)

    monkeypatch.setattr(choice, "_measured", measure_or_prefer)
    return measured


@pytest.mark.parametrize("fit_is_better", [True, False])
def test_low_rank_linears_are_fitted_if_that_loses_less(
    fit_is_better: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(least_squares, "PRIOR_TOKENS", 100)  # the calibration text is short
    measured, folder = prefer_fits(monkeypatch, fit_is_better), tmp_path / "out.partial"
    files: dict[str, int] = {}

    def look(step: str, done: int, total: int) -> None:
        if (step, done) == ("refit", 1):
            files.update(Counter(path.name.partition("-")[0] for path in folder.iterdir()))

    with RunState(folder) as state:
        report = compressed(tiny_model("llama"), state=state, progress=look, compression_ratio=0.02)
    assert report.compressed
    assert measured[True] != pytest.approx(measured[False], rel=1e-5)
    assert report.held_out_loss["compressed"] == pytest.approx(measured[fit_is_better], rel=1e-5)
    assert {kind: files.get(kind, 0) for kind in ("module", "second")} == (
        {"module": 21, "second": 0} if fit_is_better else {"module": 7, "second": 14}  # the first layer of three
    )


def test_a_fit_that_was_measured_is_the_one_that_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prefer_fits(monkeypatch)
    fits, fit = list[int](), Refit._fit_
    monkeypatch.setattr(Refit, "_fit_", lambda self, *args: (fits.append(1), fit(self, *args)))
    kept, stopped, again = (tiny_model("llama") for _ in range(3))
    compressed(kept, compression_ratio=0.02)
    once = len(fits)

    with pytest.raises(Killed), RunState(tmp_path / "out.partial") as state:
        compressed(tiny_model("llama"), state=state, progress=stop_at("refit", 2), compression_ratio=0.02)
    assert len(fits) == 2 * once
    with RunState(tmp_path / "out.partial") as state:
        compressed(stopped, state=state, compression_ratio=0.02)
    assert len(fits) == 2 * once
    monkeypatch.setattr(choice, "store", lambda run, chosen: None)
    compressed(again, compression_ratio=0.02)
    assert len(fits) == 4 * once
    for other in (stopped, again):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in kept.state_dict().items())


@pytest.mark.parametrize("fit_is_better", [True, False])
def test_what_was_measured_and_fitted_is_not_done_again(
    fit_is_better: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prefer_fits(monkeypatch, fit_is_better)
    done, left = list[str](), [0]

    def noted(place: Any, name: str) -> None:
        function = getattr(place, name)

        def note_and_call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            done.append(name)
            return result

        monkeypatch.setattr(place, name, note_and_call)

    for place, name in ((choice, "corrections"), (choice, "removed_in_order"), (choice, "_measured"), (Refit, "_fit_")):
        noted(place, name)
    kept = tiny_model("llama")
    report = compressed(kept, compression_ratio=0.02)
    once = Counter(done)
    assert once["_measured"] == len(report.candidates) - 1  # the last one is the result
    assert once["_fit_"] > 2
    done.clear()
    record = RunState.record

    def record_and_stop(*args: Any, **values: Any) -> None:
        record(*args, **values)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(RunState, "record", record_and_stop)
    again = None
    for stop in range(1, 60):
        left[0], resumed = stop, tiny_model("llama")
        with suppress(Killed), RunState(tmp_path / "out.partial") as state:
            again = compressed(resumed, state=state, compression_ratio=0.02)
            break
    assert stop > 4
    assert again is not None
    assert Counter(done) == once
    assert again.candidates == report.candidates
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in kept.state_dict().items())


def test_layers_that_were_not_named_stay_and_others_get_the_bits_of_dense_linears() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 4}
    size = compressed(with_idle_layer(**sizes), compression_ratio=0.0, bits=8).after.bytes
    model = with_idle_layer(**sizes)
    report = compressed(model, target_bytes=int(0.85 * size), bits=8, refit=False)
    assert report.removed_layers == (1,)
    assert report.candidate_bytes["layers 1 removed"] == report.after.bytes <= 0.85 * size
    linears = [module for module in decoder(model).layers.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 21
    assert {module.storage for module in linears} == {Storage(8)}
    named = compressed(with_idle_layer(**sizes), layers=(2, 3), retain_ratio=0.4, refit=False)
    assert not {0, 1} & {*named.removed_layers}
    assert not any("1" in name for name in named.held_out_loss)
