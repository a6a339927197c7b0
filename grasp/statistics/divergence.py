"""How far the predictions of changed models are from the dense model's, on few held-out tokens.

The divergence varies far less between texts than the loss does, so few tokens tell changes apart (docs/tried.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.environment import return_freed_memory
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.hidden_states import Scratch
from grasp.statistics.loss import Teacher, divergences
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Prefix, alone, body_after, capture_prefix, propagate

STUDENTS = 8  # so many share the logits that are wanted; their hidden states are held for one batch


@dataclass(frozen=True)
class Reference:
    """The dense model on some batches, which changed models are compared with."""

    prefix: Prefix  # the batches of this process, at layer 0
    wanted: Sequence[Tensor]  # for each of them the hidden states after the last layer of the dense model
    num_targets: int  # tokens that the model predicts, in all processes together
    processes: Processes  # the processes that share the batches

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        *,
        scratch: Scratch | None = None,
        processes: Processes = ALONE,
    ) -> Reference:
        """Run the dense model on some batches, the same in all processes."""
        with processes.fail_together():
            prefix = capture_prefix(model, processes.local_batches(batches), {0}, scratch=scratch)
            wanted = propagate(prefix, range(len(decoder(model).layers)), prefix.hidden[0])
        return cls(prefix, wanted, sum(batch.num_targets for batch in batches), processes)

    def divergences(
        self, students: Sequence[Sequence[Tensor]], progress: Callable[[int], None] = lambda done: None
    ) -> list[float]:
        """The divergence of each student's predictions from the dense model's, in nats per token.

        Args:
            students: of each, for each batch the hidden states after the last layer, (B, L, H).
            progress: called with the number of students that are done.
        """
        with self.processes.fail_together():
            sums = torch.tensor(sum_divergences(self.prefix, students, self.wanted, progress), dtype=torch.float64)
        self.processes.sum_([sums])
        return (sums / self.num_targets).tolist()


def removal_divergences(
    reference: Reference, layers: Sequence[int], removed: Sequence[int] = (), *, progress: Progress = no_progress
) -> dict[int, float]:
    """The divergence that removing one more layer adds once some are ``removed``, in nats per token.

    The layers before the first one that is left out run once for all choices. The model is not changed.

    Args:
        reference: the dense model.
        layers: each is left out in one choice.
        removed: left out in every choice.
        progress: called after each choice.
    """
    prefix, depth = reference.prefix, len(decoder(reference.prefix.model).layers)
    choices = [{*removed, layer} for layer in layers]
    choices += [{*removed}] if removed else []
    students: dict[int, Sequence[Tensor]] = {}
    with reference.processes.fail_together():
        start, hidden = 0, prefix.hidden[0]
        for done, index in enumerate(sorted(range(len(choices)), key=lambda index: min(choices[index])), start=1):
            first = min(choices[index])
            start, hidden = first, propagate(prefix, range(start, first), hidden) if first > start else hidden
            students[index] = propagate(prefix, range(start, depth), hidden, without=choices[index])
            progress("candidates, without one layer", done, len(choices))
    found = reference.divergences([students[index] for index in range(len(choices))])
    before = found.pop() if removed else 0.0
    return {layer: divergence - before for layer, divergence in zip(layers, found, strict=True)}


@torch.no_grad()
def sum_divergences(
    prefix: Prefix,
    students: Sequence[Sequence[Tensor]],
    wanted: Sequence[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The summed divergences of predictions from those that are wanted, ``Σ_t KL(p_t ‖ q_t)``, of all batches, in nats.

    Args:
        prefix: its model and batches.
        students: of each, for each batch the hidden states, (B, L, H), that enter the head, which makes q of them.
        wanted: likewise, for p.
        progress: called with the number of students that are done.
    """
    model, totals = prefix.model, list[float]()
    with alone(prefix, ()):
        for first in range(0, len(students), STUDENTS):
            group = students[first : first + STUDENTS]
            totals += [0.0] * len(group)
            for index, batch in enumerate(prefix.batches):
                teacher = Teacher(model, body_after(prefix, index, wanted[index]))
                bodies = [body_after(prefix, index, hidden[index]) for hidden in group]
                for number, value in enumerate(divergences(model, bodies, batch, teacher), start=first):
                    totals[number] += value
                del teacher, bodies
                return_freed_memory()  # before the next batch
            progress(len(totals))
    return totals
