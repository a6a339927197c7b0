"""GRASP*: recover quality lost in compression by training only the low-rank factors (arXiv 2501.00339).

Of a quantised model the scales, norms and biases are trained; the stored values of 8 and 4 bits stay.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.checkpoint.fingerprint import model_fingerprint
from grasp.checkpoint.recovery_report import Point, RecoveryReport
from grasp.checkpoint.recovery_state import RecoveryState, Snapshot
from grasp.errors import NonFiniteError
from grasp.method.blocks import fp64_device
from grasp.model.masters import Masters
from grasp.model.quantized_linear import is_quantized
from grasp.model.running import evaluating, first_device
from grasp.model.targets import max_positions, vocabulary_size
from grasp.model.trainable import requiring_gradients, trained_parameters
from grasp.model.trainable import trainable_factors as trainable_factors  # the public name
from grasp.progress import Clock, Notify, Progress, no_notify, no_progress
from grasp.statistics.loss import Teacher, body_of, loss_and_grad, sum_nll
from grasp.statistics.processes import ALONE, Processes
from grasp.training_data import TrainingSequence, collate, digest, shuffled

WARM_UP = 0.05  # fraction of the steps
FACTORS_RATE, SCALES_RATE = 1e-4, 1e-3  # learning rates
MAX_GRAD_NORM = 1.0
# Few steps learn little from little text (docs/tried.md). Without a batch size there are about so many, with so many
# sequences each.
STEPS, BATCH_SIZES = 100, (1, 16)
# Evaluations of the held-out loss, besides the one before training; fewer if they would take longer than the training.
EVALUATIONS = 10


@dataclass(frozen=True)
class RecoveryConfig:
    """Training settings of ``recover_``: AdamW with linear warm-up over 5 % of the steps, then cosine decay to 0.

    Args:
        learning_rate: peak learning rate, relative to the size of an entry's row and column, see
            ``grasp.model.masters``. ``None``: 1e-4 for factors, 1e-3 for the scales of a quantised model. Pivoted
            factors are nearly as many as the weights: 2.5e-4 is too high for those of Gemma-3-270M (docs/tried.md).
            A few factors stand ten times as much.
        tokens: training tokens, repetitions included; ``None`` for about one pass over the sequences.
        batch_size: sequences per optimizer step, over all processes. ``None``: as many as make about 100 steps, from 1
            to 16.
        micro_batch_size: sequences per forward pass; gradients are accumulated. Memory limits it.
        seed: seed of the order of the sequences.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> RecoveryConfig(learning_rate=0)
        Traceback (most recent call last):
        ValueError: learning_rate must be a positive number, got 0
    """

    learning_rate: float | None = None
    tokens: int | None = None
    batch_size: int | None = None
    micro_batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"learning_rate must be a positive number, got {rate}")
        for name in ("tokens", "batch_size", "micro_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def recover_(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    held_out: Sequence[TrainingSequence],
    config: RecoveryConfig | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
    state: RecoveryState | None = None,
    processes: Processes = ALONE,
) -> RecoveryReport:
    """Train what ``trained_parameters`` names of a compressed model in place. All other weights stay unchanged.

    The loss is the mean negative log-likelihood of the counted tokens of a batch. Dropout is off. The optimizer works
    on fp32 copies of bf16 factors, because its steps are smaller than the precision of bf16. The held-out loss is
    evaluated before training and ten times during it, less often if that would take longer than the training. The model
    gets the factors with the lowest held-out loss, or those of the last step if training fails or is interrupted. A
    loss that rises at first may fall at the end, as the rate does, so training does not stop early. ``accelerate launch
    --mixed_precision bf16`` runs the passes under autocast.

    Args:
        model: a model that ``compress_`` or ``quantize_`` has changed, in fp32 or bf16.
        sequences: training sequences, see ``grasp.training_data``.
        held_out: sequences for the held-out loss.
        config: training settings; ``None`` for ``RecoveryConfig()``.
        teacher: a model of the same vocabulary, usually the dense one. If given, the loss is the Kullback-Leibler
            divergence from its distribution of each counted token; the held-out loss stays the likelihood.
        progress: called after each step.
        notify: called with one line of text after each evaluation of the held-out loss.
        state: stores the progress of the training; ``None`` to store nothing.
        processes: the processes that share each batch. All are given the same arguments; gradients are summed.

    Raises:
        UnsupportedModelError: if the model is neither low-rank nor quantised, or its parameters are offloaded.
        ValueError: if the model is fp16, there are no sequences, one is longer than the model has positions, or the
            teacher has another vocabulary.
        NonFiniteError: if a loss or gradient is NaN or infinite.
        ResumeError, DistributedError: from ``state`` and ``processes``.

    Example:
        >>> from grasp import GraspConfig, compress_
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(config)
        >>> _ = compress_(model, [torch.arange(64)[None]], GraspConfig(layers=(1,), retain_ratio=0.5))
        >>> sequences = [TrainingSequence(torch.arange(64), torch.arange(64) > 0)] * 8
        >>> report = recover_(model, sequences, sequences[:1], RecoveryConfig(learning_rate=1e-2, tokens=2048))
        >>> report.loss_after < report.loss_before
        True
    """
    config = RecoveryConfig() if config is None else config
    accelerator = Accelerator(cpu=first_device(model).type == "cpu")
    factors = trained_parameters(model)
    _require_trainable(model, accelerator, sequences, held_out)
    if teacher is not None and vocabulary_size(teacher) != vocabulary_size(model):
        raise ValueError(
            f"the teacher has a vocabulary of {vocabulary_size(teacher)} tokens, the model one of "
            f"{vocabulary_size(model)}: take the dense model that was compressed"
        )
    clock = Clock()
    with evaluating(model), evaluating(model if teacher is None else teacher):
        training = _Training(model, teacher, factors, sequences, held_out, config, accelerator, processes)
        _resume_(training, state, clock)
        with requiring_gradients(factors.values()):
            _train_(training, state, clock, progress, notify)
        training.use_best_factors_()
    return training.report(clock)


def _require_trainable(
    model: PreTrainedModel,
    accelerator: Accelerator,
    sequences: Sequence[TrainingSequence],
    held_out: Sequence[TrainingSequence],
) -> None:
    if model.dtype == torch.float16 or accelerator.mixed_precision == "fp16":
        raise ValueError("gradients overflow in float16; load the model in bfloat16 or float32")
    if not sequences or not held_out:
        raise ValueError(f"got {len(sequences)} sequences and {len(held_out)} held out; expected at least one of each")
    limit, longest = max_positions(model), max(len(item.input_ids) for item in (*sequences, *held_out))
    if limit is not None and longest > limit:
        raise ValueError(f"sequences have {longest} tokens, the model has {limit} positions; use a shorter seq_len")


def _resume_(training: _Training, state: RecoveryState | None, clock: Clock) -> None:
    """Compare the fingerprints of all processes, and load the stored progress if there is a state."""
    clock.enter("identity")
    fingerprint = recovery_fingerprint(
        training.model, training.sequences, training.held_out, training.config, training.teacher
    )
    training.processes.require_same("the request", json.dumps(fingerprint, sort_keys=True))
    if state is None:
        return
    with training.processes.fail_together():
        state.open_run(fingerprint, clock)
    with training.processes.fail_together():  # rank 0 writes only after all processes have read
        if snapshot := state.load():
            training.restore_(snapshot)


def _train_(training: _Training, state: RecoveryState | None, clock: Clock, progress: Progress, notify: Notify) -> None:
    """Take optimizer steps, and evaluate the held-out loss at regular intervals, until the training has ended."""
    start, tokens = time.perf_counter(), training.tokens
    while True:
        if training.evaluation_is_due:
            seconds = time.perf_counter() - start
            clock.enter("held-out loss")
            point = training.evaluate_()
            notify(_describe(point, training.steps, (training.tokens - tokens) / seconds))
            start, tokens = time.perf_counter(), training.tokens
        if training.step == training.steps:
            break
        clock.enter("training")
        training.take_step_()
        progress("recovery", training.step, training.steps)
        if state is not None:
            state.save(training.snapshot)
    if training.step and state is not None:
        state.save(training.snapshot, last=True)


def _describe(point: Point, steps: int, tokens_per_second: float) -> str:
    text = f"step {point.step} of {steps}: held-out loss {point.held_out_loss:.4f}"
    if point.training_loss is None:
        return text
    return f"{text}, training loss {point.training_loss:.4f}, {tokens_per_second:.0f} tokens/s"


@dataclass(eq=False)
class _Training:
    """The state of a training between two steps."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    factors: Mapping[str, nn.Parameter]
    sequences: Sequence[TrainingSequence]
    held_out: Sequence[TrainingSequence]
    config: RecoveryConfig
    accelerator: Accelerator
    processes: Processes

    def __post_init__(self) -> None:
        self.batch_size, self.steps = planned_steps(self.sequences, self.config)
        passes = 3 * self.batch_size * self.steps  # a backward pass takes two
        self.evaluations = min(EVALUATIONS, max(1, passes // len(self.held_out)))
        self.masters = Masters(self.factors)
        self.rate = self.config.learning_rate or (SCALES_RATE if is_quantized(self.model) else FACTORS_RATE)
        self.optimizer = torch.optim.AdamW(list(self.masters.values.values()), lr=self.rate, fused=True)
        self.step = self.tokens = 0
        self.loss, self.targets = 0.0, 0  # summed since the last evaluation
        self.curve: list[Point] = []
        self.best: dict[str, Tensor] = {}  # factors with the lowest held-out loss so far, in the dtype of the model
        self.order = shuffled(len(self.sequences), self.config.seed)

    @property
    def best_step(self) -> int:
        """The first step with the lowest held-out loss."""
        return min(self.curve, key=lambda point: point.held_out_loss).step

    @property
    def evaluation_is_due(self) -> bool:
        """Whether this step is one of those to evaluate and has not been evaluated."""
        steps = {round(i * self.steps / self.evaluations) for i in range(self.evaluations + 1)}
        return self.step in steps and not (self.curve and self.curve[-1].step == self.step)

    def take_step_(self) -> None:
        """Take one step of the optimizer.

        Raises:
            NonFiniteError: if the loss or the gradient is NaN or infinite.
        """
        batch = [self.sequences[index] for index in islice(self.order, self.batch_size)]
        targets = sum(int(item.counts.sum()) for item in batch)
        local = batch[self.processes.rank :: self.processes.size]
        size = self.config.micro_batch_size
        loss = sum(self._accumulate_(local[start : start + size], targets) for start in range(0, len(local), size))
        masters = list(self.masters.values.values())
        for master in masters:
            if master.grad is None:  # this process has no sequences, or the factor does not affect the loss
                master.grad = torch.zeros_like(master)
        total = torch.tensor(loss, dtype=torch.float64, device=fp64_device(masters[0].device))
        self.processes.sum_([total, *(master.grad for master in masters if master.grad is not None)])
        norm = nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise NonFiniteError(
                f"step {self.step} has loss {total.item() / targets} and gradient norm {norm.item()}; use a lower "
                "learning_rate, or check the model and the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.steps, self.rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.write_back_()
        self.step += 1
        self.tokens += sum(len(item.input_ids) for item in batch)
        self.loss, self.targets = self.loss + total.item(), self.targets + targets

    def _accumulate_(self, sequences: Sequence[TrainingSequence], targets: int) -> float:
        """Run a forward and a backward pass, and add the gradient of ``summed loss / targets``; the summed loss."""
        batch = collate(sequences)
        with self.accelerator.autocast():
            body, teacher = body_of(self.model, batch), None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = Teacher(self.teacher, body_of(self.teacher, batch))
            loss, grad = loss_and_grad(self.model, body, batch, teacher)
        body.hidden.backward(grad / targets)
        self.masters.take_gradients_()
        return loss

    def evaluate_(self) -> Point:
        """Add the held-out loss of this step to the curve, and copy the factors if they are the best so far.

        Raises:
            NonFiniteError: if the loss is NaN or infinite.
        """
        local = self.held_out[self.processes.rank :: self.processes.size]
        loss = sum_nll(self.model, (collate([item]) for item in local))
        total = torch.tensor(loss, dtype=torch.float64, device=fp64_device(first_device(self.model)))
        self.processes.sum_([total])
        mean = total.item() / sum(int(item.counts.sum()) for item in self.held_out)
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the held-out loss is {mean} after {self.step} steps; use a lower learning_rate, or check the model "
                "and the data"
            )
        self.curve.append(Point(self.step, self.tokens, mean, self.loss / self.targets if self.targets else None))
        self.loss, self.targets = 0.0, 0
        if self.best_step == self.step:
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}
        return self.curve[-1]

    @torch.no_grad()
    def use_best_factors_(self) -> None:
        """Copy the factors with the lowest held-out loss into the model."""
        for name, factor in self.factors.items():
            factor.copy_(self.best[name])

    def snapshot(self) -> Snapshot:
        """Everything that a resumed training needs."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"best.{name}": factor for name, factor in self.best.items()}
        for index, (name, master) in enumerate(self.masters.values.items()):
            tensors[f"factor.{name}"] = master.detach()
            tensors |= {f"{kind}.{name}": moments[index][kind] for kind in ("exp_avg", "exp_avg_sq")}
        notes = {name: getattr(self, name) for name in ("step", "steps", "tokens", "loss", "targets")}
        return Snapshot(tensors, {**notes, "curve": [dataclasses.asdict(point) for point in self.curve]})

    @torch.no_grad()
    def restore_(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot."""
        tensors, notes = snapshot
        for name in ("step", "tokens", "loss", "targets"):
            setattr(self, name, notes[name])
        self.curve = [Point(**point) for point in notes["curve"]]
        optimizer_state = self.optimizer.state_dict()
        for index, (name, master) in enumerate(self.masters.values.items()):
            master.copy_(tensors[f"factor.{name}"])
            moments = {kind: tensors[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            optimizer_state["state"][index] = {"step": torch.tensor(float(self.step)), **moments}
        self.optimizer.load_state_dict(optimizer_state)
        self.masters.write_back_()
        self.best = {name: tensors[f"best.{name}"].to(factor) for name, factor in self.factors.items()}
        self.order = islice(self.order, self.step * self.batch_size, None)

    def report(self, clock: Clock) -> RecoveryReport:
        """The report of a training that has ended."""
        return RecoveryReport(
            config={**dataclasses.asdict(self.config), "batch_size": self.batch_size, "learning_rate": self.rate},
            distilled=self.teacher is not None,
            factors=sum(name.endswith(".Vh") for name in self.factors),
            trained_parameters=sum(factor.numel() for factor in self.factors.values()),
            steps=self.steps,
            curve=tuple(self.curve),
            best_step=self.best_step,
            data=_sizes_and_digests(self.sequences, self.held_out),
            seconds=clock.seconds,
            versions={name: version(name) for name in ("torch", "transformers", "accelerate")},
        )


def recovery_fingerprint(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    held_out: Sequence[TrainingSequence],
    config: RecoveryConfig,
    teacher: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Everything that the result of ``recover_`` depends on. It takes the same arguments."""
    return {
        "teacher weights": None if teacher is None else model_fingerprint(teacher, {})["model weights"],
        **model_fingerprint(model, dataclasses.asdict(config)),
        "mixed precision": Accelerator(cpu=first_device(model).type == "cpu").mixed_precision,
        **_sizes_and_digests(sequences, held_out),
    }


def _sizes_and_digests(
    sequences: Sequence[TrainingSequence], held_out: Sequence[TrainingSequence]
) -> dict[str, int | str]:
    return {
        "training sequences": len(sequences),
        "training tokens": sum(len(item.input_ids) for item in sequences),
        "training sha256": digest(sequences),
        "held-out sequences": len(held_out),
        "held-out tokens": sum(len(item.input_ids) for item in held_out),
        "held-out sha256": digest(held_out),
    }


def planned_steps(sequences: Sequence[TrainingSequence], config: RecoveryConfig) -> tuple[int, int]:
    """Sequences per step, and steps that train on ``config.tokens`` tokens, given the mean length of the sequences."""
    passes = 1.0 if config.tokens is None else config.tokens / sum(len(item.input_ids) for item in sequences)
    count, (least, most) = passes * len(sequences), BATCH_SIZES
    batch_size = config.batch_size or min(max(least, round(count / STEPS)), most)
    return batch_size, max(1, round(count / batch_size))


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """``peak·(i + 1)/w`` at step i < w = ⌈n/20⌉ of n, then ``peak·(1 + cos(π(i - w)/(n - w)))/2``."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
