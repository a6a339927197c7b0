"""Uploads a compressed checkpoint to the Hugging Face hub."""

from __future__ import annotations

import json
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
from grasp.progress import Progress, no_progress

# Reading any of these can run code, and whoever loads the repository might.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill")
# What is not part of the checkpoint: unfinished work, and whatever is hidden, such as .env files and caches.
_IGNORED = ["*.partial", "*.partial/*", ".*", "*/.*"]
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MOST_WORDS = 300  # characters of the hub's own message
_REMEDIES = {
    401: "the token is not valid: run `hf auth login` again, or set HF_TOKEN",
    403: "the token may not write there: make one with write access at huggingface.co/settings/tokens, check the name",
    404: "there is no such user or organisation, or the token may not see it: check the name",
    409: "somebody changed the repository meanwhile: run the same command again",
    429: "too many requests: wait, then run the same command again",
}
# The hub's client lets its HTTP library's errors through, and that library's name depends on the version.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)


def push(directory: str | Path, repo_id: str, *, private: bool = False, progress: Progress = no_progress) -> str:
    """Upload a checkpoint folder into a model repository, which is made where it is not there, in one commit.

    A folder without a model card gets one first. After a failure the same call continues: files whose content the hub
    has already are not sent again. The token is the hub client's own (``hf auth login`` or HF_TOKEN).

    Args:
        directory: what ``grasp compress`` or ``save_pretrained`` wrote; see ``require_complete``.
        repo_id: ``owner/name``.
        private: make a new repository private; one that is there must be.
        progress: called before and after the upload.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: as ``require_complete`` does.
        HubError: if there is no token, the hub refuses, or cannot be reached; if the repository is there and public,
            but ``private`` was asked for.
    """
    folder = Path(directory).expanduser()
    found = require_complete(folder)
    token = get_token()
    if token is None:
        raise HubError("no token for the hub: run `hf auth login`, or set the environment variable HF_TOKEN")
    _require_card(folder, found)
    api = HfApi()
    progress("upload", 0, 1)
    with _explained(repo_id, token):
        address = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        public = private and not api.model_info(address.repo_id).private
    if public:
        raise HubError(
            f"{repo_id} is there and public; nothing was uploaded. Make it private there, or give another name"
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
    """Check that a folder is a whole compressed checkpoint and nothing that nobody should load.

    Raises:
        CheckpointError: if tensors, the tokenizer or shards are missing, nothing is low-rank, or a file is a pickle.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; expected a checkpoint that `grasp compress` wrote")
    found = inspect_checkpoint(folder)
    if not found.modules:
        raise CheckpointError(
            f"{folder} is not compressed: its config.json has no ranks. Give what grasp compress wrote"
        )
    _require_shards(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{folder} has no tokenizer; put one there with tokenizer.save_pretrained")
    for file in sorted(folder.rglob("*")):
        if any(fnmatch(file.name.lower(), pattern) for pattern in _PICKLES) and not _ignored(file.relative_to(folder)):
            raise CheckpointError(
                f"{file} may be a pickle, which can run code when read; only safetensors are uploaded. Remove it"
            )
    return found


def _require_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error}); save the model again") from error
    if missing := sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file()):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, {missing[0]} among them; save again"
        )


def _ignored(path: Path) -> bool:
    return any(fnmatch(path.as_posix(), pattern) for pattern in _IGNORED)


def _require_card(folder: Path, found: Inspection) -> None:
    """Write the card if there is none, and check that the hub can read it."""
    file = folder / "README.md"
    if not file.is_file():
        asked = str(found.report.request.get("model", "")) if found.report else ""
        base_model = BUILTIN_NAME if asked == BUILTIN else asked or None
        license = BUILTIN_LICENSE if asked == BUILTIN else read_license(base_model) if base_model else {}
        write_whole(file, folder_card(folder, base_model=base_model, license=license))
    read_card(file.read_text(encoding="utf-8"))


@contextmanager
def _explained(repo_id: str, token: str) -> Iterator[None]:
    """Say what to do where the hub's client fails in the block. The token is kept out of the message, come what may."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository; expected owner/name: {_words(error, token)}") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except _HUB_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = _REMEDIES.get(status or 0, "run the same command again: what is there already is not sent again")
        raise HubError(
            f"uploading to {repo_id} on {constants.ENDPOINT} failed ({_words(error, token)}); {remedy}"
        ) from None


def _words(error: Exception, token: str) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace(token, "***")
    return text if len(text) <= _MOST_WORDS else text[:_MOST_WORDS] + "…"
