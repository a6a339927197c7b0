"""Which way of compressing a model costs the least perplexity: methods × ratios × seeds, cell by cell.

Each cell compresses the model anew with a calibration set of its own seed and measures the perplexity of held-out text.
A cell that the output already has is not run again, so a study that was interrupted goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grasp.architecture import decoder, first_device
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.results import StudyResult as Cell
from grasp.bench.results import StudySetting as Setting
from grasp.bench.results import append_results, read_results
from grasp.calibration import CalibrationBatch, bos_for, read_text, token_batches, tokenize
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.evaluate import perplexity
from grasp.loading import BUILTIN, load_model
from grasp.redundancy import block_influence
from grasp.removal import remove_layers_
from grasp.report import model_size
from grasp.selection import redundant_layers

Method = Callable[[PreTrainedModel, list[CalibrationBatch], float], None]  # changes a model; the ratio is of the whole

_GLOBAL: dict[str, Any] = {"allocation": "global", "schedule": "single-sweep"}
_SINGLE: dict[str, Any] = {"schedule": "single-sweep"}


def compressed(**options: Any) -> Method:
    """``compress_`` with a configuration."""

    def run(model: PreTrainedModel, batches: list[CalibrationBatch], ratio: float) -> None:
        compress_(model, batches, GraspConfig(compression_ratio=ratio, **options))

    return run


def layers_removed(model: PreTrainedModel, batches: list[CalibrationBatch], ratio: float) -> None:
    """Delete the most redundant layers, the fewest that remove at least so much."""
    layers = decoder(model).layers
    order = redundant_layers(block_influence(model, batches), len(layers))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    wanted = ratio * model_size(model, layers).parameters
    count = next(n for n in range(len(order) + 1) if sum(sizes[i] for i in order[:n]) >= wanted - 0.5)
    remove_layers_(model, order[:count])


METHODS: dict[str, Method] = {
    "layers removed": layers_removed,
    "GRASP": compressed(),
    "GRASP, one sweep": compressed(**_SINGLE),
    "plain SVD": compressed(metric="magnitude", **_SINGLE),
    "uniform whitened": compressed(basis="whitened", metric="magnitude", scope="model", **_SINGLE),
    "uniform kfac": compressed(basis="kfac", metric="magnitude", scope="model", **_SINGLE),
    "global kfac, redundant": compressed(basis="kfac", metric="magnitude", scope="redundant", **_GLOBAL),
    "global kfac, model": compressed(basis="kfac", metric="magnitude", scope="model", **_GLOBAL),
    "global kfac, model, refit": compressed(basis="kfac", metric="magnitude", scope="model", refit=True, **_GLOBAL),
    "best": compressed(**GraspConfig.PRESETS["best"]),
}


def run_cell(method: str, ratio: float, seed: int, setting: Setting, dense: float, now: Conditions) -> Cell:
    """Load the model, compress it and measure it; ``ratio`` 0 measures the dense model against ``dense``."""
    model, tokenizer = load_model(setting.model, dtype="float32")
    layers = decoder(model).layers
    before = model_size(model, layers)
    text = read_text(setting.calibration)
    batches = token_batches(
        tokenizer,
        text,
        num_samples=setting.num_samples,
        seq_len=setting.seq_len,
        batch_size=setting.batch_size,
        seed=seed,
    )
    start = time.perf_counter()
    if ratio:
        METHODS[method](model, batches, ratio * before.decoder_parameters / before.parameters)
    seconds = time.perf_counter() - start
    tokens = tokenize(tokenizer, read_text(setting.text, split="evaluation"))
    bos = bos_for(tokenizer)
    if setting.windows is not None:
        tokens = tokens[: setting.windows * (setting.window - (bos is not None))]
    measured = perplexity(model, tokens, window=setting.window, bos_token_id=bos).perplexity
    after = model_size(model, decoder(model).layers)
    return Cell(
        method=method,
        ratio=ratio,
        seed=seed,
        setting=setting,
        removed=1 - after.decoder_parameters / before.decoder_parameters,
        parameters=after.parameters,
        perplexity=measured,
        excess=math.log(measured / dense) if dense else 0.0,
        seconds=seconds,
        conditions=now,
    )


def read_cells(path: Path, setting: Setting) -> dict[tuple[str, float, int], Cell]:
    """The cells of a study that were run before.

    Raises:
        GraspError: if the file has cells of another study, or is damaged.
    """
    cells: dict[tuple[str, float, int], Cell] = {}
    for cell in read_results(path) if path.exists() else ():
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
        "method", *(f"{ratio:.0%} removed" for ratio in ratios), "seconds", title="nats per token over dense"
    )
    for method in METHODS:
        row = [[cell for (m, r, _), cell in cells.items() if (m, r) == (method, ratio)] for ratio in ratios]
        if any(row):
            seconds = [cell.seconds for found in row for cell in found]
            result.add_row(method, *map(_excess, row), f"{statistics.median(seconds):.0f}")
    return result


def _excess(cells: list[Cell]) -> str:
    if not cells:
        return ""
    values = [cell.excess for cell in cells]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    removed = statistics.mean(cell.removed for cell in cells)
    note = "" if abs(removed - cells[0].ratio) < 0.005 else f" ({removed:.0%})"
    return f"{statistics.mean(values):.3f}{spread}{note}"


def missing(
    cells: Mapping[tuple[str, float, int], Cell], methods: list[str], ratios: list[float], seeds: int
) -> Iterator[tuple[str, float, int]]:
    """What is still to be run, seed by seed, so that a first picture comes early."""
    for seed in range(seeds):
        for ratio in ratios:
            yield from ((method, ratio, seed) for method in methods if (method, ratio, seed) not in cells)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines; a study there is continued.")],
    model: Annotated[str, typer.Option(help="As `grasp compress` takes it.")] = BUILTIN,
    methods: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    ratios: Annotated[list[float] | None, typer.Option(help="Of the decoder. Default: 0.1, 0.2, 0.3.")] = None,
    seeds: Annotated[int, typer.Option(help="Calibration sets.")] = 3,
    calibration: Annotated[str, typer.Option(help="A text file, wikitext2, c4 or builtin.")] = BUILTIN,
    text: Annotated[str, typer.Option(help="What the perplexity is of; a text file is read whole.")] = BUILTIN,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 24,
    seq_len: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 2,
    window: Annotated[int, typer.Option(help="Tokens of the text that the model sees at once.")] = 512,
    windows: Annotated[int | None, typer.Option(help="How many of them. Default: the whole text.")] = None,
) -> None:
    """Run the cells of a study that are missing, and print the table."""
    console = Console(stderr=True)
    wanted = methods or list(METHODS)
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise typer.BadParameter(f"unknown methods {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    setting = Setting(model, _name(calibration), _name(text), num_samples, seq_len, batch_size, window, windows)
    sources = dataclasses.replace(setting, calibration=calibration, text=text)
    try:
        cells = read_cells(output, setting)
        device = first_device(load_model(model, dtype="float32")[0])
        now = conditions(measure_card(device, torch.float32), device)
        if ("dense", 0.0, 0) not in cells:
            _keep(cells, output, run_cell("dense", 0.0, 0, sources, 0.0, now), setting)
        dense = cells["dense", 0.0, 0].perplexity
        for method, ratio, seed in missing(cells, wanted, ratios or [0.1, 0.2, 0.3], seeds):
            console.print(f"{method}, {ratio:.0%}, seed {seed}")
            _keep(cells, output, run_cell(method, ratio, seed, sources, dense, now), setting)
    except GraspError as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    Console().print(table(cells))


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
