from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.compression.naive import accumulate, insert_svd_, mean_nll
from grasp.errors import NonFiniteError
from grasp.method.schedules import plan_sweeps
from grasp.method.svd import decompose
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import Target, decoder, layer_targets
from grasp.statistics.gradients import DenseSum, FactoredSum, dense_is_cheaper, gather_gradients
from grasp.statistics.sweep import capture_prefix
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

LAYER = 1


def gradients(
    model: PreTrainedModel,
    batches: list[CalibrationBatch],
    targets: list[Target],
    dtype: str | None = None,
    dense: bool | None = None,
) -> dict[str, Tensor]:
    """∂L/∂σ of the mean loss, the targets in one sweep; ``dense`` says how it is summed."""
    prefix = capture_prefix(model, batches, {min(target.layer for target in targets)}, dtype=dtype)
    sums = gather_gradients(prefix, targets, tokens=None if dense is None else 10**6 if dense else 1)
    assert dense is None or {type(total) for total in sums.values()} == {DenseSum if dense else FactoredSum}
    count = sum(batch.num_targets for batch in batches)
    return {target.name: total.result(dense_weight(target.module))[1] / count for target, total in sums.items()}


def naive_gradients(model: PreTrainedModel, batches: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """The same by autograd, through SVD layers that stay in the model."""
    layers = insert_svd_(model, names)
    accumulate(model, batches)
    return {name: layer.s.grad for name, layer in layers.items()}


def of_block(targets: list[Target], block: str) -> list[Target]:
    return [target for target in targets if target.block == block]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_through_svd_layers_in_the_graph(family: str, dense: bool) -> None:
    model, tokens = tiny_model(family, torch.float64), tiny_batches(3)
    targets, _ = layer_targets(model, LAYER)
    grads = gradients(model, [CalibrationBatch(t) for t in tokens], targets, dense=dense)
    expected = naive_gradients(model, tokens, [target.name for target in targets])
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize(("tokens", "dense"), [(4096, False), (4097, True)])
def test_a_square_weight_is_summed_whole_above_as_many_tokens_as_it_has_rows(tokens: int, dense: bool) -> None:
    assert dense_is_cheaper((4096, 4096), tokens) == dense


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_change_of_the_loss_when_a_singular_value_changes(family: str) -> None:
    model, tokens = tiny_model(family, torch.float64), tiny_batches(2)
    batches = [CalibrationBatch(t) for t in tokens]
    targets, _ = layer_targets(model, LAYER)
    grads = gradients(model, batches, targets)
    for target in targets:
        svd = decompose(dense_weight(target.module))
        norm = grads[target.name].norm()
        for k in (0, len(svd.S) // 2, len(svd.S) - 1):
            group = torch.outer(svd.U[:, k], svd.Vh[k])
            step = 1e-4
            losses = [mean_nll_with(model, tokens, target, sign * step * group) for sign in (1, -1)]
            finite_difference = (losses[0] - losses[1]) / (2 * step)
            assert abs(finite_difference - grads[target.name][k]) <= 1e-6 * max(norm, 1e-3), (target.name, k)


def mean_nll_with(model: PreTrainedModel, tokens: list[Tensor], target: Target, change: Tensor) -> Tensor:
    weight = dense_weight(target.module)
    with torch.no_grad():
        weight += change
        loss = torch.stack([mean_nll(model, t) for t in tokens]).mean()
        weight -= change
    return loss


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_fp32_agrees_with_fp64(family: str) -> None:
    exact, tokens = tiny_model(family, torch.float64), [CalibrationBatch(t) for t in tiny_batches(2)]
    single = copy.deepcopy(exact).float()
    expected = gradients(exact, tokens, layer_targets(exact, LAYER)[0])
    for name, grad in gradients(single, tokens, layer_targets(single, LAYER)[0]).items():
        assert grad.dtype == torch.float32
        # Singular vectors of close singular values turn with rounding: compare where the order is settled.
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_bf16_models_get_fp32_statistics() -> None:
    model = tiny_model("llama", torch.bfloat16)
    targets, _ = layer_targets(model, LAYER)
    batches = [CalibrationBatch(t) for t in tiny_batches(1)]
    assert {grad.dtype for grad in gradients(model, batches, targets).values()} == {torch.float32}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nothing(side: str) -> None:
    model = tiny_model("llama", torch.float64)
    tokens = tiny_batches(1, batch_size=2, length=8)[0]
    padding, position = torch.full((2, 4), 5), torch.arange(12)
    padded = torch.cat([padding, tokens] if side == "left" else [tokens, padding], dim=1)
    mask = (position >= 4 if side == "left" else position < 8).expand(2, 12)
    targets, _ = layer_targets(model, LAYER)
    alone = gradients(model, [CalibrationBatch(tokens)], targets)
    for name, grad in gradients(model, [CalibrationBatch(padded, mask)], targets).items():
        assert (grad - alone[name]).norm() <= 1e-6 * alone[name].norm()  # rotary angles are fp32


def test_only_the_targets_get_gradients_and_the_model_is_left_as_it_was() -> None:
    model, batches = tiny_model("qwen2"), [CalibrationBatch(tiny_batches(1)[0])]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients(model, batches, layer_targets(model, LAYER)[0])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in layer.__dict__ for layer in decoder(model).layers)


def test_layers_below_the_current_one_are_not_run_again() -> None:
    model, batches = tiny_model("llama"), [CalibrationBatch(tiny_batches(1)[0])]
    targets, _ = layer_targets(model, LAYER)
    prefix = capture_prefix(model, batches, [LAYER])
    runs: list[int] = []
    for index, layer in enumerate(decoder(model).layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.append(index))
    gather_gradients(prefix, of_block(targets, "mlp"))
    assert runs == [1, 2]


def test_a_non_finite_loss_is_reported_with_its_batch() -> None:
    model, batches = tiny_model("llama"), [CalibrationBatch(t) for t in tiny_batches(2)]
    targets, _ = layer_targets(model, LAYER)
    prefix = capture_prefix(model, batches, [LAYER])
    prefix.hidden[LAYER][1].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="calibration batch 1 is nan"):
        gather_gradients(prefix, of_block(targets, "mlp"))


def test_every_call_of_a_linear_counts() -> None:
    model = tiny_model("llama", torch.float64)
    layer = decoder(model).layers[LAYER]
    layer.mlp = Twice(32)
    targets = [target for target in layer_targets(model, LAYER)[0] if target.block == "mlp"]
    tokens = tiny_batches(2)
    grads = gradients(model, [CalibrationBatch(t) for t in tokens], targets)
    expected = naive_gradients(model, tokens, [target.name for target in targets])
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-6 * expected[name].norm()


class Twice(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).tanh())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_sweep_gives_every_layer_the_gradients_of_the_dense_model(family: str) -> None:
    model, tokens = tiny_model(family, torch.float64), tiny_batches(2)
    batches = [CalibrationBatch(t) for t in tokens]
    targets = [target for layer in (0, 2) for target in layer_targets(model, layer)[0]]
    together = gradients(model, batches, targets)
    for layer in (0, 2):
        for name, grad in gradients(model, batches, [t for t in targets if t.layer == layer]).items():
            assert (grad - together[name]).norm() <= 1e-12 * grad.norm(), name


def test_sweeps_in_bfloat16_leave_the_weights_bit_for_bit_and_come_close() -> None:
    model, batches = tiny_model("llama"), [CalibrationBatch(t) for t in tiny_batches(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets, _ = layer_targets(model, LAYER)
    expected, got = gradients(model, batches, targets), gradients(model, batches, targets, "bfloat16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        assert 0 < (grad - expected[name]).norm() <= 0.1 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("sequential", [[(2, "mlp")], [(2, "attention")], [(0, "mlp")], [(0, "attention")]]),
        ("per-layer", [[(2, "attention"), (2, "mlp")], [(0, "attention"), (0, "mlp")]]),
        ("single-sweep", [[(0, "attention"), (0, "mlp"), (2, "attention"), (2, "mlp")]]),
    ],
)
def test_a_schedule_says_which_blocks_share_a_sweep(schedule: str, expected: list[list[tuple[int, str]]]) -> None:
    model = tiny_model("llama")
    targets = [target for layer in (0, 2) for target in layer_targets(model, layer)[0]]
    sweeps = plan_sweeps(targets, schedule)
    assert [sorted({(target.layer, target.block) for target in members}) for members in sweeps] == expected
    assert sorted(target.name for members in sweeps for target in members) == sorted(t.name for t in targets)
