"""Which calibration sequences are drawn from a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from grasp.builtin import BUILTIN
from grasp.calibration import NAMED_TEXTS, token_batches
from grasp.checkpoint.card import is_hub_name
from grasp.model.batch import CalibrationBatch


@dataclass(frozen=True)
class Samples:
    """Which calibration sequences: a text source as ``read_text`` takes it, how many, how long, in which batches.

    With ``batch_size="auto"`` these are as large as the device has room for, see ``grasp.compression.batch_size``.
    """

    source: str = BUILTIN
    num_samples: int = 128
    seq_len: int = 512
    batch_size: int | Literal["auto"] = 1
    seed: int = 0


def draw(tokenizer: PreTrainedTokenizerBase, text: str, samples: Samples) -> list[CalibrationBatch]:
    """The token batches that ``samples``, with a number as batch size, asks for."""
    assert samples.batch_size != "auto"
    return token_batches(
        tokenizer,
        text,
        num_samples=samples.num_samples,
        seq_len=samples.seq_len,
        batch_size=samples.batch_size,
        seed=samples.seed,
    )


def _model_name(name: str) -> str:
    """A model's name as others may read it: a folder or file without the folders it lies in."""
    return name if is_hub_name(name) else Path(name).name


def _text_name(source: str) -> str:
    return source if source in NAMED_TEXTS else Path(source).name
