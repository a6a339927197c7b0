"""The Trainer of transformers on a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from grasp.recovery import trainable_factors
from tests.lowrank_models import assert_same_state, compressed_model, logits, pivoted_model, ranks
from tests.tiny_models import tiny_batches

STEPS = 12


def train(model: PreTrainedModel, folder: Path, resume: bool = False) -> tuple[Trainer, list[float]]:
    """Train on eight sequences, four per step, and return the losses of the steps; a checkpoint is half-way."""
    rows = torch.cat(tiny_batches(4))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("factors_only", [True, False])
def test_the_loss_falls_only_the_given_parameters_change_and_the_result_loads(
    tmp_path: Path, factors_only: bool
) -> None:
    pivoted_model().save_pretrained(tmp_path / "small")  # layer 1 is pivoted, layer 2 factored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    if factors_only:
        model.requires_grad_(False)
        for factor in trainable_factors(model).values():
            factor.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer, losses = train(model, tmp_path / "out")
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trainable_factors(model) if factors_only else before)
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert ranks(loaded) == ranks(pivoted_model())
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_a_resumed_training_of_a_pivoted_model_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, resumed = pivoted_model(), pivoted_model()
    train(whole, tmp_path / "out")
    for factor in trainable_factors(resumed).values():
        factor.data.zero_()  # the checkpoint has the factors
    train(resumed, tmp_path / "out", resume=True)
    assert_same_state(resumed, whole)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    tokens, gradients = tiny_batches(1)[0], []
    for checkpointing in (False, True):
        model = compressed_model("qwen2").train()
        if checkpointing:
            kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before 5.25
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**options)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)
