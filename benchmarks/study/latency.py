"""Decoding latency of the models of a study: all cells of a ratio and a seed in turns, one sequence at a time.

Latency depends on shapes alone. ``python -m benchmarks.study.latency`` therefore rebuilds each cell's model from its
ranks and removed layers, with random factors. Before it times the models, it compares every low-rank linear with the
product of its factors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.study.linear_replacement import LINEAR_REPLACEMENT, apply_map_
from benchmarks.study.records import STUDY_RECORDS, StudyLatency, StudyResult
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.costs import require_product
from grasp.bench.decoding import COMPILED, EAGER, TOLERANCE, Case, Key, Timed, difference, time_models
from grasp.bench.percentiles import Percentiles
from grasp.bench.providers import DENSE, ModelProvider
from grasp.bench.results import append_results, check_output, read_results
from grasp.bench.timing import Sample, StopRule
from grasp.builtin import BUILTIN
from grasp.cli.bench_tables import show_results
from grasp.errors import GraspError, ResultsError
from grasp.evaluation.generation import GenerationTime
from grasp.loading import load_model
from grasp.model.grouping import group_linears_
from grasp.model.kernel_linear import use_kernel_
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrow_mlp_
from grasp.model.running import first_device
from grasp.model.targets import all_targets

IN_KERNEL = ", in the kernel"


@torch.no_grad()
def rebuild_(model: PreTrainedModel, cell: StudyResult) -> None:
    """Give a dense model the shapes of a cell's model.

    Raises:
        ResultsError: if the model lacks a linear or layer of the cell.
    """
    for path, width in cell.channels.items():
        mlp = model.get_submodule(path)
        narrow_mlp_(mlp, torch.arange(width), mlp.get_parameter("down_proj.weight")[:, :width])
    linears = {target.name: target.module for target in all_targets(model)}
    if unknown := sorted(set(cell.ranks) - set(linears)):
        raise ResultsError(f"the model has no {unknown[0]}, which {cell.method} made low-rank; give the study's model")
    for name, rank in cell.ranks.items():
        model.set_submodule(name, LowRankLinear.like(linears[name], rank, pivoted=cell.pivoted))
    group_linears_(model)
    if cell.method == LINEAR_REPLACEMENT:  # its map is one more linear if it cannot be merged
        width = model.config.get_text_config(decoder=True).hidden_size
        apply_map_(model, min(cell.removed_layers) - 1, torch.eye(width, dtype=torch.float64))
    remove_layers_(model, cell.removed_layers)


def require_of_model(cells: Sequence[StudyResult], study: Path, model: str, seed: int) -> None:
    """Check that there are cells, and that they belong to the model.

    Raises:
        ResultsError: if not.
    """
    if not any(cell.ratio for cell in cells):
        raise ResultsError(f"{study} has no compressed model of seed {seed}")
    if (studied := cells[0].setting.model) != Path(model).name:
        raise ResultsError(f"{study} is a study of {studied}, got --model {model}; give the study's model")


def require_right(model: PreTrainedModel, method: str) -> None:
    """Raise a ``ResultsError`` if a low-rank linear does not compute the product of its factors, for one token."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            require_product(module, f"{name} of {method}")


def timed_compiled(provider: ModelProvider, case: Case, method: str) -> Timed:
    """A model with compiled steps.

    Raises:
        ResultsError: if their logits are not those of the eager model.
    """
    compiled = Timed.of(provider, COMPILED)
    apart = difference(compiled.logits(case), Timed(provider).logits(case))
    if not apart <= TOLERANCE[provider.model.dtype]:
        raise ResultsError(f"{method} gives other logits when it is compiled, off by {apart:.1e}")
    return compiled


def latencies(
    cells: Sequence[StudyResult],
    times: Mapping[str, list[GenerationTime]],
    dtype: str,
    new_tokens: int,
    now: Conditions,
    mode: str,
) -> Iterator[StudyLatency]:
    """The results of one ratio, the dense model in PyTorch first."""
    decode = {name: Sample(tuple(time.decode_s for time in generations)) for name, generations in times.items()}
    by_method = {cell.method: cell for cell in (dataclasses.replace(cells[0], method=DENSE, ratio=0.0), *cells)}
    for name, sample in decode.items():
        cell = by_method[name.removesuffix(IN_KERNEL)]
        yield StudyLatency(
            model=cell.setting.model,
            method=cell.method,
            ratio=cell.ratio,
            seed=cell.seed,
            dtype=dtype,
            new_tokens=new_tokens,
            inter_token_ms=Percentiles.of([step for time in times[name] for step in time.steps_s]),
            spread=sample.spread,
            of_dense=1 / sample.speedup_over(decode[DENSE]),
            conditions=now,
            kernel=name.endswith(IN_KERNEL),
            mode=mode,
        )


def main(
    study: Annotated[Path, typer.Argument(help="The JSON lines of a study.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines are appended to this file.")],
    model: Annotated[str, typer.Option(help="The study's model.")] = BUILTIN,
    ratios: Annotated[list[float] | None, typer.Option(help="Ratios of the study. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the study.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of the models.")] = "bfloat16",
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps.")] = 24,
    repeats: Annotated[int, typer.Option(help="Turns per model.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's choice.")] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Run the dense linears of all models in the CPU kernel, by use_kernel_.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the steps of all models.")] = False,
) -> None:
    """Time the models of a study."""
    console = Console(stderr=True)
    try:
        check_output(output, STUDY_RECORDS)
        cells = [
            cell for cell in read_results(study, STUDY_RECORDS) if isinstance(cell, StudyResult) and cell.seed == seed
        ]
        require_of_model(cells, study, model, seed)
        if threads is not None:
            torch.set_num_threads(threads)
        dense, _ = load_model(model, dtype=dtype)
        now = conditions(measure_card(first_device(dense), dense.dtype), first_device(dense))
        for ratio in ratios or sorted({cell.ratio for cell in cells if cell.ratio}):
            chosen = [cell for cell in cells if cell.ratio == ratio]
            if not chosen:
                raise ResultsError(f"{study} has no cell of ratio {ratio} and seed {seed}")
            models = {DENSE: dense}
            if kernel:
                models[DENSE + IN_KERNEL] = copy.deepcopy(dense)
            for cell in chosen:
                name = cell.method + IN_KERNEL * kernel
                models[name] = copy.deepcopy(dense)
                rebuild_(models[name], cell)
                require_right(models[name], cell.method)
            for name, changed in models.items():
                if name.endswith(IN_KERNEL):
                    use_kernel_(changed)
            case, mode = Case(1, prompt_tokens, new_tokens, depth=0), COMPILED if compiled else EAGER
            timed = {}
            for name, changed in models.items():
                provider = ModelProvider(changed)
                timed[Key(name, mode)] = timed_compiled(provider, case, name) if compiled else Timed(provider)
            turns = time_models(timed, case, StopRule(repeats))
            times = {key.provider: generations for key, generations in turns.times.items()}
            results = list(latencies(chosen, times, dtype, new_tokens, now, mode))
            append_results(output, results)
            show_results(results)
    except GraspError as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
