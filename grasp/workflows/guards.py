"""Checks that several workflows share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from grasp.errors import CalibrationError, GraspError, NonFiniteError, OutOfMemoryError
from grasp.formatting import one_line
from grasp.loading import out_of_memory


def require_known(model: PreTrainedModel, token_ids: torch.Tensor) -> None:
    """Check that the vocabulary of a model has all token ids.

    Raises:
        CalibrationError: if it lacks one.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if token_ids.numel() and (highest := int(token_ids.max())) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens: the tokenizer belongs to "
            "another model. Save the model's own tokenizer with it"
        )


@contextmanager
def within_memory(batch_size: int | str, length: int) -> Iterator[None]:
    """Turn errors of memory and of decompositions in the block into errors with a remedy.

    Raises:
        OutOfMemoryError: if the device has too little memory.
        NonFiniteError: if a decomposition fails.
    """
    try:
        yield
    except GraspError:
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(
            f"a singular value decomposition failed ({one_line(error)}); the weights may be damaged. "
            "Check them, or try --dtype float32 or --device cpu"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"the device has too little memory for batches of {batch_size} x {length} tokens; take a smaller batch, "
            "shorter sequences or windows, --dtype bfloat16, or --device cpu"
        ) from error
