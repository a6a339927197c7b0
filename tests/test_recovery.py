from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp import recovery
from grasp.checkpoint import run_folder
from grasp.checkpoint.recovery_report import RecoveryReport
from grasp.checkpoint.recovery_state import RecoveryState
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import DistributedError, NonFiniteError, ResumeError, UnsupportedModelError
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.masters import Masters, units
from grasp.model.trainable import trained_parameters
from grasp.recovery import (
    RecoveryConfig,
    learning_rate_at,
    planned_steps,
    recover_,
    trainable_factors,
)
from grasp.statistics.processes import Processes
from grasp.training_data import TrainingSequence, collate
from tests import many_processes
from tests.interrupted import Killed, stored
from tests.quantized_models import quantized_model
from tests.tiny_models import VOCABULARY, tiny_batches, tiny_model

CONFIG = RecoveryConfig(learning_rate=0.1, batch_size=4, micro_batch_size=2, tokens=4 * 12 * 20)


@cache
def _compressed(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model(family, dtype)
    compress_(model, tiny_batches(2), GraspConfig(layers=(1, 2), retain_ratio=0.4, schedule="single-sweep"))
    return model


def compressed(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return copy.deepcopy(_compressed(family, dtype))


def learnable(count: int, length: int = 12, *, seed: int = 0) -> list[TrainingSequence]:
    """Sequences in which each token is followed by the next number."""
    starts = torch.randint(3, VOCABULARY - length, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [TrainingSequence(torch.arange(start, start + length), torch.arange(length) > 0) for start in starts]


def noise(count: int, length: int = 12, *, seed: int = 0) -> list[TrainingSequence]:
    """Sequences from which nothing can be learnt."""
    rows = tiny_batches(1, count, length, seed=seed)[0]
    return [TrainingSequence(row, torch.arange(length) > 0) for row in rows]


TRAIN, HELD_OUT = learnable(10), learnable(3, seed=1)


def recovered(
    dtype: torch.dtype = torch.float32, config: RecoveryConfig = CONFIG, **options: Any
) -> tuple[RecoveryReport, dict[str, Tensor]]:
    model = compressed(dtype=dtype)
    report = recover_(model, TRAIN, HELD_OUT, config, **options)
    return report, model.state_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_loss_falls_and_only_the_factors_change(family: str) -> None:
    model = compressed(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = recover_(model, TRAIN, HELD_OUT, CONFIG)
    assert report.loss_after < report.loss_before - 0.03
    factors = trainable_factors(model)
    assert report.trained_parameters == sum(factor.numel() for factor in factors.values())
    assert report.factors == sum(isinstance(module, LowRankLinear) for module in model.modules()) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in factors), name


@pytest.mark.parametrize(("family", "storage"), [("llama", "int4/32"), ("gemma3", "int8")])
def test_of_a_quantised_model_scales_norms_and_biases_are_trained(family: str, storage: str) -> None:
    model = quantized_model(family, storage)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = recover_(model, TRAIN, HELD_OUT, dataclasses.replace(CONFIG, learning_rate=0.03))
    assert report.loss_after < report.loss_before - 0.03
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained_parameters(model).keys()
    layers = {name for name in before if ".layers." in name}
    assert changed == {name for name in layers if name.endswith(("_scales", "norm.weight"))}
    assert report.trained_parameters == sum(before[name].numel() for name in changed)
    assert report.factors == 0
    assert not any(model.get_parameter(name).requires_grad for name in changed if name.endswith("_scales"))


def divergence(model: PreTrainedModel, teacher: PreTrainedModel) -> float:
    tokens = torch.stack([sequence.input_ids for sequence in TRAIN])
    with torch.no_grad():
        q, p = (each(tokens).logits[:, :-1].log_softmax(-1) for each in (model, teacher))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_with_a_teacher_the_model_comes_nearer_to_it_than_to_the_text() -> None:
    teacher, model, other = tiny_model("llama"), compressed(), compressed()
    weights = copy.deepcopy(teacher.state_dict())
    before = divergence(model, teacher)
    report = recover_(model, TRAIN, TRAIN[:1], CONFIG, teacher=teacher.train())
    recover_(other, TRAIN, TRAIN[:1], CONFIG)
    assert report.distilled
    assert divergence(model, teacher) < before < divergence(other, teacher)
    assert teacher.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_modes_and_frozen_parameters_are_restored_and_no_gradients_remain() -> None:
    model = compressed().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    recover_(model, TRAIN, HELD_OUT, CONFIG)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_step_is_adamw_on_the_loss_of_the_whole_batch() -> None:
    """The sequences have unequal numbers of tokens that count, and come in two passes."""
    sequences = [TRAIN[0], TrainingSequence(TRAIN[1].input_ids, torch.arange(12) > 8), TRAIN[2]]
    config = RecoveryConfig(learning_rate=1e-2, batch_size=3, micro_batch_size=2)
    model, expected = compressed(), compressed()
    recover_(model, sequences, HELD_OUT, config)

    factors = list(trainable_factors(expected).values())
    batch = collate(sequences)
    logits = expected(batch.input_ids).logits[:, :-1][batch.is_target]
    loss = nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][batch.is_target])
    loss.backward()
    of_entries = [math.prod(units(factor)) for factor in factors]
    values = [nn.Parameter(factor.detach() / unit) for factor, unit in zip(factors, of_entries, strict=True)]
    for value, factor, unit in zip(values, factors, of_entries, strict=True):
        assert factor.grad is not None
        value.grad = factor.grad * unit
    nn.utils.clip_grad_norm_(values, 1.0)
    torch.optim.AdamW(values, lr=1e-2).step()
    for got, value, unit in zip(trainable_factors(model).values(), values, of_entries, strict=True):
        torch.testing.assert_close(got, value * unit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_units_are_proportional_to_small_entries_and_zeros_are_trained(shape: tuple[int, ...]) -> None:
    for size in (1.0, 1e-4, 1e-9):
        torch.testing.assert_close(math.prod(units(torch.full(shape, size))).expand(shape), torch.full(shape, size))
    assert math.prod(units(torch.zeros(shape))).expand(shape).tolist() == torch.full(shape, 1e-3).tolist()


def test_the_sizes_of_rows_and_columns_do_not_matter() -> None:
    """The same model: channels of the norms are up to 16 times as large, and columns that read them as small."""
    model, other = compressed(), compressed()
    layer, powers = other.model.layers[1], 2.0 ** torch.randint(0, 5, (32,))
    assert isinstance(layer.self_attn.q_proj, LowRankLinear)
    layer.input_layernorm.weight.data.mul_(powers)
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.Vh.data.div_(powers)
        linear.U.data.mul_(8.0)
        linear.Vh.data.div_(8.0)
    reports = [recover_(each, TRAIN, HELD_OUT, CONFIG) for each in (model, other)]
    assert reports[0].loss_before == pytest.approx(reports[1].loss_before, abs=1e-6)
    assert reports[0].loss_after == pytest.approx(reports[1].loss_after, abs=0.02)


def test_the_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(recovery, "MAX_GRAD_NORM", 0.05)
    recovered()
    assert norms == pytest.approx([0.05] * 20, rel=1e-4)


def test_steps_below_the_precision_of_bf16_add_up() -> None:
    """A step of 1e-5 of an entry is below half a unit in its last place: rounded at once, it is lost."""
    factors, plain = (trainable_factors(compressed(dtype=torch.bfloat16)) for _ in range(2))
    start = {name: factor.detach().clone() for name, factor in factors.items()}
    masters = Masters(factors)
    of_entries = {name: math.prod(units(factor)) for name, factor in factors.items()}
    optimizers = [
        torch.optim.AdamW(list(values), lr=rate, weight_decay=0.0)
        for values, rate in ((masters.values.values(), 1e-5), (plain.values(), 1e-6))
    ]
    for _ in range(100):
        for half in range(2):  # of the batch
            for factor in factors.values():
                factor.grad = torch.full_like(factor, 1.0 + half)
            masters.take_gradients_()
        for factor in plain.values():
            factor.grad = torch.full_like(factor, 3.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, master in masters.values.items():
            torch.testing.assert_close(master.grad, 3.0 * of_entries[name])
        optimizers[0].zero_grad()
        masters.write_back_()
    for name, factor in factors.items():
        moved = start[name].float() - 100 * 1e-5 * of_entries[name]
        assert torch.all((factor.float() - moved).abs() <= moved.abs() * 2**-8 + 1e-6)
    lost = torch.cat([(factor == start[name]).flatten() for name, factor in plain.items()])
    assert lost.float().mean() > 0.9


def test_the_best_factors_are_used_and_training_goes_on_without_improvement() -> None:
    config = RecoveryConfig(learning_rate=0.5, batch_size=4, tokens=4 * 12 * 100)
    model = compressed()
    before = {name: factor.detach().clone() for name, factor in trainable_factors(model).items()}
    report = recover_(model, noise(4), noise(4, seed=9), config)
    assert report.steps == 100
    assert report.best_step < report.curve[-1].step == 100
    assert min(point.held_out_loss for point in report.curve) == report.loss_after
    if report.best_step == 0:
        for name, factor in trainable_factors(model).items():
            assert torch.equal(factor, before[name])


def test_the_curve_and_its_notifications() -> None:
    notes: list[str] = []
    bars: list[tuple[str, int, int]] = []
    report, _ = recovered(notify=notes.append, progress=lambda *bar: bars.append(bar))
    assert [point.step for point in report.curve] == list(range(0, 21, 2))
    assert [point.tokens for point in report.curve] == [48 * step for step in range(0, 21, 2)]
    assert report.curve[0].training_loss is None
    assert all(point.training_loss is not None for point in report.curve[1:])
    assert notes[0] == f"step 0 of 20: held-out loss {report.loss_before:.4f}"
    assert notes[1].startswith(f"step 2 of 20: held-out loss {report.curve[1].held_out_loss:.4f}, training loss ")
    assert bars == [("recovery", step, 20) for step in range(1, 21)]
    document = report.to_dict()
    assert document["steps"] == 20
    assert document["data"]["training tokens"] == 120
    assert set(document["seconds"]) == {"identity", "held-out loss", "training"}


@pytest.mark.parametrize("steps", [1, 2, 30, 100])
def test_the_learning_rate_warms_up_and_decays(steps: int) -> None:
    rates = [learning_rate_at(step, steps, 2.0) for step in range(steps)]
    warm = math.ceil(steps / 20)
    assert rates[:warm] == pytest.approx([2.0 * (i + 1) / warm for i in range(warm)])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert max(rates) == 2.0
    assert min(rates) > 0
    if steps == 100:
        assert rates[-1] < 0.01


def test_the_number_of_steps_follows_from_the_tokens() -> None:
    sequences = learnable(10)
    assert planned_steps(sequences, RecoveryConfig(batch_size=4)) == (4, 2)  # 2.5, to the even
    assert planned_steps(sequences, RecoveryConfig(batch_size=4, tokens=1200)) == (4, 25)
    assert planned_steps(sequences, RecoveryConfig(batch_size=100)) == (100, 1)


@pytest.mark.parametrize(("held_out", "evaluated"), [(12, [0, 4]), (6, [0, 2, 4]), (1, [0, 1, 2, 3, 4])])
def test_evaluations_take_no_longer_than_the_training(held_out: int, evaluated: list[int]) -> None:
    report = recover_(compressed(), learnable(4), learnable(held_out, seed=1))
    assert [point.step for point in report.curve] == evaluated


@pytest.mark.parametrize(("passes", "planned"), [(1, (1, 10)), (30, (3, 100)), (160, (16, 100)), (400, (16, 250))])
def test_little_text_is_learnt_in_small_steps(passes: int, planned: tuple[int, int]) -> None:
    sequences = learnable(10)
    tokens = passes * sum(len(item.input_ids) for item in sequences)
    assert planned_steps(sequences, RecoveryConfig(tokens=tokens)) == planned


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive number"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"micro_batch_size": -1}, "micro_batch_size must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecoveryConfig(**values)


def test_models_and_data_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no low-rank linears to train"):
        recover_(tiny_model("llama"), TRAIN, HELD_OUT)
    model = compressed()
    layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    layer.U = nn.Parameter(layer.U.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"U has the dtype torch\.int8"):
        recover_(model, TRAIN, HELD_OUT)
    with pytest.raises(ValueError, match="gradients overflow in float16; load the model in bfloat16 or float32"):
        recover_(compressed(dtype=torch.float16), TRAIN, HELD_OUT)
    with pytest.raises(ValueError, match="got 10 sequences and 0 held out"):
        recover_(compressed(), TRAIN, [])
    with pytest.raises(ValueError, match="129 tokens, the model has 128 positions"):
        recover_(compressed(), TRAIN, noise(1, 129))
    with pytest.raises(ValueError, match=f"teacher has a vocabulary of 9 tokens, the model one of {VOCABULARY}: take"):
        recover_(compressed(), TRAIN, HELD_OUT, teacher=tiny_model("llama", vocab_size=9))


def test_a_diverging_training_raises() -> None:
    with pytest.raises(NonFiniteError, match=r"learning_rate|after \d+ steps"):
        recovered(config=RecoveryConfig(learning_rate=1e30, batch_size=4, tokens=960))


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "INTERVAL", 0.0)
    monkeypatch.setattr(run_folder, "WRITE_FRACTION", math.inf)


def stop_after(count: int) -> Callable[[str, int, int], None]:
    def progress(step: str, done: int, total: int) -> None:
        if done == count:
            raise Killed

    return progress


def in_folder(folder: Path, *, seed: int = 0, **options: Any) -> tuple[RecoveryReport, dict[str, Tensor]]:
    notify = options.setdefault("notify", lambda text: None)
    config = dataclasses.replace(CONFIG, seed=seed)
    with RecoveryState(folder, notify=notify) as state:
        return recovered(state=state, config=config, **options)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "out.partial"
    expected, weights = recovered(dtype)
    for count in (4, 9, 20):  # after a point of the curve, between two, at the end
        with pytest.raises(Killed):
            in_folder(folder, dtype=dtype, progress=stop_after(count))
    notes: list[str] = []
    report, again = in_folder(folder, dtype=dtype, notify=notes.append)
    assert "after 19 of 20 steps" in notes[0]
    assert report.curve == expected.curve
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.items())
    assert report.seconds["training"] > 0
    assert not folder.exists()


@pytest.mark.usefixtures("every_step")
def test_ctrl_c_leaves_the_run_folder_and_notifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_recovery.Killed", KeyboardInterrupt)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        in_folder(tmp_path / "out.partial", progress=stop_after(3), notify=notes.append)
    assert notes[-1].endswith(f"stored in {tmp_path / 'out.partial'}")
    assert in_folder(tmp_path / "out.partial")[0].curve[-1].step == 20


@pytest.mark.usefixtures("every_step")
def test_a_run_folder_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    with pytest.raises(Killed):
        in_folder(folder, progress=stop_after(3))
    with pytest.raises(ResumeError, match="seed is 1, expected 0"):
        in_folder(folder, seed=1)
    with pytest.raises(ResumeError, match="model dtype is bfloat16, expected float32"):
        in_folder(folder, dtype=torch.bfloat16)
    with pytest.raises(ResumeError, match=r"teacher weights is \w{8}\.\.\., expected None"):
        in_folder(folder, teacher=tiny_model("llama"))
    path = stored(folder, "training")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ResumeError, match="its checksum is wrong"):
        in_folder(folder)


def test_snapshots_are_written_at_most_once_per_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    store = RecoveryState.write
    monkeypatch.setattr(
        RecoveryState,
        "write",
        lambda self, stem, tensors, notes: (written.append(notes["step"]), store(self, stem, tensors, notes))[1],
    )
    in_folder(tmp_path / "out.partial")
    assert written == [1, 20]  # the first, as nothing was written before, and the last


def in_process(processes: Processes) -> tuple[RecoveryReport, dict[str, Tensor]]:
    with pytest.raises(DistributedError, match="the request"):
        recovered(processes=processes, config=dataclasses.replace(CONFIG, seed=processes.rank))
    return recovered(processes=processes)


@pytest.mark.slow
def test_processes_that_share_a_batch_give_the_result_of_one() -> None:
    alone, weights = recovered()
    outcomes = many_processes.run(in_process)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        report, theirs = outcome.value
        assert [p.held_out_loss for p in report.curve] == pytest.approx(
            [p.held_out_loss for p in alone.curve], abs=1e-3
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-3)
            assert torch.equal(tensor, outcomes[0].value[1][name])


@pytest.fixture
def mixed_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``accelerate launch --mixed_precision bf16`` says to the process that it starts."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("mixed_precision")
def test_the_mixed_precision_of_accelerate_is_used() -> None:
    model, seen = compressed(), set[tuple[bool, torch.dtype]]()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.register_forward_hook(lambda module, args, y: seen.add((torch.is_grad_enabled(), y.dtype)))
    report = recover_(model, TRAIN, HELD_OUT, CONFIG)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}  # training, and the loss of what will be saved
    assert layer.U.dtype == torch.float32
    assert report.loss_after < report.loss_before - 0.03
