"""Uploads a compressed checkpoint to the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging

from grasp.builtin import BUILTIN, BUILTIN_NAME
from grasp.checkpoint import compression_report, recovery_report
from grasp.checkpoint.card import FIGURE, HUB_NAME, folder_card, read_card, read_evaluation, read_license
from grasp.checkpoint.inspection import Inspection, inspect_compressed
from grasp.checkpoint.saving import LICENSES
from grasp.errors import CheckpointError, HubError
from grasp.files import expanded, write_whole
from grasp.hub import BAD_ANSWERS, HUB_ERRORS, hub_status
from grasp.model.checkpoint_format import weight_files
from grasp.progress import Progress, no_progress
from grasp.reading import read_text_file

_TEMPLATES = "additional_chat_templates"
# Besides the weights: what transformers, its tokenizers and this package write, and licences.
_ALLOWED = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", f"{_TEMPLATES}/*.jinja"),
    *("README.md", FIGURE, *LICENSES),
    *(compression_report.FILE_NAME, recovery_report.FILE_NAME),
)
# What an earlier upload may have and a new one may lack; licences stay.
_REPLACED = ("model*.safetensors", *(pattern for pattern in _ALLOWED if pattern not in LICENSES))
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_REMEDIES = {
    401: "the token is not valid: run `hf auth login` again, or set HF_TOKEN",
    403: "the token has no write access: create one that has at huggingface.co/settings/tokens, and check the name",
    404: "the user or organisation does not exist, or the token cannot see it: check the name",
    409: "the repository was changed meanwhile: run the same command again",
    429: "too many requests: wait, then run the same command again",
}
_FAILURES: tuple[type[Exception], ...] = (*HUB_ERRORS, *BAD_ANSWERS, OSError, RuntimeError)


def push(directory: str | Path, repo_id: str, *, private: bool = False, progress: Progress = no_progress) -> str:
    """Upload a checkpoint folder to a model repository in one commit; a missing repository is created.

    The same commit removes what an earlier upload has and the folder has not, but for licences and results:
    transformers would load ``model.safetensors`` in the place of new shards, and another model's chat template. Only
    the files of a checkpoint are sent.
    A folder without a model card gets one first. After a failure, the same call resumes: files that the hub has are not
    sent again. The token is that of the hub's client (``hf auth login`` or HF_TOKEN).

    Args:
        directory: a folder that ``grasp compress`` or ``save_pretrained`` wrote; see ``require_complete``.
        repo_id: ``owner/name``.
        private: create a private repository; an existing one must be private.
        progress: called before and after the upload.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: as ``require_complete``.
        HubError: if there is no token; the hub refuses or cannot be reached; or ``private`` is set and the repository
            is public.

    Example:
        >>> push("missing-folder", "owner/name")
        Traceback (most recent call last):
        grasp.errors.CheckpointError: no folder missing-folder; expected a checkpoint that `grasp compress` wrote
    """
    folder = expanded(directory)
    _require_card(folder, require_pushable(folder, repo_id))
    api = HfApi()
    progress("upload", 0, 1)
    with _explained(repo_id):
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        public = private and not api.model_info(repo_id).private
    if public:
        raise HubError(
            f"{repo_id} exists and is public; nothing was uploaded. Make it private on the hub, or give another name"
        )
    files = checkpoint_files(folder)
    with _explained(repo_id):
        stale = [name for name in api.list_repo_files(repo_id) if _is_replaced(name) and name not in files]
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload a model compressed with GRASP",
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
    progress("upload", 1, 1)
    return f"{constants.ENDPOINT}/{repo_id}"


def _is_replaced(name: str) -> bool:
    """Whether a file of a repository is a part of the checkpoint that an upload replaces."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in _REPLACED)


def require_pushable(folder: Path, repo_id: str) -> Inspection:
    """Check, before anything is changed, that a checkpoint can be uploaded under a name, and that there is a token.

    Raises:
        CheckpointError: as ``require_complete``.
        HubError: if the name is none of a repository, or there is no token.
    """
    checkpoint = require_complete(folder)
    if not HUB_NAME.fullmatch(repo_id):
        raise HubError(f"{repo_id!r} is no repository name; expected owner/name")
    if get_token() is None:
        raise HubError("no token for the hub: run `hf auth login`, or set the environment variable HF_TOKEN")
    return checkpoint


def require_complete(folder: Path) -> Inspection:
    """Check that a folder is a complete compressed checkpoint and contains nothing else.

    Raises:
        CheckpointError: if tensors, the tokenizer or shards are missing, or the model is not compressed; as
            ``checkpoint_files``.
    """
    checkpoint = inspect_compressed(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{folder} has no tokenizer; write one with tokenizer.save_pretrained")
    checkpoint_files(folder)
    return checkpoint


def checkpoint_files(folder: Path) -> list[str]:
    """The names of the files of a checkpoint folder that are uploaded.

    Hidden files, such as caches, and unfinished work (``.partial``) are left out.

    Raises:
        CheckpointError: if the folder has anything else, a link, or a special file.
    """
    allowed = (*_ALLOWED, *(file.name for file in weight_files(folder)))
    templates, names = folder / _TEMPLATES, []
    has_templates = templates.is_dir() and not templates.is_symlink()
    for path in sorted([*folder.iterdir(), *(templates.iterdir() if has_templates else ())]):
        if path.name.startswith(".") or path.suffix == ".partial" or (path == templates and has_templates):
            continue
        name = path.relative_to(folder).as_posix()
        is_result = path.parent == folder and path.suffix == ".json" and read_evaluation(path) is not None
        if not is_result and not any(fnmatchcase(name, pattern) for pattern in allowed):
            raise CheckpointError(
                f"{path} is no part of a checkpoint, so nothing is uploaded; move it out of the folder"
            )
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path} is a link or no file, so nothing is uploaded; put the file itself there")
        names.append(name)
    return names


def _require_card(folder: Path, checkpoint: Inspection) -> None:
    """Write the card if it is missing, and check that the hub can read it."""
    file = folder / "README.md"
    if not file.is_file():
        source = str(checkpoint.report.request.get("model", "")) if checkpoint.report else ""
        base_model = BUILTIN_NAME if source == BUILTIN else source or None
        license = read_license(base_model) if base_model else {}
        write_whole(file, folder_card(checkpoint, base_model=base_model, license=license), seen={})
    read_card(read_text_file(file, "a model card in UTF-8", CheckpointError))


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Raise errors of the hub's client as ``HubError`` with a remedy, and show no text of the server.

    A server can repeat the token in any encoding: in errors, warnings and addresses.
    """
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except _FAILURES as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = _REMEDIES.get(status or 0, "run the same command again: files that the hub has are not sent again")
        reason = hub_status(error) or type(error).__name__
        raise HubError(f"uploading to {repo_id} on {constants.ENDPOINT} failed ({reason}); {remedy}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
