"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp.errors import GraspError


def differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """``"retain_ratio is 0.3, expected 0.2; ..."``; empty where two identities are the same."""
    names = dict.fromkeys((*expected, *got))
    return "; ".join(
        f"{name} is {_short(got.get(name))}, expected {_short(expected.get(name))}"
        for name in names
        if got.get(name) != expected.get(name)
    )


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors: names, shapes, dtypes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def write_whole(output: Path, text: str) -> None:
    """Write beside ``output``, then take its place: it is complete, or as it was.

    Raises:
        GraspError: if it cannot be written.
    """
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise GraspError(f"writing {output} failed, nothing was changed: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
