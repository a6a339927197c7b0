"""The options of ``grasp compress``, grouped by the method that they belong to."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grasp.cli.arguments import MOST

if TYPE_CHECKING:
    from grasp.config import GraspConfig

# The panels of `grasp compress --help`. They appear in the order in which the command takes their options.
_target = partial(typer.Option, rich_help_panel="Target (at most one)")
_method = partial(typer.Option, rich_help_panel="Method")
_best = partial(typer.Option, rich_help_panel="Method: best")
_paper = partial(typer.Option, rich_help_panel="Method: paper")
_calibration = partial(typer.Option, rich_help_panel="Calibration")

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Folder for the checkpoint; new or empty.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only print sweeps, FLOPs, time, memory and disk. Reads no weights, writes nothing."
    ),
]

CompressionRatio = Annotated[
    float | None, _target(help="Fraction of the whole model's parameters to remove. Without a target: 0.2.")
]
TargetBytes = Annotated[str | None, _target(metavar="BYTES", help="Size of all weights, such as 200MB.")]
TargetLatency = Annotated[
    float | None, _target(help="Time per decoded token, as a fraction of the dense model's. Only best has it.")
]
NumLayers = Annotated[
    int | None,
    _target(max=MOST, help="Compress this many layers, or remove some (best): those with the least block influence."),
]
Layers = Annotated[
    str | None, _target(metavar="LIST", help="Compress these layers, such as 3,12-17, or remove some (best).")
]

Preset = Annotated[
    str,
    _method(
        metavar="best|paper",
        help="best: the lowest perplexity measured so far. paper: GRASP as published (arXiv 2501.00339).",
    ),
]
RetainRatio = Annotated[
    float | None,
    _method(
        help="Fraction of parameters to keep; 0.1 by default. paper: of each matrix. best: of all layers that "
        "--layers or --num-layers names, which it needs."
    ),
]
Schedule = Annotated[
    str | None,
    _method(
        metavar="NAME",
        help="When statistics are taken. best: progressive (default) or single-sweep. paper: sequential (default), "
        "per-layer (half the time) or single-sweep.",
    ),
]
SweepDtype = Annotated[
    str | None,
    _method(metavar="DTYPE", help="Run calibration sweeps in bfloat16 or float32. Default: the model's dtype."),
]

Refit = Annotated[
    bool | None,
    _best("--refit/--no-refit", help="Also try fitting the left factors to the dense model's outputs. Default: refit."),
]
Form = Annotated[
    str | None,
    _best(
        metavar="pivoted|factored",
        help="How low-rank weights are stored. pivoted (default): higher ranks in the same size. factored: U and Vh.",
    ),
]
Bits = Annotated[
    str | None,
    _best(
        metavar="8|4|fp8|auto",
        help="Quantise the result: bits of low-rank and dense linears; the output layer has 8. fp8 is for GPUs: it has "
        "no CPU kernel. auto: whatever reaches --target-bytes or --target-latency with the least loss, by linear.",
    ),
]
BitsDense = Annotated[
    str | None, _best(metavar="8|4|fp8", help="Bits of the linears that stay dense, if others than --bits.")
]
Costs = Annotated[
    str | None,
    _best(
        metavar="FILE|CARD",
        help="Times for --target-latency: a file of grasp bench costs, or a card such as H100. Default: measured now. "
        "With --dry-run, a card also gives the time of the compression.",
    ),
]

ThresholdRatio = Annotated[
    float | None,
    _paper(help="Instead of --retain-ratio: keep the fewest singular groups with this fraction of the importance."),
]
Metric = Annotated[
    str | None, _paper(metavar="NAME", help="Importance of a singular group: taylor (default) or gradient.")
]

Calibration = Annotated[str, _calibration(metavar="FILE|NAME", help="A text file, wikitext2, c4, or builtin.")]
NumSamples = Annotated[int, _calibration(max=MOST, help="Number of sequences.")]
SeqLen = Annotated[int, _calibration(max=MOST, help="Tokens per sequence.")]
BatchSize = Annotated[
    str, _calibration(metavar="INTEGER|auto", help="Sequences per forward pass; auto: the most that fit.")
]
Seed = Annotated[int, _calibration(min=-MOST, max=MOST, help="Which sequences are drawn.")]

_run = partial(typer.Option, rich_help_panel="Run", metavar="SIZE")
Memory = Annotated[
    str | None,
    _run(help="Memory that may be used above the loaded model, such as 12GB. Default: 90 % of what is then free."),
]
HostMemory = Annotated[
    str | None, _run(help="Beside a GPU: CPU memory that may be used, such as 40GB. Default: 90 % of what is free.")
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard", help="Under torchrun: spread the weights over the processes (FSDP2).", rich_help_panel="Run"
    ),
]


def configuration(preset: str, **options: Any) -> GraspConfig:
    """Build the configuration of a preset from command line options; ``None`` means that an option was not given.

    Raises:
        ValueError: if the preset is unknown, lacks an option that was given, or refuses the values.
    """
    from grasp.config import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in options.items() if value is not None}
    known = {name: signature(constructor).parameters for name, constructor in PRESETS.items()}
    for name in given.keys() - known[preset].keys():
        owners = " or ".join(owner for owner in PRESETS if name in known[owner])
        raise ValueError(f"--{name.replace('_', '-')} is an option of --preset {owners}, got --preset {preset}")
    return PRESETS[preset](**given)
