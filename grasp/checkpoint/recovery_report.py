"""What a recovery did: the report that ``recover_`` returns and checkpoints carry."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FILE_NAME = "recovery.json"


@dataclass(frozen=True)
class Point:
    """Where a training was: optimizer steps and tokens done, and losses in nats per token."""

    step: int
    tokens: int
    held_out_loss: float
    training_loss: float | None  # mean since the point before; ``None`` at the start


@dataclass(frozen=True)
class RecoveryReport:
    """What ``recover_`` did; losses in nats per token."""

    config: Mapping[str, Any]
    factors: int  # how many low-rank linears were trained
    trained_parameters: int
    steps: int  # that were planned
    curve: tuple[Point, ...]  # in the order of the steps, the first before any
    best_step: int  # whose factors were kept; 0 where training did not help
    data: Mapping[str, int | str]  # sequences and tokens in one pass, to train on and held out, and their sha256
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def loss_before(self) -> float:
        """On the held-out sequences."""
        return self.curve[0].held_out_loss

    @property
    def loss_after(self) -> float:
        """On the held-out sequences, of the factors that were kept."""
        return next(point.held_out_loss for point in self.curve if point.step == self.best_step)

    @property
    def steps_done(self) -> int:
        """Fewer than planned where the held-out loss rose for too long."""
        return self.curve[-1].step

    @property
    def tokens(self) -> int:
        """How many tokens were trained on, repeats counted."""
        return self.curve[-1].tokens

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "steps_done": self.steps_done,
            "tokens": self.tokens,
            **json.loads(json.dumps(dataclasses.asdict(self))),
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=2)
