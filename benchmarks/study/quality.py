"""Perplexity and accuracy of a model compressed by every method, ratio and seed.

For each cell ``python -m benchmarks.study.quality`` loads the dense model, compresses it with the calibration set of
the seed, and measures the perplexity of held-out text, and the loss on each kind of the built-in text. Statistics of
the calibration tokens are gathered once for all cells of a seed. Cells that the output already has are not run again,
so the same command resumes an interrupted study.

The output has one JSON object per line, the fields of ``Cell``. The first line is the dense model, method ``dense``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.study.ledger import Ledger
from benchmarks.study.methods import METHODS, CalibrationSet, Job, Outcome
from benchmarks.study.records import STUDY_RECORDS
from benchmarks.study.records import StudyResult as Cell
from benchmarks.study.records import StudySetting as Setting
from grasp.bench.conditions import ROOT, conditions, measure_card
from grasp.bench.results import append_results, read_results
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, first_token_batches, read_text, tokenize
from grasp.checkpoint.run_state import RunState
from grasp.cli.arguments import parse_bytes
from grasp.errors import GraspError
from grasp.evaluation.lm_eval import evaluate_tasks
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_model
from grasp.model.batch import batches_digest
from grasp.model.running import casting, first_device
from grasp.model.size import model_size
from grasp.model.targets import vocabulary_size
from grasp.progress import Notify
from grasp.workflows.kinds import batches_by_kind, losses_by_kind
from grasp.workflows.samples import Samples, draw

Cells = dict[tuple[str, float, int], Cell]  # by method, ratio and seed
DENSE = ("dense", 0.0, 0)  # key of the dense model
OF_EVALUATION = ("text", "window", "windows", "tasks", "limit")  # fields of the setting that calibration does not use


class Study:
    """The dense model and the evaluation text of all cells."""

    def __init__(
        self, setting: Setting, cache: Path, documents: str | None, memory: int | None, notify: Notify
    ) -> None:
        self.setting, self._cache, self._documents, self._memory = setting, cache, documents, memory
        model, self._tokenizer = load_model(setting.model, dtype=setting.weights)
        self.size = model_size(model)
        self._conditions = conditions(measure_card(device := first_device(model), torch.float32), device)
        self._bos, self._vocabulary = bos_for(self._tokenizer), vocabulary_size(model)
        self._calibration: dict[int, CalibrationSet] = {}
        tokens = tokenize(self._tokenizer, read_text(setting.text, split="evaluation"))
        count = None if setting.windows is None else setting.windows * (setting.window - (self._bos is not None))
        self._tokens = tokens[:count]
        self._kinds = batches_by_kind(model, self._tokenizer, setting.window, notify)

    @property
    def dtype(self) -> str | None:
        """The dtype to run the model in, ``None`` for its own."""
        return None if self.setting.dtype == self.setting.weights else self.setting.dtype

    def calibration_set(self, seed: int) -> CalibrationSet:
        """The calibration set of a seed; only the latest one stays in memory."""
        if seed not in self._calibration:
            of, text = self.setting, read_text(self.setting.calibration)
            samples = Samples(of.calibration, of.num_samples, of.seq_len, of.batch_size, seed)
            batches, held_out = draw(self._tokenizer, text, samples)
            first_tokens = first_token_batches(self._tokenizer, batches, vocabulary=self._vocabulary, seed=seed)
            values = {name: value for name, value in asdict(self.setting).items() if name not in OF_EVALUATION}
            # What other code has computed is neither read nor resumed.
            values |= {"seed": seed, "digest": batches_digest(batches), "code": code_digest()}
            fingerprint = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
            self._calibration = {
                seed: CalibrationSet(batches, first_tokens, held_out, self._cache / fingerprint, self.dtype)
            }
        return self._calibration[seed]

    def cell(self, method: str, ratio: float, seed: int, dense: Cell | None) -> Cell:
        """Compress the model and measure it; without ``dense`` measure the dense model itself.

        An interrupted compression is resumed.
        """
        model, key = self._load(), (method, ratio, seed)
        if dense is None:
            return self._measured(key, model)
        calibration = self.calibration_set(seed)
        folder = calibration.folder / re.sub(r"\W+", "-", f"{method} {ratio}")
        with RunState(folder) as state:
            ledger, statistics = Ledger(folder.with_name(f"{folder.name}.json")), calibration.statistics
            statistics.seconds = 0.0

            def note(step: str, done: int, total: int) -> None:
                ledger.note(step, done, total, besides=statistics.seconds)

            share = ratio * self.size.decoder_parameters / self.size.parameters
            outcome = METHODS[method](model, Job(calibration, share, state, self._memory, note))
            note("evaluation", 0, 1)
            cell = dataclasses.replace(
                self._measured(key, model, outcome, dense),
                cpu_seconds=ledger.seconds,
                peak_bytes=ledger.peak_bytes,
                memory=self._memory,
            )
        ledger.remove()
        return cell

    def _measured(
        self,
        key: tuple[str, float, int],
        model: PreTrainedModel,
        outcome: Outcome | None = None,
        dense: Cell | None = None,
    ) -> Cell:
        """The cell of a model, without what its compression took; of the dense model without an outcome."""
        outcome = Outcome() if outcome is None else outcome
        with casting(model, self.dtype):
            measured = perplexity(
                model, self._tokens, window=self.setting.window, batch_size=4, bos_token_id=self._bos
            ).perplexity
            kind_losses = losses_by_kind(model, self._kinds)
            accuracy = self._accuracy(model)
        after = model_size(model)
        return Cell(
            *key,
            setting=without_folders(self.setting),
            removed=1 - after.decoder_parameters / self.size.decoder_parameters,
            parameters=after.parameters,
            perplexity=measured,
            excess=math.log(measured / dense.perplexity) if dense else 0.0,
            cpu_seconds=0.0,
            removed_layers=tuple(sorted(outcome.removed_layers)),
            ranks=outcome.ranks,
            channels=outcome.channels,
            held_out_loss=outcome.held_out_loss,
            scope=outcome.scope,
            pivoted=outcome.pivoted,
            conditions=self._conditions,
            accuracy=accuracy,
            kind_losses=kind_losses,
        )

    def _load(self) -> PreTrainedModel:
        """The dense model, in memory: weights that are mapped from a file are not in memory before they are read."""
        model, _ = load_model(self.setting.model, dtype=self.setting.weights)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model

    def _accuracy(self, model: PreTrainedModel) -> dict[str, float]:
        if not self.setting.tasks:
            return {}
        tasks, limit = self.setting.tasks, self.setting.limit
        results = evaluate_tasks(model, self._tokenizer, tasks, self._documents, limit, batch_size=8)["results"]
        return {task: float(results[task]["acc,none"]) for task in tasks}


def code_digest() -> str:
    """A digest of the sources that compress a model."""
    files = (path for folder in ("grasp", "kernels", "csrc", "benchmarks/study") for path in (ROOT / folder).rglob("*"))
    sources = sorted(path for path in files if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def without_folders(setting: Setting) -> Setting:
    """The setting with the names of its files only."""
    model, calibration, text = (Path(source).name for source in (setting.model, setting.calibration, setting.text))
    return dataclasses.replace(setting, model=model, calibration=calibration, text=text)


def read_cells(path: Path, setting: Setting) -> Cells:
    """The cells that earlier runs of a study have written.

    Raises:
        GraspError: if the file has cells of another study, or is damaged.
    """
    cells: Cells = {}
    for cell in read_results(path, STUDY_RECORDS) if path.exists() else ():
        if not isinstance(cell, Cell):
            raise GraspError(f"{path} has a result of kind {cell.kind}, expected cells of a study; give another file")
        if cell.setting != setting:
            raise GraspError(f"{path} has a study with {cell.setting}, expected {setting}; give another file")
        cells[cell.method, cell.ratio, cell.seed] = cell
    return cells


def excess_table(cells: Cells) -> Table:
    """Mean and standard deviation of the excess over the seeds, for each method and ratio; blank if not run."""
    ratios = sorted({ratio for _, ratio, _ in cells if ratio})
    result = Table(
        "method", *(f"{ratio:.1%} removed" for ratio in ratios), "CPU seconds", title="nats per token over dense"
    )
    for method in METHODS:
        row = [[cell for (m, r, _), cell in cells.items() if (m, r) == (method, ratio)] for ratio in ratios]
        if any(row):
            seconds = [cell.cpu_seconds for seeds in row for cell in seeds]
            result.add_row(method, *map(_excess, row), f"{statistics.median(seconds):.0f}")
    return result


def accuracy_table(cells: Cells) -> Table:
    """Mean accuracy over the seeds for each method, ratio and task."""
    tasks = next(iter(cells.values())).setting.tasks
    result = Table("method", "removed", *tasks, title="accuracy")
    for method in ("dense", *METHODS):
        for ratio in sorted({ratio for name, ratio, _ in cells if name == method}):
            seeds = [cell for (name, r, _), cell in cells.items() if (name, r) == (method, ratio)]
            means = (statistics.mean(cell.accuracy[task] for cell in seeds) for task in tasks)
            result.add_row(method, f"{seeds[0].removed:.1%}", *(f"{mean:.3f}" for mean in means))
    return result


def kinds_table(cells: Cells) -> Table:
    """The mean excess over the kinds of built-in text, and that of the worst one, for each method and ratio.

    Both of the means over the seeds. Older cells have no such losses and are left out.
    """
    dense = cells[DENSE].kind_losses
    result = Table("method", "removed", "mean", "worst", "worst on", title="nats per token over dense, kinds of text")
    for method in METHODS:
        for ratio in sorted({ratio for name, ratio, _ in cells if name == method}):
            seeds = [cell for (name, r, _), cell in cells.items() if (name, r) == (method, ratio) and cell.kind_losses]
            if seeds:
                means = {kind: statistics.mean(cell.kind_losses[kind] for cell in seeds) for kind in dense}
                excess = {kind: mean - dense[kind] for kind, mean in means.items()}
                worst = max(excess, key=excess.__getitem__)
                values = f"{statistics.mean(excess.values()):.3f}", f"{excess[worst]:.3f}"
                result.add_row(method, f"{seeds[0].removed:.1%}", *values, worst)
    return result


def _excess(cells: list[Cell]) -> str:
    if not cells:
        return ""
    values = [cell.excess for cell in cells]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    removed = statistics.mean(cell.removed for cell in cells)
    note = "" if abs(removed - cells[0].ratio) < 0.005 else f" ({removed:.1%})"
    return f"{statistics.mean(values):.3f}{spread}{note}"


def missing(
    cells: Cells, methods: list[str], ratios: list[float], seeds: list[int]
) -> Iterator[tuple[str, float, int]]:
    """The keys of the cells to run, seed by seed, so that the first seed is complete early."""
    for seed in seeds:
        for ratio in ratios:
            yield from ((method, ratio, seed) for method in methods if (method, ratio, seed) not in cells)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines; a study in this file is resumed.")],
    model: Annotated[str, typer.Option(help="A model as for `grasp compress`.")] = BUILTIN,
    methods: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    ratios: Annotated[
        list[float] | None, typer.Option(help="Fractions of the decoder to remove. Default: 0.1, 0.2, 0.3.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Seeds of calibration sets. Default: 0, 1, 2.")] = None,
    calibration: Annotated[str, typer.Option(help="A text file, wikitext2, c4 or builtin.")] = BUILTIN,
    text: Annotated[str, typer.Option(help="Text for the perplexity; a text file is read whole.")] = BUILTIN,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 24,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 2,
    window: Annotated[int, typer.Option(help="Tokens of the text in one window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Number of windows. Default: the whole text.")] = None,
    dtype: Annotated[str, typer.Option(help="Run the model in bfloat16 or float32.")] = "float32",
    weights: Annotated[str, typer.Option(help="Load and compress the weights in bfloat16 or float32.")] = "float32",
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval to measure too.")] = None,
    tasks_from: Annotated[
        str | None, typer.Option(help="Documents of the tasks, as for `grasp evaluate`. Default: the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task. Default: all.")] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder of statistics and of interrupted compressions, some gigabytes.")
    ] = Path("study-cache"),
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes, help="Memory above the loaded model, such as 8GB. Default: 0.9 of what is free."
        ),
    ] = None,
) -> None:
    """Run the missing cells of a study, and print the tables."""
    console = Console(stderr=True)
    wanted = methods or list(METHODS)
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise typer.BadParameter(f"unknown methods {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    setting = Setting(
        *(model, calibration, text, num_samples, seq_len, batch_size, window, windows, dtype),
        tasks=tuple(tasks or ()),
        limit=limit,
        weights=weights,
    )
    try:
        cells = read_cells(output, without_folders(setting))
        study = Study(setting, cache, tasks_from, memory, lambda line: console.print(line, soft_wrap=True))
        keys = list(missing(cells, wanted, ratios or [0.1, 0.2, 0.3], seeds or [0, 1, 2]))
        for key in keys if DENSE in cells else [DENSE, *keys]:
            cells[key] = cell = study.cell(*key, cells.get(DENSE))
            append_results(output, [cell])
            console.print(f"{cell.method}, {cell.ratio:.1%}, seed {cell.seed}: {cell.excess:.3f} nats", soft_wrap=True)
    except GraspError as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    Console().print(excess_table(cells))
    if cells[DENSE].kind_losses:
        Console().print(kinds_table(cells))
    if tasks:
        Console().print(accuracy_table(cells))


if __name__ == "__main__":
    typer.run(main)
