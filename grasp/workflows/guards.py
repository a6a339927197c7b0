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
    """Check that a model has the tokens that a tokenizer gave.

    Raises:
        CalibrationError: if it does not.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if token_ids.numel() and (highest := int(token_ids.max())) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens: the tokenizer does not "
            "belong to the model. Save the model's own tokenizer with it"
        )


@contextmanager
def within_memory(batch_size: int | str, length: int) -> Iterator[None]:
    """Say of the work in the block what to do where it fails for want of memory, or of finite weights.

    Raises:
        OutOfMemoryError, NonFiniteError: with the remedy.
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
