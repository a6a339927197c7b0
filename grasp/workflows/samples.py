"""The calibration sequences of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from grasp.builtin import BUILTIN
from grasp.calibration import NAMED_TEXTS, batches_and_others, read_pieces
from grasp.checkpoint.card import is_hub_name
from grasp.compression.candidates import HELD_OUT
from grasp.model.batch import CalibrationBatch
from grasp.progress import Notify, no_notify


@dataclass(frozen=True)
class Samples:
    """Which sequences are drawn from which text."""

    source: str = BUILTIN  # a text as ``grasp.calibration.read_text`` takes it
    num_samples: int = 128  # number of sequences
    seq_len: int = 512  # tokens per sequence
    # sequences per forward pass; ``"auto"`` for the largest that fits (``grasp.compression.batch_size``)
    batch_size: int | Literal["auto"] = 1
    seed: int = 0  # selects the sequences

    def __str__(self) -> str:
        text = self.source if self.source in NAMED_TEXTS else "a text file"
        return f"{self.num_samples} sequences of {self.seq_len} tokens of {text} (seed {self.seed})"


def read_for(samples: Samples, notify: Notify) -> Iterable[str]:
    """Read a text, of a large file enough for the sequences and as much again, where those held out come from.

    Raises:
        GraspError: as ``read_pieces``.
    """
    return read_pieces(samples.source, tokens=2 * samples.num_samples * samples.seq_len, notify=notify)


def draw(
    tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], samples: Samples, notify: Notify = no_notify
) -> tuple[list[CalibrationBatch], list[CalibrationBatch]]:
    """Draw the token batches, and an eighth as many to hold out of other sequences; ``notify`` says if they are fewer.

    The batch size must be a number.
    """
    assert samples.batch_size != "auto"
    wanted = -(-samples.num_samples // HELD_OUT)
    drawn, held_out = batches_and_others(
        tokenizer,
        text,
        num_samples=samples.num_samples,
        seq_len=samples.seq_len,
        batch_size=samples.batch_size,
        seed=samples.seed,
        others=wanted,
    )
    if (count := sum(len(batch.input_ids) for batch in held_out)) < wanted:
        notify(
            f"the text has room for {count} of {wanted} held-out sequences beside {samples.num_samples} that it is "
            f"calibrated on{'' if count else ', so no candidates are compared'}; give more text or fewer sequences"
        )
    return drawn, held_out


def public_model_name(name: str) -> str:
    """Return a model's name for publication: a folder or file without its parent folders."""
    return name if is_hub_name(name) else Path(name).name


def public_text_name(source: str) -> str:
    """Return a text's name for publication: a file without its folder."""
    return source if source in NAMED_TEXTS else Path(source).name
