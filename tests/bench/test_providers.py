from __future__ import annotations

import pytest
import torch
from torch import nn

from grasp.bench.providers import (
    low_rank_layers,
    objections,
    pick_layers,
    providers,
    require_names,
    truncate_,
    weights_of,
)
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import CheckpointError
from grasp.method.svd import decompose
from grasp.model.dense import dense_weight
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedLowRankLinear
from grasp.model.size import parameter_count
from grasp.model.targets import layer_targets
from grasp_kernels import dispatch
from tests.narrowed_models import narrowed_model
from tests.quantized_models import quantized_model
from tests.tiny_models import tiny_batches, tiny_model


def compressed(family: str, layers: list[int]) -> nn.Module:
    model = tiny_model(family)
    truncate_(model, layers, 0.4)
    return model


def test_models_of_other_weights_share_none_and_those_of_other_backends_share_all() -> None:
    models, left_out = providers(tiny_model("opt"), compressed("opt", [0, 2]), [0, 2])
    assert left_out == {}
    assert list(models) == [
        "dense",
        "removed",
        "compressed",
        *(f"compressed/{b.name}" for b in dispatch.BACKENDS),
        *([] if dispatch.backend_missing("cpu") else ["dense/kernel", "compressed/kernel"]),
        "unfused",
    ]
    kinds = {
        name: {type(m) for m in model.modules() if isinstance(m, (LowRankLinear, nn.Sequential))}
        for name, (model, _) in models.items()
    }
    assert kinds["dense"] == kinds["removed"] == set()
    assert (kinds["compressed"], kinds["unfused"]) == ({LowRankLinear}, {nn.Sequential})
    pointers = [
        {p.data_ptr() for p in models[name].model.parameters()}
        for name in ("dense", "removed", "compressed", "unfused")
    ]
    assert len(set.union(*pointers)) == sum(map(len, pointers))
    for name, (model, _) in models.items():
        weights = [p.data_ptr() for p in models[weights_of(name)].model.parameters()]
        assert name == "unfused" or [p.data_ptr() for p in model.parameters()] == weights


def test_a_prepared_model_runs_on_its_backend_alone() -> None:
    models, _ = providers(tiny_model("llama"), compressed("llama", [1]), [1], ["reference"])
    for name, backend in (("compressed/reference", "reference"), ("compressed", "auto")):
        model = models[name].prepared()
        assert {module.backend for module in model.modules() if isinstance(module, LowRankLinear)} == {backend}


def test_what_cannot_be_removed_is_left_out_with_the_reason() -> None:
    models, left_out = providers(tiny_model("llama"), compressed("llama", [0, 1, 2]), [0, 1, 2])
    assert "removed" not in models
    assert left_out == {"removed": "cannot remove all 3 decoder layers; leave at least one"}


def test_a_backend_that_serves_fewer_rows_than_the_prompt_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dispatch.Backend(
        "few",
        dict.fromkeys(dispatch.OPS, ""),
        lambda: None,
        lambda call: "it serves at most 4 rows" if call.rows > 4 else None,
        lambda call: None,
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (few, *dispatch.BACKENDS))
    for module in ("grasp.bench.providers", "grasp.model.lowrank_linear"):
        monkeypatch.setattr(f"{module}.BACKENDS", dispatch.BACKENDS)
    models, _ = providers(tiny_model("llama"), compressed("llama", [1]), [1])
    assert objections(models["compressed/few"], (8, 1)) == "it serves at most 4 rows"
    assert objections(models["compressed/few"], (4, 1)) is None
    for name in ("dense", "compressed", "compressed/reference", "unfused"):
        assert objections(models[name], (8, 1)) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'warp'; expected one of"):
        require_names(["reference", "warp"], [row.name for row in dispatch.BACKENDS], "backend")


def test_a_model_without_some_layers_is_a_compressed_one() -> None:
    dense, removed = tiny_model("llama"), compressed("llama", [2])
    remove_layers_(removed, [0, 2])
    assert low_rank_layers(dense, removed, "small") == ([], 1.0)
    remove_layers_(shorter := compressed("llama", [2]), [1])
    models, left_out = providers(dense, shorter, layers := low_rank_layers(dense, shorter, "small")[0], ["reference"])
    assert layers == [1]  # layer 2 of the dense model, whose layer 1 must not be removed in its place
    assert {"compressed", "unfused"} <= set(models)
    assert left_out == {"removed": "layers of the compressed model were removed already"}


def test_a_model_without_some_channels_is_a_compressed_one() -> None:
    dense, narrowed = tiny_model("llama"), narrowed_model()
    path = "model.layers.1.mlp.gate_proj"
    whole, gate = dense.get_submodule(path), narrowed.get_submodule(path)
    layers, share = low_rank_layers(dense, narrowed, "small")
    assert (layers, share) == ([1], parameter_count(gate) / parameter_count(whole))
    assert parameter_count(gate) == 3 * (16 + whole.in_features)
    narrowed.set_submodule(path, nn.Linear(gate.in_features, gate.out_features, bias=False))
    assert low_rank_layers(dense, narrowed, "small") == ([], 1.0)


def test_the_layers_of_a_compressed_model_are_found() -> None:
    layers, ratio = low_rank_layers(tiny_model("gpt2"), compressed("gpt2", [0, 2]), "small")  # type: ignore[arg-type]
    assert layers == [0, 2]
    assert ratio == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("dense", "low_rank", "message"),
    [
        (tiny_model("llama"), tiny_model("llama"), "small has no low-rank layers"),
        (
            tiny_model("llama", intermediate_size=64),
            compressed("llama", [1]),
            "shape (48, 32)",
        ),
        (tiny_model("llama", num_hidden_layers=1), compressed("llama", [1]), "the dense model has no such linear"),
        (tiny_model("llama", seed=1), compressed("llama", [1]), "small has other embeddings than the dense model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(dense: nn.Module, low_rank: nn.Module, message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        low_rank_layers(dense, low_rank, "small")  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_layers_are_those_asked_for_or_those_in_the_middle() -> None:
    assert pick_layers(None, 2, 5) == [1, 2]
    assert pick_layers((3, 1, 3), 2, 5) == [1, 3]
    with pytest.raises(ValueError, match="the model has 5 decoder layers, got num_layers=6"):
        pick_layers(None, 6, 5)
    for layers in ((), (5,)):
        with pytest.raises(ValueError, match=r"the model has decoder layers 0..4, got layers"):
            pick_layers(layers, 2, 5)


def test_quantised_layers_have_their_share_and_are_refused_with_the_reason_of_the_backend() -> None:
    dense, quantised = tiny_model("llama"), quantized_model("llama", "int4")
    layers, share = low_rank_layers(dense, quantised, "small")
    low = [m for m in quantised.modules() if isinstance(m, QuantizedLowRankLinear)]
    factors = sum(m.rank * (m.in_features + m.out_features - m.rank * (m.order is not None)) for m in low)
    assert (layers, share) == ([1, 2], factors / sum(m.in_features * m.out_features for m in low))
    models, left_out = providers(dense, quantised, layers)
    assert "no low-rank linear with floating factors" in left_out["unfused"]
    assert dispatch.backend_missing("cpu") or "no nn.Linear" in left_out["compressed/kernel"]
    assert objections(models["compressed/reference"], [1]) is None


def test_a_quantised_model_without_low_rank_layers_is_only_compared_with_the_dense_one() -> None:
    dense, quantised = tiny_model("llama"), quantized_model("llama", low_rank=False)
    layers, share = low_rank_layers(dense, quantised, "small")
    models, left_out = providers(dense, quantised, layers)
    assert (layers, share) == ([], 1.0)
    assert {"dense", "compressed"} <= set(models) <= {"dense", "compressed", "dense/kernel"}
    assert "no layer is low-rank" in left_out["removed"]
    with pytest.raises(CheckpointError, match="other embeddings"):
        low_rank_layers(tiny_model("llama", seed=1), quantised, "small")


def test_plain_svd_keeps_the_largest_groups_at_the_ranks_of_grasp() -> None:
    report = compress_(tiny_model("qwen2"), tiny_batches(1), GraspConfig(num_layers=1, retain_ratio=0.4))
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    (layer,) = report.redundant_layers
    truncate_(model, [layer], 0.4)
    targets = {target.name: target for target in layer_targets(dense, layer)[0]}
    assert {module.name for module in report.compressed} == set(targets)
    for module in report.compressed:
        U, S, Vh = decompose(dense_weight(targets[module.name].module))
        best = (U[:, : module.rank] * S[: module.rank]) @ Vh[: module.rank]
        torch.testing.assert_close(model.get_submodule(module.name).dense_weight(), best)
