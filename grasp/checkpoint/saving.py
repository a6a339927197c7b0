"""Writes compressed models as ordinary transformers checkpoints, which plain ``from_pretrained`` loads again."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from grasp.errors import CheckpointError
from grasp.files import Contents, contents, expanded, in_use, replacing, require_space, try_writing
from grasp.model.checkpoint_format import read_headers, require_inside
from grasp.model.hf_quantizer import mark_compressed
from grasp.reading import read_json, read_text_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # the files of a model that have its terms


def check_directory(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Return the absolute path of a folder that a checkpoint can be written to; nothing is left behind.

    Raises:
        CheckpointError: if it is a file; a folder that is not empty, unless ``overwrite`` and it is a checkpoint; the
            current directory or a mount point; or in a folder where ``try_writing`` fails.
    """
    target = Path(os.path.realpath(expanded(directory)))  # resolve() fails for a loop of links
    if os.path.lexists(target) and not target.is_dir():
        kind = "a loop of links" if target.is_symlink() else "a file"
        raise CheckpointError(f"output folder {directory} is {kind}; give a new or an empty folder")
    if target == Path.cwd() or os.path.ismount(target):
        raise CheckpointError(
            f"output folder {directory} is the current directory or a mount point, which cannot be replaced in one "
            "step; give a folder inside it"
        )
    try:
        try_writing(target)
    except OSError as error:
        raise CheckpointError(f"output folder {directory} cannot be created: {error}; give another folder") from error
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if names and not overwrite:
        raise CheckpointError(
            f"output folder {directory} is not empty: it holds {len(names)} entries, such as {names[0]}; give a new or "
            "an empty folder"
        )
    if names and "config.json" not in names:
        raise CheckpointError(
            f"output folder {directory} has no config.json, so it is no checkpoint and is not overwritten; give "
            "another folder"
        )
    return target


def has_finished(target: Path, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder is the output of a run with this configuration, as its report, the file ``name``, says."""
    try:
        stored = read_json(target / name, "a report", CheckpointError)["config"]
        return all(stored[key] == value for key, value in config.items() if value is not None)
    except (CheckpointError, LookupError, TypeError):
        return False


def save_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    seen: Contents | None = None,
) -> Path:
    """Write a checkpoint folder in one step, which survives a loss of power; if it fails, nothing changes.

    Args:
        model: compressed or not.
        directory: new or empty; missing parents are created.
        tokenizer: saved beside the model.
        card: text of README.md, see ``model_card``; ``None`` writes none.
        extra_files: file name → text.
        overwrite: replace an existing checkpoint.
        seen: the contents of ``directory`` when ``check_directory`` accepted it, before long work. They are replaced.
            ``None`` checks it now.

    Returns:
        The absolute path of the folder.

    Raises:
        CheckpointError: as ``check_directory``; or if there is too little space, or the files cannot be written.
        OccupiedError: if something else was put there meanwhile. Both stay; the message has the new folder's name.
        ValueError: if the name of an extra file contains a folder, or the checkpoint has a file of that name.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save_checkpoint(model, f"{folder}/small").iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    target = Path(directory)
    if seen is None:
        target = check_directory(directory, overwrite=overwrite)
        seen = contents(target) if overwrite else {}
    texts = {**({} if card is None else {"README.md": card}), **(extra_files or {})}
    mark_compressed(model)
    require_space(target, model.get_memory_footprint() + sum(len(text.encode()) for text in texts.values()))
    with new_folder(target, texts, seen) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return target


@contextmanager
def new_folder(target: Path, texts: Mapping[str, str], seen: Contents) -> Iterator[Path]:
    """Yield an empty folder, which gets some texts and replaces ``target`` in one step when the block succeeds.

    Args:
        target: as ``check_directory`` returns it.
        texts: file name → text.
        seen: the contents of ``target``, which are replaced.

    Raises:
        CheckpointError: if the files cannot be written.
        OccupiedError: as ``save_checkpoint``.
        ValueError: if the name of a text contains a folder, or the block wrote a file of that name.
    """
    try:
        with ExitStack() as until_placed, replacing(target, seen=seen) as folder:
            folder.mkdir()
            until_placed.enter_context(in_use(folder))
            yield folder
            read_headers(folder.glob("*.safetensors"))  # raises if one is cut short
            for name, text in texts.items():
                if Path(name).name != name or (folder / name).exists():
                    raise ValueError(f"extra file {name!r} must be a plain name that no file of the checkpoint has")
                (folder / name).write_text(text, encoding="utf-8")
            for path in (path for path in folder.rglob("*") if path.is_file()):
                path.chmod(folder.stat().st_mode & 0o666)  # as the umask has it; safetensors lets only the owner read
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:  # which tokenizers raises
            raise
        raise CheckpointError(
            f"writing {target} failed, it is as it was before or complete: {error}. Free some space, or give a "
            "writable folder"
        ) from error


def read_texts(directory: Path, patterns: Collection[str]) -> dict[str, str]:
    """The texts of a checkpoint folder that a new one takes over, by name; a missing file is left out.

    Of the files that a pattern with ``*`` matches, folders and files that are not UTF-8, such as a PDF, are left out.

    Raises:
        CheckpointError: if one cannot be read; as ``require_inside``.
    """
    if directory.is_dir():
        require_inside(directory)
    found = [path for pattern in patterns for path in sorted(directory.glob(pattern))]
    paths = [path for path in found if path.name in patterns or not path.is_dir()]
    texts = {}
    for path in paths:
        try:
            texts[path.name] = read_text_file(path, "a text in UTF-8", CheckpointError)
        except CheckpointError as error:
            if path.name in patterns or not isinstance(error.__cause__, UnicodeDecodeError):
                raise
    return texts
