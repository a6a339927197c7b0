"""Which way of compressing a model costs the least perplexity: methods × ratios × seeds, cell by cell.

Each cell compresses the dense model with the calibration set of a seed and measures the perplexity of held-out text.
What the calibration tokens say is gathered once for all cells of a seed, see ``remembered``. A cell that the output
already has is not run again, so a study that was interrupted goes on where it was.

The output has one JSON object a line, the fields of ``Cell``; the first line is the dense model, method ``dense``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.study.cached_statistics import Remembered
from benchmarks.study.linear_replacement import LINEAR_REPLACEMENT, Streams, capture_streams, replace_block_
from benchmarks.study.records import STUDY_RECORDS
from benchmarks.study.records import StudyResult as Cell
from benchmarks.study.records import StudySetting as Setting
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.results import append_results, read_results
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, read_text, token_batches, tokenize
from grasp.checkpoint.run_state import NoState
from grasp.compress import carry_out_
from grasp.compression.run import start_run
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.evaluation.lm_eval import evaluate_tasks
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_model
from grasp.method.ranks import redundant_layers
from grasp.model.batch import CalibrationBatch, as_batches, batches_digest
from grasp.model.layer_removal import remove_layers_
from grasp.model.running import casting, first_device
from grasp.model.size import model_size
from grasp.model.targets import decoder
from grasp.progress import no_progress
from grasp.statistics.processes import ALONE
from grasp.statistics.redundancy import Redundancy, measure_redundancy

_GLOBAL: dict[str, Any] = {"allocation": "global", "schedule": "single-sweep"}
_SINGLE: dict[str, Any] = {"schedule": "single-sweep"}


class Known(NoState):
    """Redundancy that was measured before."""

    def __init__(self, redundancy: Redundancy) -> None:
        self.redundancy = redundancy


class CalibrationSet:
    """One seed's sequences, and what is known of the dense model from them.

    Args:
        dense: the model.
        batches: of this seed.
        folder: where statistics are kept.
        dtype: in which the model is run over the calibration tokens; ``None`` for its own.
    """

    def __init__(
        self, dense: PreTrainedModel, batches: list[CalibrationBatch], folder: Path, dtype: str | None
    ) -> None:
        self.dense, self.batches, self.dtype = dense, batches, dtype
        self.remembered = Remembered(folder, batches, dtype)
        self._redundancy = folder / "redundancy.json"
        self._streams: Streams | None = None

    @property
    def redundancy(self) -> Redundancy:
        """All scores of the layers."""
        if not self._redundancy.exists():
            with casting(self.dense, self.dtype):
                measured = measure_redundancy(self.dense, self.batches)
            self._redundancy.write_text(json.dumps(measured._asdict()), encoding="utf-8")
        return Redundancy(**json.loads(self._redundancy.read_text(encoding="utf-8")))

    @property
    def streams(self) -> Streams:
        """Hidden states of the dense model."""
        if self._streams is None:
            self._streams = capture_streams(self.dense, self.batches, self.dtype)
        return self._streams


@dataclass(frozen=True)
class Outcome:
    """What a method did to a model."""

    removed_layers: tuple[int, ...] = ()
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)  # by module
    scope: str | None = None


Method = Callable[[PreTrainedModel, CalibrationSet, float], Outcome]  # changes a model; the ratio is of the whole


def compressed(**options: Any) -> Method:
    """``compress_`` with a configuration."""

    def run(model: PreTrainedModel, known: CalibrationSet, ratio: float) -> Outcome:
        config = GraspConfig(compression_ratio=ratio, sweep_dtype=known.dtype, **options)
        state = Known(known.redundancy)
        run = start_run(model, as_batches(known.batches), config, None, no_progress, state, ALONE)
        report = carry_out_(replace(run, gather=known.remembered))
        return Outcome(ranks={m.name: m.rank for m in report.modules if not m.reason}, scope=report.scope)

    return run


def layers_removed(model: PreTrainedModel, known: CalibrationSet, ratio: float) -> Outcome:
    """Delete the most redundant layers, the fewest that remove at least so much."""
    layers = decoder(model).layers
    order = redundant_layers(known.redundancy.layers, len(layers))
    gone = order[: _count(model, order, ratio)]
    remove_layers_(model, gone)
    return Outcome(removed_layers=gone)


def linear_replacement(model: PreTrainedModel, known: CalibrationSet, ratio: float) -> Outcome:
    """Delete the contiguous block that turns the hidden states least, and fit a linear map in its stead."""
    order = redundant_layers(known.redundancy.layers, len(decoder(model).layers))
    return Outcome(removed_layers=replace_block_(model, known.streams, _count(model, order, ratio)))


def _count(model: PreTrainedModel, order: Sequence[int], ratio: float) -> int:
    """How many layers must go to remove a ratio of the whole model."""
    layers = decoder(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    wanted = ratio * model_size(model, layers).parameters
    return next(n for n in range(len(order) + 1) if sum(sizes[i] for i in order[:n]) >= 0.99 * wanted)


METHODS: dict[str, Method] = {
    "layers removed": layers_removed,
    LINEAR_REPLACEMENT: linear_replacement,
    "plain SVD": compressed(metric="magnitude", **_SINGLE),
    "GRASP, one sweep": compressed(**_SINGLE),
    "uniform whitened": compressed(basis="whitened", metric="magnitude", scope="model", **_SINGLE),
    "uniform kfac": compressed(basis="kfac", metric="magnitude", scope="model", **_SINGLE),
    "global kfac, redundant": compressed(basis="kfac", metric="magnitude", scope="redundant", **_GLOBAL),
    "global kfac, model": compressed(basis="kfac", metric="magnitude", scope="model", **_GLOBAL),
    "global kfac, model, refit": compressed(basis="kfac", metric="magnitude", scope="model", refit=True, **_GLOBAL),
    "global kfac, auto, refit": compressed(basis="kfac", metric="magnitude", scope="auto", refit=True, **_GLOBAL),
    "progressive kfac, model": compressed(**GraspConfig.PRESETS["best"] | {"refit": False}),
    "best": compressed(**GraspConfig.PRESETS["best"]),
}


class Bench:
    """The dense model, and the text that its compressed forms are measured on."""

    def __init__(self, setting: Setting, memory: Path, documents: str | None) -> None:
        self.model, self._tokenizer = load_model(setting.model, dtype="float32")
        self.setting, self._memory, self._documents = setting, memory, documents
        self.size = model_size(self.model, decoder(self.model).layers)
        self._bos = bos_for(self._tokenizer)
        self._known: dict[int, CalibrationSet] = {}
        tokens = tokenize(self._tokenizer, read_text(setting.text, split="evaluation"))
        count = None if setting.windows is None else setting.windows * (setting.window - (self._bos is not None))
        self._tokens = tokens[:count]

    @property
    def dtype(self) -> str | None:
        """What to run the model in, where that is not its own."""
        return None if self.setting.dtype == "float32" else self.setting.dtype

    def calibration_set(self, seed: int) -> CalibrationSet:
        """That of one seed; only the latest is kept in memory."""
        if seed not in self._known:
            batches = token_batches(
                self._tokenizer,
                read_text(self.setting.calibration),
                num_samples=self.setting.num_samples,
                seq_len=self.setting.seq_len,
                batch_size=self.setting.batch_size,
                seed=seed,
            )
            what = asdict(self.setting) | {"seed": seed, "digest": batches_digest(batches)}
            names = ("model", "calibration", "num_samples", "seq_len", "batch_size", "dtype", "seed", "digest")
            name = hashlib.sha256(json.dumps([what[key] for key in names]).encode()).hexdigest()[:16]
            self._known = {seed: CalibrationSet(self.model, batches, self._memory / name, self.dtype)}
        return self._known[seed]

    def cell(self, method: str, ratio: float, seed: int, dense: float, now: Conditions) -> Cell:
        """Compress a copy of the model and measure it; ``ratio`` 0 measures the dense one."""
        model, outcome, seconds = copy.deepcopy(self.model), Outcome(), 0.0
        if ratio:
            known = self.calibration_set(seed)
            known.remembered.reset()
            start = time.process_time()
            outcome = METHODS[method](model, known, ratio * self.size.decoder_parameters / self.size.parameters)
            seconds = time.process_time() - start + known.remembered.seconds
        with casting(model, self.dtype):
            measured = perplexity(
                model, self._tokens, window=self.setting.window, batch_size=4, bos_token_id=self._bos
            ).perplexity
            accuracy = self._accuracy(model)
        after = model_size(model, decoder(model).layers)
        return Cell(
            method=method,
            ratio=ratio,
            seed=seed,
            setting=self.setting,
            removed=1 - after.decoder_parameters / self.size.decoder_parameters,
            parameters=after.parameters,
            perplexity=measured,
            excess=math.log(measured / dense) if dense else 0.0,
            cpu_seconds=seconds,
            removed_layers=tuple(sorted(outcome.removed_layers)),
            ranks=outcome.ranks,
            scope=outcome.scope,
            conditions=now,
            accuracy=accuracy,
        )

    def _accuracy(self, model: PreTrainedModel) -> dict[str, float]:
        if not self.setting.tasks:
            return {}
        found = evaluate_tasks(
            model, self._tokenizer, self.setting.tasks, self._documents, self.setting.limit, batch_size=8
        )
        return {task: float(found["results"][task]["acc,none"]) for task in self.setting.tasks}


def read_cells(path: Path, setting: Setting) -> dict[tuple[str, float, int], Cell]:
    """The cells of a study that were run before.

    Raises:
        GraspError: if the file has cells of another study, or is damaged.
    """
    cells: dict[tuple[str, float, int], Cell] = {}
    for cell in read_results(path, STUDY_RECORDS) if path.exists() else ():
        if not isinstance(cell, Cell):
            raise GraspError(f"{path} has a result of kind {cell.kind}, expected a study; give another file")
        found = cell.setting
        if found != setting:
            raise GraspError(f"{path} has a study with {found}, asked for is {setting}; give another file")
        cells[cell.method, cell.ratio, cell.seed] = cell
    return cells


def table(cells: Mapping[tuple[str, float, int], Cell]) -> Table:
    """Mean excess over the seeds, with their spread, for each method and ratio; what was not run is left blank."""
    ratios = sorted({ratio for _, ratio, _ in cells if ratio})
    result = Table(
        "method", *(f"{ratio:.1%} removed" for ratio in ratios), "CPU seconds", title="nats per token over dense"
    )
    for method in METHODS:
        row = [[cell for (m, r, _), cell in cells.items() if (m, r) == (method, ratio)] for ratio in ratios]
        if any(row):
            seconds = [cell.cpu_seconds for found in row for cell in found]
            result.add_row(method, *map(_excess, row), f"{statistics.median(seconds):.0f}")
    return result


def accuracies(cells: Mapping[tuple[str, float, int], Cell]) -> Table:
    """Mean accuracy over the seeds of each task, for each method and ratio."""
    tasks = next(iter(cells.values())).setting.tasks
    result = Table("method", "removed", *tasks, title="accuracy")
    for method in ("dense", *METHODS):
        for ratio in sorted({ratio for name, ratio, _ in cells if name == method}):
            found = [cell for (name, r, _), cell in cells.items() if (name, r) == (method, ratio)]
            means = (statistics.mean(cell.accuracy[task] for cell in found) for task in tasks)
            result.add_row(method, f"{found[0].removed:.1%}", *(f"{mean:.3f}" for mean in means))
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
    cells: Mapping[tuple[str, float, int], Cell], methods: list[str], ratios: list[float], seeds: list[int]
) -> Iterator[tuple[str, float, int]]:
    """What is still to be run, seed by seed, so that a first picture comes early."""
    for seed in seeds:
        for ratio in ratios:
            yield from ((method, ratio, seed) for method in methods if (method, ratio, seed) not in cells)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines; a study there is continued.")],
    model: Annotated[str, typer.Option(help="As `grasp compress` takes it.")] = BUILTIN,
    methods: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    ratios: Annotated[list[float] | None, typer.Option(help="Of the decoder. Default: 0.1, 0.2, 0.3.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Calibration sets. Default: 0, 1, 2.")] = None,
    calibration: Annotated[str, typer.Option(help="A text file, wikitext2, c4 or builtin.")] = BUILTIN,
    text: Annotated[str, typer.Option(help="What the perplexity is of; a text file is read whole.")] = BUILTIN,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 24,
    seq_len: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 2,
    window: Annotated[int, typer.Option(help="Tokens of the text that the model sees at once.")] = 512,
    windows: Annotated[int | None, typer.Option(help="How many of them. Default: the whole text.")] = None,
    dtype: Annotated[str, typer.Option(help="Run the model in bfloat16 or float32.")] = "float32",
    tasks: Annotated[list[str] | None, typer.Option(help="Of lm-eval, measured as well.")] = None,
    tasks_from: Annotated[str | None, typer.Option(help="As `grasp evaluate` takes it. Default: the hub.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task. Default: all.")] = None,
    memory: Annotated[Path, typer.Option(help="Folder for statistics, gigabytes.")] = Path("study-memory"),
) -> None:
    """Run the cells of a study that are missing, and print the table."""
    console = Console(stderr=True)
    wanted = methods or list(METHODS)
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise typer.BadParameter(f"unknown methods {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    setting = Setting(
        *(_name(model), _name(calibration), _name(text), num_samples, seq_len, batch_size, window, windows, dtype),
        tasks=tuple(tasks or ()),
        limit=limit,
    )
    sources = dataclasses.replace(setting, model=model, calibration=calibration, text=text)
    try:
        cells = read_cells(output, setting)
        bench = Bench(sources, memory, tasks_from)
        device = first_device(bench.model)
        now = conditions(measure_card(device, torch.float32), device)
        if ("dense", 0.0, 0) not in cells:
            _keep(cells, output, bench.cell("dense", 0.0, 0, 0.0, now), setting)
        dense = cells["dense", 0.0, 0].perplexity
        for method, ratio, seed in missing(cells, wanted, ratios or [0.1, 0.2, 0.3], seeds or [0, 1, 2]):
            cell = bench.cell(method, ratio, seed, dense, now)
            _keep(cells, output, cell, setting)
            console.print(f"{method}, {ratio:.1%}, seed {seed}: {cell.excess:.3f} nats", soft_wrap=True)
    except GraspError as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    Console().print(table(cells))
    if tasks:
        Console().print(accuracies(cells))


def _name(source: str) -> str:
    """A source without the folders that lead to it."""
    return Path(source).name


def _keep(cells: dict[tuple[str, float, int], Cell], output: Path, cell: Cell, setting: Setting) -> None:
    """Add a cell to the file, as one line in one write."""
    cell = dataclasses.replace(cell, setting=setting)
    cells[cell.method, cell.ratio, cell.seed] = cell
    append_results(output, [cell])


if __name__ == "__main__":
    typer.run(main)
