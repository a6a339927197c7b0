"""The report of ``recover_``, which recovered checkpoints contain as ``recovery.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp.checkpoint.compression_report import KindLoss, kinds_of
from grasp.errors import CheckpointError
from grasp.reading import read_json

FILE_NAME = "recovery.json"


@dataclass(frozen=True)
class Point:
    """An evaluation of the held-out loss: optimizer steps and tokens so far, and losses in nats per token."""

    step: int
    tokens: int
    held_out_loss: float
    training_loss: float | None  # mean since the previous evaluation; ``None`` before training


@dataclass(frozen=True)
class RecoveryReport:
    """What ``recover_`` has done; losses in nats per token.

    Attributes:
        config: the ``RecoveryConfig``.
        factors: number of low-rank linears that were trained; 0 for a quantised model.
        trained_parameters: number of parameters in their factors, or of scales, norms and biases.
        steps: optimizer steps.
        curve: the evaluations of the held-out loss, the first one before training.
        best_step: the step with the lowest held-out loss, whose factors the model has; 0 if training did not help.
        data: sequences, tokens and SHA-256 of the training and the held-out sequences.
        distilled: whether the training loss is the divergence from the predictions of a teacher.
        kind_losses: kind of text → nats per token before and after training, on text that training never reads; {} if
            the built-in text is not installed.
        seconds: time per step of the work.
        versions: versions of the libraries.
        run: digest of everything that the result depends on; "" from Python.

    Example:
        >>> curve = (Point(0, 0, 3.5, None), Point(10, 5120, 3.1, 3.3), Point(20, 10240, 3.2, 2.9))
        >>> report = RecoveryReport({}, 7, 4096, steps=20, curve=curve, best_step=10, data={})
        >>> report.loss_before, report.loss_after, report.tokens
        (3.5, 3.1, 10240)
    """

    config: Mapping[str, Any]
    factors: int
    trained_parameters: int
    steps: int
    curve: tuple[Point, ...]
    best_step: int
    data: Mapping[str, int | str]
    distilled: bool = False
    kind_losses: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    run: str = ""

    @property
    def loss_before(self) -> float:
        """Held-out loss before training."""
        return self.curve[0].held_out_loss

    @property
    def loss_after(self) -> float:
        """Held-out loss of the factors that the model has now."""
        return next(point.held_out_loss for point in self.curve if point.step == self.best_step)

    @property
    def tokens(self) -> int:
        """Training tokens, repetitions included."""
        return self.curve[-1].tokens

    @property
    def kinds(self) -> tuple[KindLoss, ...]:
        """The losses by kind of text, the one that gained least first."""
        return kinds_of(self.kind_losses)

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "tokens": self.tokens,
            **json.loads(json.dumps(dataclasses.asdict(self))),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def load(cls, directory: Path) -> RecoveryReport:
        """Read the report of a checkpoint folder.

        Raises:
            CheckpointError: if it cannot be read, or is none.
        """
        path = directory / FILE_NAME
        expected = f"the {FILE_NAME} that `grasp recover` wrote"
        values = read_json(path, expected, CheckpointError)
        try:
            names = [field.name for field in dataclasses.fields(cls)]
            curve = tuple(Point(**point) for point in values["curve"])
            return cls(**{**{name: values[name] for name in names if name in values}, "curve": curve})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no report ({error}); expected {expected}") from error
