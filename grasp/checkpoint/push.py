"""Uploads a compressed checkpoint to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from grasp.builtin import BUILTIN, BUILTIN_LICENSE, BUILTIN_NAME
from grasp.checkpoint.card import folder_card, read_card, read_license
from grasp.checkpoint.inspection import Inspection, inspect_checkpoint
from grasp.errors import CheckpointError, HubError
from grasp.files import write_whole
from grasp.formatting import one_line
from grasp.progress import Progress, no_progress

# Reading any of these can run code on the machine of whoever loads the repository.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill")
# No part of a checkpoint: unfinished work, and hidden files such as .env and caches.
_IGNORED = ["*.partial", "*.partial/*", ".*", "*/.*"]
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_REMEDIES = {
    401: "the token is not valid: run `hf auth login` again, or set HF_TOKEN",
    403: "the token has no write access: create one that has at huggingface.co/settings/tokens, and check the name",
    404: "the user or organisation does not exist, or the token cannot see it: check the name",
    409: "the repository was changed meanwhile: run the same command again",
    429: "too many requests: wait, then run the same command again",
}
# The hub's client passes on the errors of its HTTP library, which differs between versions.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)


def push(directory: str | Path, repo_id: str, *, private: bool = False, progress: Progress = no_progress) -> str:
    """Upload a checkpoint folder to a model repository in one commit; a missing repository is created.

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
    folder = Path(directory).expanduser()
    checkpoint = require_complete(folder)
    token = get_token()
    if token is None:
        raise HubError("no token for the hub: run `hf auth login`, or set the environment variable HF_TOKEN")
    _require_card(folder, checkpoint)
    api = HfApi()
    progress("upload", 0, 1)
    with _explained(repo_id, token):
        address = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        public = private and not api.model_info(address.repo_id).private
    if public:
        raise HubError(
            f"{repo_id} exists and is public; nothing was uploaded. Make it private on the hub, or give another name"
        )
    with _explained(repo_id, token):
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Upload a model compressed with GRASP",
            ignore_patterns=list(_IGNORED),
        )
    progress("upload", 1, 1)
    return str(address)


def require_complete(folder: Path) -> Inspection:
    """Check that a folder is a complete compressed checkpoint and contains no pickle.

    Raises:
        CheckpointError: if tensors, the tokenizer or shards are missing, no layer is low-rank, or a file is a pickle.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; expected a checkpoint that `grasp compress` wrote")
    checkpoint = inspect_checkpoint(folder)
    if not checkpoint.modules:
        raise CheckpointError(
            f"{folder} is not compressed: its config.json has no ranks. Give a folder that `grasp compress` wrote"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{folder} has no tokenizer; write one with tokenizer.save_pretrained")
    for file in sorted(folder.rglob("*")):
        if any(fnmatch(file.name.lower(), pattern) for pattern in _PICKLES) and not _ignored(file.relative_to(folder)):
            raise CheckpointError(
                f"{file} may be a pickle, which can run code when read; only safetensors are uploaded. Remove it"
            )
    return checkpoint


def _ignored(path: Path) -> bool:
    return any(fnmatch(path.as_posix(), pattern) for pattern in _IGNORED)


def _require_card(folder: Path, checkpoint: Inspection) -> None:
    """Write the card if it is missing, and check that the hub can read it."""
    file = folder / "README.md"
    if not file.is_file():
        source = str(checkpoint.report.request.get("model", "")) if checkpoint.report else ""
        base_model = BUILTIN_NAME if source == BUILTIN else source or None
        license = BUILTIN_LICENSE if source == BUILTIN else read_license(base_model) if base_model else {}
        write_whole(file, folder_card(folder, base_model=base_model, license=license))
    read_card(file.read_text(encoding="utf-8"))


@contextmanager
def _explained(repo_id: str, token: str) -> Iterator[None]:
    """Raise errors of the hub's client as ``HubError`` with a remedy and without the token."""

    def message(error: Exception) -> str:
        return one_line(f"{type(error).__name__}: {error}".replace(token, "***"))

    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository name; expected owner/name: {message(error)}") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except _HUB_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = _REMEDIES.get(status or 0, "run the same command again: files that the hub has are not sent again")
        raise HubError(f"uploading to {repo_id} on {constants.ENDPOINT} failed ({message(error)}); {remedy}") from None
