from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.compression import held_out as choice
from grasp.compression.naive import naive_grasp_
from grasp.config import GraspConfig
from grasp.errors import CalibrationError, CheckpointError, NonFiniteError, UnsupportedModelError
from grasp.method.ranks import FORMS, break_even_rank, parameters_removed
from grasp.model.batch import CalibrationBatch
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.loss import loss_and_grad
from tests.tiny_models import DENSE_FAMILIES, tiny_batches, tiny_model

pytestmark = pytest.mark.long

# Which blocks share a sweep, in order: the paper's order, written out.
SWEEPS: dict[str, list[list[tuple[int, str]]]] = {
    "sequential": [[(2, "mlp")], [(2, "attention")], [(0, "mlp")], [(0, "attention")]],
    "per-layer": [[(2, "mlp"), (2, "attention")], [(0, "mlp"), (0, "attention")]],
    "single-sweep": [[(2, "mlp"), (2, "attention"), (0, "mlp"), (0, "attention")]],
}


@pytest.mark.parametrize("schedule", SWEEPS)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_selects_what_an_independent_implementation_selects(family: str, schedule: str) -> None:
    model, batches = tiny_model(family, torch.float64), tiny_batches(2)
    naive = copy.deepcopy(model)
    blocks = [
        [target.name for layer in (2, 0) for target in layer_targets(model, layer)[0] if target[1:3] in members]
        for members in SWEEPS[schedule]
    ]
    report = compress_(model, batches, GraspConfig(layers=(0, 2), retain_ratio=0.4, schedule=schedule))
    expected = naive_grasp_(naive, batches, blocks, 0.4)
    assert {module.name: list(module.indices) for module in report.compressed} == expected
    tokens = tiny_batches(1, seed=5)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, naive(tokens).logits, rtol=0, atol=1e-9)


def test_goes_deepest_layer_first_and_mlp_before_attention() -> None:
    report = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(0, 2), retain_ratio=0.4))
    order = [(module.layer, module.block) for module in report.modules]
    assert list(dict.fromkeys(order)) == [(2, "mlp"), (2, "attention"), (0, "mlp"), (0, "attention")]


def test_compresses_the_layers_with_the_lowest_block_influence() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoder(model).layers[1].mlp.down_proj.weight.mul_(0.01)
        decoder(model).layers[1].self_attn.o_proj.weight.mul_(0.01)
    report = compress_(model, tiny_batches(1), GraspConfig(num_layers=1, retain_ratio=0.4))
    assert report.redundant_layers == (1,)
    assert min(report.block_influence) == report.block_influence[1]
    assert {name.split(".")[2] for name, m in model.named_modules() if isinstance(m, LowRankLinear)} == {"1"}


@pytest.mark.parametrize("nothing", [{"compression_ratio": 0.0}, {"num_layers": 0}, {"layers": ()}])
def test_asking_for_nothing_changes_nothing(nothing: dict[str, Any]) -> None:
    model, tokens = tiny_model("qwen2"), tiny_batches(1)[0]
    with torch.no_grad():
        before = model(tokens).logits
        report = compress_(model, [tokens], GraspConfig(**nothing))
        assert torch.equal(model(tokens).logits, before)
    assert report.modules == ()
    assert report.compression_ratio == 0
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("target", [0.1, 0.2, 0.35])
def test_the_compression_ratio_is_of_the_whole_model(target: float) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    before = sum(p.numel() for p in model.parameters())
    report = compress_(model, tiny_batches(1), GraspConfig(compression_ratio=target, retain_ratio=0.3))
    after = sum(p.numel() for p in model.parameters())
    assert abs((before - after) / before - target) <= 0.002
    assert report.compression_ratio == pytest.approx(1 - after / before)
    assert report.decoder_compression_ratio > report.compression_ratio


def test_the_default_removes_a_fifth_of_the_model() -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    assert abs(compress_(model, tiny_batches(1)).compression_ratio - 0.2) <= 0.002


def test_threshold_keeps_the_share_and_never_grows_a_matrix() -> None:
    report = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(1,), threshold_ratio=0.6))
    assert report.retain_ratio is None
    for module in report.compressed:
        cap = break_even_rank((module.out_features, module.in_features), "factored")
        assert module.rank <= cap
        assert module.importance_kept >= 0.6 or module.rank == cap
        assert module.parameters_after < module.parameters_before


def test_pivoted_linears_compute_the_same_in_fewer_parameters() -> None:
    models, reports = {}, {}
    for form in FORMS:
        models[form] = tiny_model("llama", torch.float64)
        config = GraspConfig(layers=(1, 2), threshold_ratio=0.3, refit=True, form=form)
        reports[form] = compress_(models[form], tiny_batches(2), config)
    factored, pivoted = (reports[form].compressed for form in ("factored", "pivoted"))
    assert {module.form for module in pivoted} == {"pivoted"}
    for one, other in zip(factored, pivoted, strict=True):
        assert one.rank == other.rank
        assert one.parameters_after - other.parameters_after == one.rank**2
    logits = [model(tiny_batches(1)[0]).logits for model in models.values()]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_linears_that_have_no_pivoted_form_are_factored_or_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp.model.lowrank_linear.LARGEST_GROWTH", 0.5)
    report = compress_(tiny_model("llama"), tiny_batches(2), GraspConfig.best(compression_ratio=0.2))
    assert {module.form for module in report.compressed} == {"factored"}
    assert all(module.parameters_after < module.parameters_before for module in report.compressed)
    assert any("rounding errors" in module.reason for module in report.left)
    assert report.after.parameters == report.before.parameters - sum(
        module.parameters_before - module.parameters_after for module in report.compressed
    )


def test_held_out_batches_do_not_change_the_published_method_and_tell_what_removed_layers_would_cost() -> None:
    config, batches, held_out = GraspConfig.paper(compression_ratio=0.1), tiny_batches(4), tiny_batches(2, seed=5)
    dense, models = tiny_model("llama"), [tiny_model("llama") for _ in range(2)]
    reports = [compress_(m, batches, config, held_out=h) for m, h in zip(models, ((), held_out), strict=True)]
    assert reports[0].modules == reports[1].modules
    assert (reports[0].held_out_loss, reports[0].held_out_text) == ({}, "")
    losses = {"dense": mean_loss(dense, held_out), "compressed": mean_loss(models[1], held_out)}
    removed = sorted(range(3), key=reports[1].block_influence.__getitem__)[:1]  # of 3 layers: a third of the model
    remove_layers_(dense, removed)
    losses[f"layers {removed[0]} removed"] = mean_loss(dense, held_out)
    assert reports[1].held_out_loss == pytest.approx(losses, rel=1e-5)
    assert CompressionReport.from_json(reports[1].to_json()) == reports[1]


def test_a_loss_without_layers_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measured", lambda *args: math.nan if args[3].removed else 1.0)
    report = compress_(tiny_model("llama"), tiny_batches(2), GraspConfig(num_layers=1), held_out=tiny_batches(1))
    assert report.held_out_loss.keys() == {"dense", "compressed"}
    assert CompressionReport.from_json(report.to_json()) == report


def mean_loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(float(model(batch, labels=batch).loss) for batch in batches) / len(batches)


def test_metrics_choose_differently() -> None:
    chosen = {
        metric: [
            module.indices
            for module in compress_(
                tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4, metric=metric)
            ).compressed
        ]
        for metric in ("taylor", "gradient")
    }
    assert chosen["taylor"] != chosen["gradient"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GraspConfig.best(compression_ratio=0.2), True),
        (GraspConfig(compression_ratio=0.2, basis="kfac", metric="fisher"), False),
        (GraspConfig(compression_ratio=0.2), False),
    ],
)
def test_where_covariances_alone_score_gradients_are_those_of_drawn_labels(
    config: GraspConfig, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def noted(*args: Any, samples_labels: bool = False, **values: Any) -> Any:
        seen.append(samples_labels)
        return loss_and_grad(*args, samples_labels=samples_labels, **values)

    monkeypatch.setattr("grasp.statistics.sweep.loss_and_grad", noted)
    compress_(tiny_model("llama"), tiny_batches(2), config)
    assert set(seen) == {expected}


def test_two_runs_agree_exactly() -> None:
    models = [tiny_model("gemma3") for _ in range(2)]
    reports = [compress_(model, tiny_batches(2), GraspConfig(num_layers=2, retain_ratio=0.3)) for model in models]
    assert reports[0].modules == reports[1].modules
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    report = compress_(model, tiny_batches(1), GraspConfig(num_layers=1, retain_ratio=0.3))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.before.bytes == 2 * report.before.parameters
    assert torch.isfinite(model(tiny_batches(1)[0]).logits).all()


def test_embeddings_head_and_biases_are_untouched() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    embeddings = model.model.embed_tokens.weight.clone()
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    compress_(model, tiny_batches(1), GraspConfig(layers=(0, 1, 2), retain_ratio=0.3))
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)


def test_experts_are_left_and_named() -> None:
    model = tiny_model("mixtral")
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4))
    assert {module.block for module in report.compressed} == {"attention"}
    assert any("experts" in module.name and "mixture-of-experts" in module.reason for module in report.left)


def test_the_report_adds_up_and_survives_json() -> None:
    model = tiny_model("opt")
    report = compress_(model, tiny_batches(2), GraspConfig(num_layers=2, retain_ratio=0.3))
    removed = sum(
        parameters_removed((module.out_features, module.in_features), module.rank, module.form)
        for module in report.compressed
    )
    assert report.before.parameters - report.after.parameters == removed > 0
    assert report.after.parameters == sum(p.numel() for p in model.parameters())
    assert report.calibration["sequences"] == 4
    assert report.calibration["tokens"] == 4 * 12
    assert CompressionReport.from_json(report.to_json()).to_dict() == json.loads(report.to_json())
    assert CompressionReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"modules": 3}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="not a compression report"):
        CompressionReport.from_json(text)


def test_training_goes_on_after_compression() -> None:
    model = tiny_model("llama").train()
    compress_(model, tiny_batches(1), GraspConfig(num_layers=1, retain_ratio=0.3))
    assert all(module.training for module in model.modules())
    tokens = tiny_batches(1)[0]
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("config", [GraspConfig.paper(num_layers=2), GraspConfig.best(compression_ratio=0.05)])
def test_a_frozen_model_stays_frozen(config: GraspConfig) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert compress_(model, tiny_batches(4), config, held_out=tiny_batches(2, seed=5)).compressed
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["lm_head.weight"]


def test_the_cache_gives_what_a_full_pass_gives() -> None:
    model = tiny_model("llama", torch.float64)
    compress_(model, tiny_batches(1), GraspConfig(num_layers=2, retain_ratio=0.3))
    prompt = tiny_batches(1, batch_size=1)[0]
    cached = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))


def test_progress_counts_every_sweep() -> None:
    seen: list[tuple[str, int, int]] = []
    compress_(
        tiny_model("llama"),
        tiny_batches(3),
        GraspConfig(num_layers=1, retain_ratio=0.3),
        progress=lambda *step: seen.append(step),
    )
    steps = list(dict.fromkeys(step for step, _, _ in seen))
    linears = {"layer 2 mlp": 3, "layer 2 attention": 4}
    decomposed = [step for step in seen if step[0] == "decompositions"]
    assert decomposed == [("decompositions", done, n) for n in linears.values() for done in range(1, n + 1)]
    steps.remove("decompositions")
    assert len(steps) == 4  # block influence, prefix, and one sweep for each block
    assert all([(done, total) for s, done, total in seen if s == step] == [(1, 3), (2, 3), (3, 3)] for step in steps)


class InterruptedRunError(Exception):
    pass


def test_an_interrupted_run_leaves_a_model_that_works_and_can_be_saved() -> None:
    model = tiny_model("llama")

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "layer 2 attention":
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        compress_(model, tiny_batches(1), GraspConfig(layers=(0, 2), retain_ratio=0.3), progress=interrupt)
    replaced = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert replaced == {f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert model.config.quantization_config.ranks.keys() == replaced
    assert torch.isfinite(model(tiny_batches(1)[0]).logits).all()


def test_a_second_compression_leaves_what_is_already_low_rank() -> None:
    model = tiny_model("llama")
    compress_(model, tiny_batches(1), GraspConfig(layers=(2,), retain_ratio=0.3))
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.3))
    assert {module.layer for module in report.compressed} == {1}
    assert {module.layer for module in report.left} == {2}
    assert all("LowRankLinear" in module.reason for module in report.left)


def test_bad_requests_are_refused_and_change_nothing() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for config, message in [
        (GraspConfig(layers=(1, 3)), r"decoder layers 0\.\.2, got layers=\[1, 3\]"),
        (GraspConfig(num_layers=4), "3 decoder layers, got num_layers=4"),
        (GraspConfig(compression_ratio=0.99), "largest possible ratio is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress_(model, tiny_batches(1), config)
    with pytest.raises(CalibrationError, match="0 calibration batches"):
        compress_(model, [])
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        compress_(model, [torch.ones(4, 1, dtype=torch.int64)])
    with pytest.raises(CalibrationError, match="129 tokens, the model has 128 positions; take shorter"):
        compress_(model, tiny_batches(1, length=129))
    masked = CalibrationBatch(tiny_batches(1)[0], torch.zeros(2, 12, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="no token to predict"):
        compress_(model, [masked])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_non_finite_weights_are_refused_by_name() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"up_proj|layers \[2\]"):
        compress_(model, tiny_batches(1), GraspConfig(layers=(2,)))


def test_a_model_without_dense_linears_is_refused() -> None:
    model = tiny_model("llama")
    compress_(model, tiny_batches(1), GraspConfig(layers=(0, 1, 2), retain_ratio=0.3))
    with pytest.raises(UnsupportedModelError, match=r"no decoder layer .* has a dense nn\.Linear"):
        compress_(model, tiny_batches(1), GraspConfig(layers=(0,)))


def test_padded_batches_are_accepted() -> None:
    tokens = tiny_batches(1)[0]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 6:] = False
    report = compress_(tiny_model("llama"), [CalibrationBatch(tokens, mask)], GraspConfig(num_layers=1))
    assert report.calibration["tokens"] == 18


def test_matrices_that_factors_cannot_shrink_are_left_with_the_reason() -> None:
    model = tiny_model("llama")
    layer = decoder(model).layers[1]
    layer.mlp.up_proj = nn.Linear(32, 1, bias=False)
    targets = {target.name for target in layer_targets(model, 1)[0]}
    assert "model.layers.1.mlp.up_proj" in targets  # an nn.Linear, but (1, 32) has no rank that saves
    layer.mlp.down_proj = nn.Linear(48, 32, bias=False)
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4))
    assert [module.reason for module in report.left] == ["too small: rank 1 does not shrink (1, 32)"]


def test_linears_that_do_not_reach_the_loss_are_left_with_the_reason() -> None:
    model = tiny_model("llama")
    decoder(model).layers[1].mlp.unused_proj = nn.Linear(32, 48, bias=False)
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4))
    assert [(m.name, m.reason) for m in report.left] == [
        ("model.layers.1.mlp.unused_proj", "its output does not reach the loss")
    ]
    assert len(report.compressed) == 7


@pytest.mark.parametrize("width", [32, 480])
def test_the_others_save_for_a_linear_that_is_not_used(width: int) -> None:
    model = tiny_model("llama")
    decoder(model).layers[1].mlp.unused_proj = nn.Linear(32, width, bias=False)
    report = compress_(model, tiny_batches(2), GraspConfig.best(compression_ratio=0.25, schedule="single-sweep"))
    assert report.compression_ratio == pytest.approx(0.25, abs=0.01)


def test_linears_of_zeros_stay_dense_and_the_others_save() -> None:
    model, batches = tiny_model("llama"), tiny_batches(4)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        decoder(model).layers[1].get_submodule(name).weight.data.zero_()
    report = compress_(model, batches, GraspConfig.best(compression_ratio=0.25, schedule="single-sweep"))
    assert "model.layers.1.mlp.up_proj" in {module.name for module in report.left}
    assert report.compression_ratio == pytest.approx(0.25, abs=0.01)
    with torch.no_grad():
        assert torch.isfinite(model(batches[0]).logits).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode: Any) -> None:
    model = tiny_model("llama")
    expected = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(num_layers=1, retain_ratio=0.3)).modules
    batches = tiny_batches(1)
    with mode():
        report = compress_(model, batches, GraspConfig(num_layers=1, retain_ratio=0.3))
    assert report.modules == expected


def test_a_model_quantised_by_another_method_is_refused_before_anything_is_done() -> None:
    model = tiny_model("llama")
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match=r"quantised \(object\); expected a dense one"):
        compress_(model, tiny_batches(1), GraspConfig(layers=(0,)))
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize(
    "batch", [torch.ones(8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 8)]
)
def test_what_is_no_batch_of_tokens_is_refused(batch: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"must be \(B, L\) int64 token ids"):
        compress_(tiny_model("llama"), [batch])
