"""Checks that several workflows share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from grasp.environment import out_of_memory
from grasp.errors import CalibrationError, GraspError, NonFiniteError, OutOfMemoryError
from grasp.formatting import one_line
from grasp.method.storage import Storage
from grasp.model.running import first_device
from grasp.model.targets import vocabulary_size
from grasp_kernels.dispatch import BACKENDS, OpCall, chosen_row, objection


def require_known(model: PreTrainedModel, token_ids: torch.Tensor) -> None:
    """Check that the vocabulary of a model has all token ids.

    Raises:
        CalibrationError: if it lacks one.
    """
    vocabulary = vocabulary_size(model)
    if token_ids.numel() and (highest := int(token_ids.max())) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens: the tokenizer belongs to "
            "another model. Save the model's own tokenizer with it"
        )


def kernel_notice(model: PreTrainedModel, storages: Iterable[Storage]) -> str | None:
    """What to say if no kernel of this machine reads weights that are stored so; ``None`` if all have one."""
    for storage in storages:
        weights = frozenset({storage.numbers})
        call = OpCall("lowrank_linear", first_device(model), model.dtype, rows=1, rank=64, weights=weights)
        if chosen_row(call).name == "reference":
            reasons = [f"{row.name}: {reason}" for row in BACKENDS if (reason := objection(row, call))]
            return (
                f"on this machine each call dequantises {storage} weights, because no kernel reads them "
                f"({'; '.join(reasons)})"
            )
    return None


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
