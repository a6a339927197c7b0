"""GRASP*: what compression cost is partly won back by training the low-rank factors, and nothing else."""

from __future__ import annotations

import dataclasses
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
from grasp.checkpoint.recovery_state import NoRecoveryState, Snapshot
from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import batch_inputs, evaluating, first_device
from grasp.model.targets import max_positions
from grasp.progress import Clock, Notify, Progress, no_notify, no_progress
from grasp.statistics.loss import loss_and_grad, sum_nll, without_head
from grasp.statistics.processes import ALONE, Processes
from grasp.training_data import TrainingSequence, collate, digest, shuffled

WARM_UP = 0.05  # fraction of the steps
MAX_GRAD_NORM = 1.0
EVALUATIONS = 10  # of the held-out loss, after the first
PATIENCE = 3  # so many in a row that are no better than the best end the training
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class RecoveryConfig:
    """How ``recover_`` trains: AdamW, the learning rate rising for a twentieth of the steps, then falling as a cosine.

    Args:
        learning_rate: at its highest. The paper takes 3e-4, for models of 7B parameters.
        tokens: how many to train on, repeats counted; ``None`` for every sequence once.
        batch_size: sequences per step of the optimizer, over all processes.
        micro_batch_size: sequences in one pass, whose gradients are added up; memory limits it.
        seed: the order of the sequences.

    Raises:
        ValueError: if a value is out of range.
    """

    learning_rate: float = 5e-4
    tokens: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("tokens", "batch_size", "micro_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def recover_(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    held_out: Sequence[TrainingSequence],
    config: RecoveryConfig | None = None,
    *,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
    state: NoRecoveryState | None = None,
    processes: Processes = ALONE,
) -> RecoveryReport:
    """Train the factors of a compressed model's low-rank linears, in place; all else stays bit for bit (GRASP*, arXiv
    2501.00339).

    The loss is the mean negative log-likelihood of the tokens that count, over each step's whole batch. Dropout is off.
    A bf16 model is trained through fp32 copies of its factors, which the optimizer works on: the steps are far smaller
    than what bf16 can tell apart. The held-out loss is taken ten times on the way, of the factors as they will be
    saved; those of the lowest are kept, and training ends after three in a row that were no better.

    ``accelerate launch --mixed_precision bf16`` is heeded: passes then run under autocast. If this fails or is
    interrupted, the factors are as the last step left them.

    Args:
        model: compressed, see ``compress_``; fp32 or bf16.
        sequences: to train on, see ``grasp.training_data``.
        held_out: to decide when to stop.
        config: ``None`` for ``RecoveryConfig()``.
        progress: called after each step.
        notify: called with one line whenever the held-out loss was taken.
        state: keeps what is done, see ``RecoveryState``.
        processes: those that share each batch, each given the same; their gradients are added up.

    Raises:
        UnsupportedModelError: if the model has no low-rank linears, or they are offloaded.
        ValueError: if the model is fp16, there are no sequences, or one is longer than the model has positions.
        NonFiniteError: if a loss or gradient is NaN or infinite.
        ResumeError, DistributedError: as ``state`` and ``processes`` do.
    """
    config = RecoveryConfig() if config is None else config
    state = NoRecoveryState() if state is None else state
    accelerator = Accelerator(cpu=first_device(model).type == "cpu")
    factors = trainable_factors(model)
    _require_trainable(model, accelerator, sequences, held_out)
    clock = Clock()
    with evaluating(model):
        run = _Run(model, factors, sequences, held_out, config, accelerator, processes)
        _begin(run, state, clock)
        for parameter in factors.values():
            parameter.requires_grad_(True)
        _train(run, state, clock, progress, notify)
    return run.report(clock)


def trainable_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path → U or Vh, of all low-rank linears.

    Raises:
        UnsupportedModelError: if there are none, or they are offloaded.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    found = {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in ("U", "Vh")}
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no low-rank linears to train; expected a model that grasp has compressed"
        )
    if offloaded := [name for name, parameter in found.items() if parameter.is_meta]:
        raise UnsupportedModelError(f"{offloaded[0]} is offloaded; load the model without offloading to train it")
    return found


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """``p·(i + 1)/w`` in step i of the first ``w = ⌈n/20⌉``, then ``p·(1 + cos(π(i - w)/(n - w)))/2``.

    Args:
        step: i, 0 being the first.
        steps: n, all there are.
        peak: p.
    """
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def planned_steps(sequences: Sequence[TrainingSequence], config: RecoveryConfig) -> int:
    """The steps after which ``config.tokens`` were trained on, sequences being as long as they are on average."""
    passes = 1.0 if config.tokens is None else config.tokens / sum(len(item.input_ids) for item in sequences)
    return max(1, round(passes * len(sequences) / config.batch_size))


class Masters:
    """Factors as the optimizer sees them: in fp32, the model's own where they are wide enough, else copies."""

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        self.factors = factors
        self.values = {
            name: factor if factor.dtype in _WIDE else nn.Parameter(factor.detach().float())
            for name, factor in factors.items()
        }

    def take_gradients_(self) -> None:
        """Add the gradients of a pass, in the model's dtype, to those of the copies, in fp32."""
        for name, factor in self.factors.items():
            master = self.values[name]
            if master is factor or factor.grad is None:
                continue
            if master.grad is None:
                master.grad = factor.grad.float()
            else:
                master.grad += factor.grad
            factor.grad = None

    @torch.no_grad()
    def write_back_(self) -> None:
        """Round the copies to the model's dtype."""
        for name, factor in self.factors.items():
            if self.values[name] is not factor:
                factor.copy_(self.values[name])


class _Run:
    """A training between two steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        factors: Mapping[str, nn.Parameter],
        sequences: Sequence[TrainingSequence],
        held_out: Sequence[TrainingSequence],
        config: RecoveryConfig,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self.model, self.factors, self.config = model, factors, config
        self.sequences, self.held_out = sequences, held_out
        self.accelerator, self.processes = accelerator, processes
        self.steps = planned_steps(sequences, config)
        self.masters = Masters(factors)
        self.optimizer = torch.optim.AdamW(list(self.masters.values.values()), lr=config.learning_rate, fused=True)
        self.step = self.tokens = 0
        self.loss, self.targets = 0.0, 0  # since the last point of the curve
        self.curve: list[Point] = []
        self.best: dict[str, Tensor] = {}  # factors in the model's dtype
        self.order = shuffled(len(sequences), config.seed)

    @property
    def best_step(self) -> int:
        """The first step of the lowest held-out loss."""
        return min(self.curve, key=lambda point: point.held_out_loss).step

    @property
    def at_point(self) -> bool:
        """Whether the held-out loss is to be taken now."""
        return self.step in {round(i * self.steps / EVALUATIONS) for i in range(EVALUATIONS + 1)}

    @property
    def ended(self) -> bool:
        """Whether no step is to follow."""
        worse = len([point for point in self.curve if point.step > self.best_step])
        return self.step == self.steps or worse >= PATIENCE

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            **model_fingerprint(self.model, dataclasses.asdict(self.config)),
            "mixed precision": self.accelerator.mixed_precision,
            **self.data,
        }

    @property
    def data(self) -> dict[str, int | str]:
        """Of one pass."""
        return {
            "training sequences": len(self.sequences),
            "training tokens": sum(len(item.input_ids) for item in self.sequences),
            "training sha256": digest(self.sequences),
            "held-out sequences": len(self.held_out),
            "held-out tokens": sum(len(item.input_ids) for item in self.held_out),
            "held-out sha256": digest(self.held_out),
        }

    def take_step_(self) -> None:
        """One step of the optimizer.

        Raises:
            NonFiniteError: if the loss or the gradient is NaN or infinite.
        """
        whole = [self.sequences[index] for index in islice(self.order, self.config.batch_size)]
        targets = sum(int(item.counts.sum()) for item in whole)
        own = whole[self.processes.rank :: self.processes.size]
        size = self.config.micro_batch_size
        loss = sum(self._pass(own[start : start + size], targets) for start in range(0, len(own), size))
        masters = list(self.masters.values.values())
        for master in masters:
            if master.grad is None:  # nothing of the batch came here, or it does not reach the loss
                master.grad = torch.zeros_like(master)
        summed = torch.tensor(loss, dtype=torch.float64, device=masters[0].device)
        self.processes.sum_([summed, *(master.grad for master in masters if master.grad is not None)])
        norm = nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        if not (math.isfinite(norm) and math.isfinite(summed)):
            raise NonFiniteError(
                f"step {self.step} has the loss {summed.item() / targets} and a gradient of norm {norm.item()}; take a "
                "lower learning_rate, or check the model and the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.steps, self.config.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masters.write_back_()
        self.step += 1
        self.tokens += sum(len(item.input_ids) for item in whole)
        self.loss, self.targets = self.loss + summed.item(), self.targets + targets

    def _pass(self, sequences: Sequence[TrainingSequence], targets: int) -> float:
        """Forward and backward; the summed loss. Gradients are of the loss per token that counts in the whole batch."""
        batch = collate(sequences)
        with self.accelerator.autocast():
            with without_head(self.model) as body:
                self.model(**batch_inputs(self.model, batch), use_cache=False)
            loss, grad = loss_and_grad(self.model, body, batch)
        body.hidden.backward(grad / targets)
        self.masters.take_gradients_()
        return loss

    def take_point(self) -> Point:
        """The held-out loss now, which goes into the curve; factors that are the best so far are remembered.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        own = self.held_out[self.processes.rank :: self.processes.size]
        loss = sum_nll(self.model, (collate([item]) for item in own))
        summed = torch.tensor(loss, dtype=torch.float64, device=first_device(self.model))
        self.processes.sum_([summed])
        mean = summed.item() / sum(int(item.counts.sum()) for item in self.held_out)
        if not math.isfinite(mean):
            raise NonFiniteError(f"the held-out loss is {mean} after {self.step} steps; check the model and the data")
        self.curve.append(Point(self.step, self.tokens, mean, self.loss / self.targets if self.targets else None))
        self.loss, self.targets = 0.0, 0
        if self.best_step == self.step:
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}
        return self.curve[-1]

    def snapshot(self) -> Snapshot:
        """All of it, to go on from."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"best.{name}": factor for name, factor in self.best.items()}
        for index, (name, master) in enumerate(self.masters.values.items()):
            tensors[f"factor.{name}"] = master.detach()
            tensors |= {f"{kind}.{name}": moments[index][kind] for kind in ("exp_avg", "exp_avg_sq")}
        return Snapshot(
            tensors,
            {
                **{name: getattr(self, name) for name in ("step", "steps", "tokens", "loss", "targets")},
                "curve": [dataclasses.asdict(point) for point in self.curve],
            },
        )

    @torch.no_grad()
    def restore_(self, found: Snapshot) -> None:
        """Go on from a snapshot."""
        tensors, notes = found
        for name in ("step", "tokens", "loss", "targets"):
            setattr(self, name, notes[name])
        self.curve = [Point(**point) for point in notes["curve"]]
        kept = self.optimizer.state_dict()
        for index, (name, master) in enumerate(self.masters.values.items()):
            master.copy_(tensors[f"factor.{name}"])
            moments = {kind: tensors[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            kept["state"][index] = {"step": torch.tensor(float(self.step)), **moments}
        self.optimizer.load_state_dict(kept)
        self.masters.write_back_()
        self.best = {name: tensors[f"best.{name}"].to(factor) for name, factor in self.factors.items()}
        self.order = islice(self.order, self.step * self.config.batch_size, None)

    @torch.no_grad()
    def finish_(self) -> None:
        """Put the best factors into the model."""
        for name, factor in self.factors.items():
            factor.copy_(self.best[name])

    def report(self, clock: Clock) -> RecoveryReport:
        """What was done."""
        return RecoveryReport(
            config=dataclasses.asdict(self.config),
            factors=len(self.factors) // 2,
            trained_parameters=sum(factor.numel() for factor in self.factors.values()),
            steps=self.steps,
            curve=tuple(self.curve),
            best_step=self.best_step,
            data=self.data,
            seconds=clock.seconds,
            versions={name: version(name) for name in ("torch", "transformers", "accelerate")},
        )


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
        raise ValueError(f"sequences have {longest} tokens, the model has {limit} positions; take a shorter seq_len")


def _begin(run: _Run, state: NoRecoveryState, clock: Clock) -> None:
    """Go on from what was kept. The first process looks whose it is, before the others read it."""
    clock.enter("identity")
    with run.processes.together():
        if run.processes.first:
            state.begin(run.fingerprint(), clock)
    with run.processes.together():  # nothing is written before all have read
        if found := state.load():
            run.restore_(found)


def _train(run: _Run, state: NoRecoveryState, clock: Clock, progress: Progress, notify: Notify) -> None:
    since, tokens = time.perf_counter(), run.tokens
    while True:
        if run.at_point and not (run.curve and run.curve[-1].step == run.step):
            spent = time.perf_counter() - since
            clock.enter("held-out loss")
            point = run.take_point()
            notify(_line(point, run.steps, (run.tokens - tokens) / spent))
            since, tokens = time.perf_counter(), run.tokens
        if run.ended:
            break
        clock.enter("training")
        run.take_step_()
        progress("recovery", run.step, run.steps)
        state.save(run.snapshot)
    if run.step:
        state.save(run.snapshot, last=True)
    if run.step < run.steps:
        notify(f"the held-out loss was no better {PATIENCE} times in a row: training ends")
        progress("recovery", run.steps, run.steps)
    run.finish_()


def _line(point: Point, steps: int, speed: float) -> str:
    """What one point of the curve says; ``speed`` in tokens per second since the one before."""
    text = f"step {point.step} of {steps}: held-out loss {point.held_out_loss:.4f}"
    if point.training_loss is None:
        return text
    return f"{text}, training loss {point.training_loss:.4f}, {speed:.0f} tokens/s"
