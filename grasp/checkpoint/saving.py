"""Writes compressed models as ordinary transformers checkpoints, which plain ``from_pretrained`` loads again."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from grasp.errors import CheckpointError
from grasp.model.hf_quantizer import mark_compressed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SPARE_BYTES = 32 * 2**20  # room for tokenizer, configuration and file headers


def check_directory(directory: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path of a folder that a checkpoint can be written to; nothing is created.

    Raises:
        CheckpointError: if it is a file, or a folder that is not empty, unless ``overwrite`` and it is a checkpoint.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output folder {directory} is a file; give a new or an empty folder")
    if target == Path.cwd() or target.is_mount():
        raise CheckpointError(
            f"output folder {directory} is the current directory or a mount point, which cannot be put in place in one "
            "step; give a folder in it"
        )
    parent = _nearest(target.parent)
    if not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"output folder {directory} cannot be made: {parent} is not writable; give another folder"
        )
    held = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if held and not overwrite:
        raise CheckpointError(
            f"output folder {directory} is not empty, it holds {len(held)} entries, {held[0]} among them; give a new "
            "or an empty folder"
        )
    if held and "config.json" not in held:
        raise CheckpointError(
            f"output folder {directory} would be overwritten, but has no config.json, so it is no checkpoint; give "
            "another folder"
        )
    return target


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder in one step: it is complete or, if this fails or is interrupted, not there.

    Args:
        model: compressed or not.
        directory: new or empty; its parents are made.
        tokenizer: saved beside the model.
        card: text of README.md, see ``model_card``; ``None`` writes none.
        extra_files: file name → text.
        overwrite: replace a checkpoint that is there.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: as ``check_directory`` does; if there is too little space, or the files cannot be written.
        ValueError: if the name of an extra file has a folder in it, or is one of the checkpoint's own.
    """
    target = check_directory(directory, overwrite=overwrite)
    texts = dict(extra_files or {})
    mark_compressed(model)
    require_space(target, model.get_memory_footprint() + sum(len(text.encode()) for text in texts.values()))
    with _written_whole(target) as folder:
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, text in texts.items():
            if Path(name).name != name or (folder / name).exists():
                raise ValueError(f"extra file {name!r} must be a plain name, and none of the checkpoint's own files")
            (folder / name).write_text(text, encoding="utf-8")
        _share_as_configured(folder)
    return target


def _share_as_configured(folder: Path) -> None:
    """Let whoever may read the configuration read the weights: safetensors writes them for their owner alone."""
    mode = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def require_space(target: Path, needed: int) -> None:
    """Check that the disk of a folder, which need not exist yet, has ``needed`` bytes and some to spare.

    Raises:
        CheckpointError: if it does not.
    """
    free = shutil.disk_usage(_nearest(target)).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"writing {target} needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room "
            "or give a folder on another disk"
        )


def remove_abandoned(target: Path) -> None:
    """Remove the half-written folders that a killed ``save_checkpoint`` left beside ``target``."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.????????.partial"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end of a block that succeeds, and else vanishes."""
    made = [folder for folder in target.parents if not folder.exists()]
    mark = uuid.uuid4().hex[:8]
    folder = target.with_name(f".{target.name}.{mark}.partial")
    replaced = target.with_name(f".{target.name}.{mark}.old")
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except BaseException as error:
        if replaced.exists():
            shutil.rmtree(replaced) if target.exists() else replaced.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(
                f"writing {target} failed, nothing was left behind: {error}. Make room, or give a folder that can be "
                "written to."
            ) from error
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
