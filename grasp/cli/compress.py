"""``grasp compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json, Model, parse_batch_size, parse_bytes, parse_layers
from grasp.cli.processes import started_together
from grasp.cli.root import app


@app.command()
def compress(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the checkpoint; new or empty.", show_default=False)
    ],
    preset: Annotated[
        str, typer.Option(help="Where the settings start: best, the least perplexity; or paper (arXiv 2501.00339).")
    ] = "best",
    compression_ratio: Annotated[
        float | None, typer.Option(help="Fraction of the whole model's parameters to remove. Paper: 0.2.")
    ] = None,
    target_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Instead: what all weights may take, such as 200MB.")
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(help="Instead: time per decoded token, as a fraction of the dense model's."),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|CARD",
            help="Times for --target-latency: of grasp bench costs, or of H100, ... Default: measured.",
        ),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Instead: compress this many layers, the most redundant ones.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Instead: compress these layers, such as 3,12-17.")] = None,
    retain_ratio: Annotated[
        float | None,
        typer.Option(help="Fraction of each matrix's parameters to keep; with a global budget, of all in LAYERS."),
    ] = None,
    threshold_ratio: Annotated[
        float | None, typer.Option(help="Instead: keep the fewest singular groups with this share of the importance.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Importance of a singular group: taylor (paper), gradient, magnitude or fisher.")
    ] = None,
    remove_layers: Annotated[
        bool | None,
        typer.Option("--remove-layers/--keep-layers", help="Also remove whole layers where that loses less."),
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit the left factors to the dense outputs at the end.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="sequential (paper), per-layer (twice as fast), single-sweep (all on the dense model), or progressive "
            "(twice, the second time with a part of the budget spent)."
        ),
    ] = None,
    sweep_dtype: Annotated[
        str | None, typer.Option(help="Run the calibration sweeps in bfloat16. Default: as the model is.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A text file, wikitext2, c4, or builtin.")
    ] = "builtin",
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    batch_size: Annotated[
        str, typer.Option(metavar="INTEGER|auto", help="Sequences in one forward pass; auto: the most that fit.")
    ] = "1",
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Which sequences are drawn.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what this would take: sweeps, FLOPs, time, memory.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: spread the weights over the processes (FSDP2).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL and save it as a checkpoint that transformers loads.

    If this is killed, the same command goes on from where it was: until the end that is kept in OUTPUT.partial.

    [bold]Examples[/bold]

    [dim]Remove a tenth of the parameters; a quick try, offline:[/dim]

    $ grasp compress builtin -o small --compression-ratio 0.1 --num-samples 24

    [dim]Remove a fifth, as in the paper:[/dim]

    $ grasp compress meta-llama/Llama-3.1-8B-Instruct -o small --preset paper --num-samples 512 --calibration wikitext2

    [dim]Layers of your choice, your own text:[/dim]

    $ grasp compress ./my-model -o small --layers 3,12-17 --retain-ratio 0.3 --calibration corpus.txt

    [dim]Decoding in 80 % of the time on this machine, or on an H100:[/dim]

    $ grasp compress builtin -o fast --target-latency 0.8 --num-samples 24
    $ grasp compress ./my-model -o fast --target-latency 0.8 --costs H100

    [dim]What that would take, in time and memory, without reading the weights:[/dim]

    $ grasp compress ./my-model -o small --layers 3,12-17 --retain-ratio 0.3 --batch-size auto --dry-run

    [dim]In two processes, which share the calibration sequences:[/dim]

    $ torchrun --nproc-per-node 2 -m grasp compress builtin -o small --num-layers 2 --num-samples 8
    """
    from grasp.cli import console, tables
    from grasp.config import GraspConfig
    from grasp.workflows.compress import compress as compress_to_folder
    from grasp.workflows.dry_run import plan as plan_compression
    from grasp.workflows.samples import Samples

    choices = {
        "layers": None if layers is None else parse_layers(layers),
        "num_layers": num_layers,
        "compression_ratio": compression_ratio,
        "target_bytes": None if target_bytes is None else parse_bytes(target_bytes),
        "target_latency": target_latency,
        "retain_ratio": retain_ratio,
        "threshold_ratio": threshold_ratio,
        "metric": metric,
        "remove_layers": remove_layers,
        "refit": refit,
        "schedule": schedule,
        "sweep_dtype": sweep_dtype,
    }
    config = GraspConfig.preset(preset, **{name: value for name, value in choices.items() if value is not None})
    samples = Samples(calibration, num_samples, seq_len, parse_batch_size(batch_size), seed)
    if dry_run:
        plan = plan_compression(model, config, samples, dtype=dtype, device=device)
        if as_json:
            console.print_json(plan.to_dict())
        else:
            tables.show_plan(plan)
        return
    with (
        started_together(device, shard=shard) as (processes, place),
        console.step_bars(quiet=not processes.first) as progress,
    ):
        result = compress_to_folder(
            *(model, output, config, samples),
            costs=costs,
            dtype=dtype,
            device=place,
            progress=progress,
            notify=progress.note,
            processes=processes,
        )
    if not processes.first:
        return
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_compression(result)
