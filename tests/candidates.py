"""Candidates of a compression that a test lets lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grasp.compression import held_out
from grasp.compression.candidates import Candidate


def losing(is_bad: Callable[[Candidate], bool]) -> Callable[..., float]:
    """What ``held_out._measured`` does, with 100 nats more for some of the candidates."""
    measured = held_out._measured

    def spoilt(run: Any, start: Any, selections: Any, candidate: Candidate) -> float:
        return measured(run, start, selections, candidate) + 100 * is_bad(candidate)

    return spoilt


def is_narrowed(candidate: Candidate) -> bool:
    """Whether it is of a model whose MLPs have lost channels."""
    return candidate.name.startswith("narrowed")


def is_whole(candidate: Candidate) -> bool:
    """Whether it saves something, and is of the model with all channels."""
    return candidate.name != "dense" and not is_narrowed(candidate)
