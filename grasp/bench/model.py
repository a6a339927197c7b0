"""Time a whole model with low-rank layers against itself dense, with the layers deleted, and with unfused factors.

Speed is what is measured, quality is not: the factors are those of plain SVD at GRASP's ranks, whose shapes are all
that a time depends on. Nothing is timed unless the fused and the unfused model agree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from grasp.architecture import decoder, first_device, layer_targets, replace_module_
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.timing import Sample
from grasp.errors import GraspError, UnsupportedModelError
from grasp.evaluate import GenerationTime, time_generation
from grasp.loading import BUILTIN, DTYPES, load_model
from grasp.modules import LowRankLinear, dense_weight, group_linears_
from grasp.removal import remove_layers_
from grasp.report import model_size
from grasp.selection import break_even_rank, rank_for_retain_ratio

DENSE, REMOVED, COMPRESSED, UNFUSED = "dense", "removed", "compressed", "unfused"
CHECKED_TOKENS = 16
# Relative difference of the logits, norm-wise, between fused and unfused factors that rounding may make.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NOTE = "Factors by plain SVD: speed is measured here, quality is not."


@dataclass(frozen=True)
class Result:
    """One model's speed, one line of the output. One sequence at a time, greedy, with a KV cache."""

    model: str
    provider: str
    dtype: str
    layers: tuple[int, ...]  # that are low-rank or removed in the other models than the dense one
    retain_ratio: float
    prompt_tokens: int
    new_tokens: int
    repeats: int
    parameters: int
    weight_bytes: int
    prefill_tokens_per_s: float  # median
    prefill_spread: float  # distance between the quartiles of the times, fraction of their median
    prefill_speedup_over_dense: float  # repetition by repetition, median
    decode_tokens_per_s: float
    decode_spread: float
    decode_speedup_over_dense: float
    logits_difference: float  # norm-wise and relative, between the fused and the unfused model
    note: str
    conditions: Conditions


class Unfused(nn.Sequential):
    """A low-rank linear as two of PyTorch's: what one has without the ops."""

    def __init__(self, module: LowRankLinear) -> None:
        down = nn.Linear(module.in_features, module.rank, bias=False, device="meta")
        up = nn.Linear(module.rank, module.out_features, bias=module.bias is not None, device="meta")
        down.weight, up.weight, up.bias = module.Vh, module.U, module.bias  # type: ignore[assignment]
        super().__init__(down, up)


@torch.no_grad()
def truncate_(model: PreTrainedModel, layers: Sequence[int], retain_ratio: float) -> None:
    """Replace the linears of ``layers`` by their largest singular groups, of the ranks that GRASP would give them.

    Raises:
        UnsupportedModelError: if there is nothing to replace.
    """
    targets = [target for layer in layers for target in layer_targets(model, layer)[0]]
    shapes = {target.name: (shape[0], shape[1]) for target in targets if (shape := dense_weight(target.module).shape)}
    targets = [target for target in targets if break_even_rank(shapes[target.name]) >= 1]
    if not targets:
        raise UnsupportedModelError(f"layers {list(layers)} hold no linear that low-rank factors make smaller")
    for target in track(targets, "truncating", console=Console(stderr=True)):
        groups = torch.arange(rank_for_retain_ratio(shapes[target.name], retain_ratio))
        replace_module_(model, target.name, LowRankLinear.from_dense(target.module, groups))
    group_linears_(model)


def unfuse_(model: nn.Module) -> None:
    """Replace every low-rank linear by two linears of PyTorch with the same parameters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            replace_module_(model, name, Unfused(module))


@torch.inference_mode()
def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """How far the logits of two models are apart on a short random prompt, norm-wise, relative to the second's."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    got, expected = (each(input_ids=prompt.to(first_device(each))).logits.double() for each in (model, other))
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def providers(
    dense: PreTrainedModel, layers: Sequence[int], retain_ratio: float
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """The models to time, sharing no weights, and those that cannot be, with the reason."""
    compressed, removed = copy.deepcopy(dense), copy.deepcopy(dense)
    truncate_(compressed, layers, retain_ratio)
    unfused = copy.deepcopy(compressed)
    unfuse_(unfused)
    models = {DENSE: dense, REMOVED: removed, COMPRESSED: compressed, UNFUSED: unfused}
    try:
        remove_layers_(removed, layers)
    except (UnsupportedModelError, ValueError) as error:
        del models[REMOVED]
        return models, {REMOVED: str(error)}
    return models, {}


def take_turns(
    models: Mapping[str, PreTrainedModel], *, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict[str, list[GenerationTime]]:
    """Time all models in turn, each repetition starting with another; the first repetition warms up and is left out."""
    names = list(models)
    times: dict[str, list[GenerationTime]] = {name: [] for name in names}
    for repetition in track(range(repeats + 1), "timing", console=Console(stderr=True)):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(time_generation(models[name], prompt_tokens=prompt_tokens, new_tokens=new_tokens))
    return {name: each[1:] for name, each in times.items()}


def result_table(results: Sequence[Result]) -> Table:
    """The providers of one model."""
    first = results[0]
    table = Table(
        title=f"{first.model}, {first.dtype}, layers {', '.join(map(str, first.layers))} at {first.retain_ratio:.0%}, "
        f"{first.prompt_tokens} + {first.new_tokens} tokens",
        title_justify="left",
    )
    table.add_column("provider", min_width=10)
    for heading in ("MB", "prefill/s", "IQR", "× dense", "decode/s", "IQR", "× dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.provider,
            f"{result.weight_bytes / 1e6:.1f}",
            f"{result.prefill_tokens_per_s:.1f}",
            f"{result.prefill_spread:.0%}",
            f"{result.prefill_speedup_over_dense:.2f}",
            f"{result.decode_tokens_per_s:.1f}",
            f"{result.decode_spread:.0%}",
            f"{result.decode_speedup_over_dense:.2f}",
        )
    return table


def parse_layers(text: str | None, num_layers: int, depth: int) -> list[int]:
    """The layers asked for, ``"3,4,5"``, or the ``num_layers`` in the middle of ``depth``.

    Raises:
        typer.BadParameter: if the model has no such layers.
    """
    if text is None:
        if num_layers > depth:
            raise typer.BadParameter(f"the model has {depth} decoder layers, got --num-layers {num_layers}")
        first = (depth - num_layers) // 2
        return list(range(first, first + num_layers))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"--layers takes indices joined by commas, got {text!r}") from error
    if layers[0] < 0 or layers[-1] >= depth:
        raise typer.BadParameter(f"the model has decoder layers 0..{depth - 1}, got --layers {text}")
    return layers


def _samples(times: Sequence[GenerationTime]) -> tuple[Sample, Sample]:
    return Sample(tuple(t.prefill_s for t in times)), Sample(tuple(t.decode_s for t in times))


def main(
    model: Annotated[str, typer.Argument(help="Hub name, folder, GGUF file, or builtin.")] = BUILTIN,
    num_layers: Annotated[int, typer.Option(min=1, help="How many layers in the middle are low-rank.")] = 6,
    layers: Annotated[str | None, typer.Option(help="These instead, as 3,4,5.")] = None,
    retain_ratio: Annotated[float, typer.Option(min=1e-6, max=1, help="Parameters kept of each matrix.")] = 0.1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every model gets its turn.")] = 5,
    dtype: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(DTYPES)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if left out.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time a model with low-rank layers against itself dense, with the layers deleted, and with unfused factors.

    Example: python -m grasp.bench.model builtin --num-layers 6 --threads 1 -o model.jsonl
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    try:
        dense, _ = load_model(model, dtype=dtype)
        chosen = parse_layers(layers, num_layers, len(decoder(dense).layers))
        models, left_out = providers(dense, chosen, retain_ratio)
    except (GraspError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    apart = difference(models[COMPRESSED], models[UNFUSED])
    if not apart <= TOLERANCE[dense.dtype]:
        console.print(f"WRONG: the logits of {COMPRESSED} and {UNFUSED} differ by {apart:.1e}, nothing was timed")
        raise typer.Exit(1)
    device = first_device(dense)
    now = conditions(measure_card(device, dense.dtype), device)
    try:
        times = take_turns(models, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    dense_prefill, dense_decode = _samples(times[DENSE])
    results = []
    for name, each in models.items():
        size, (prefill, decode) = model_size(each, decoder(each).layers), _samples(times[name])
        result = Result(
            model,
            name,
            str(dense.dtype).removeprefix("torch."),
            tuple(chosen),
            retain_ratio,
            prompt_tokens,
            new_tokens,
            repeats,
            parameters=size.parameters,
            weight_bytes=size.bytes,
            prefill_tokens_per_s=prompt_tokens / prefill.median,
            prefill_spread=prefill.spread,
            prefill_speedup_over_dense=prefill.speedup_over(dense_prefill),
            decode_tokens_per_s=new_tokens / decode.median,
            decode_spread=decode.spread,
            decode_speedup_over_dense=decode.speedup_over(dense_decode),
            logits_difference=apart,
            note=NOTE,
            conditions=now,
        )
        results.append(result)
    console.print(f"{now.device}, threads: {now.threads}, logits of fused and unfused factors differ by {apart:.0e}")
    console.print(result_table(results))
    for name, reason in left_out.items():
        console.print(f"Not measured: {name}: {reason}", highlight=False)
    console.print(f"Medians in tokens per second; IQR is the distance between the quartiles of the times. {NOTE}")
    if output is not None:
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(result)) + "\n" for result in results)


if __name__ == "__main__":
    typer.run(main)
