"""``grasp compress``."""

from __future__ import annotations

import os
from typing import Any

from grasp.cli import compress_options as option
from grasp.cli.arguments import Device, Dtype, Json, Model, parse_batch_size, parse_bits, parse_bytes, parse_layers
from grasp.cli.processes import started_together, world_size
from grasp.cli.root import app


@app.command()
def compress(
    model: Model,
    output: option.Output,
    compression_ratio: option.CompressionRatio = None,
    target_bytes: option.TargetBytes = None,
    target_latency: option.TargetLatency = None,
    num_layers: option.NumLayers = None,
    layers: option.Layers = None,
    preset: option.Preset = "best",
    retain_ratio: option.RetainRatio = None,
    schedule: option.Schedule = None,
    sweep_dtype: option.SweepDtype = None,
    refit: option.Refit = None,
    form: option.Form = None,
    bits: option.Bits = None,
    bits_dense: option.BitsDense = None,
    costs: option.Costs = None,
    threshold_ratio: option.ThresholdRatio = None,
    metric: option.Metric = None,
    calibration: option.Calibration = "builtin",
    num_samples: option.NumSamples = 128,
    seq_len: option.SeqLen = 512,
    batch_size: option.BatchSize = "1",
    seed: option.Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    memory: option.Memory = None,
    host_memory: option.HostMemory = None,
    shard: option.Shard = False,
    dry_run: option.DryRun = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL and save it as a checkpoint that transformers loads.

    If interrupted, run the same command again to resume. Progress is stored in OUTPUT.partial until the run finishes.

    [bold]Examples[/bold]

    [dim]Remove a tenth of the parameters; a quick try, offline:[/dim]

    $ grasp compress builtin -o small --compression-ratio 0.1 --num-samples 24

    [dim]Remove a fifth, with at most 20 GB of memory above the model's:[/dim]

    $ grasp compress meta-llama/Llama-3.1-8B-Instruct -o small --calibration wikitext2 --memory 20GB

    [dim]As in the paper:[/dim]

    $ grasp compress ./my-model -o small --preset paper --num-samples 512 --calibration wikitext2

    [dim]Named layers, calibrated on a text file:[/dim]

    $ grasp compress ./my-model -o small --layers 3,12-17 --retain-ratio 0.3 --calibration corpus.txt

    [dim]Decode in 80 % of the time on this machine, or on an H100:[/dim]

    $ grasp compress builtin -o fast --target-latency 0.8 --num-samples 24
    $ grasp compress builtin -o faster --target-latency 0.5 --bits 8 --num-samples 24
    $ grasp compress ./my-model -o fast --target-latency 0.8 --costs H100

    [dim]In 100 MB, with the ranks and bits that lose least:[/dim]

    $ grasp compress builtin -o tiny --target-bytes 100MB --bits auto --num-samples 24

    [dim]In 12 GB beside the model; estimate time, memory and disk first:[/dim]

    $ grasp compress ./my-model -o small --memory 12GB --dry-run
    $ grasp compress ./my-model -o small --memory 12GB

    [dim]Two processes share the calibration sequences:[/dim]

    $ torchrun --nproc-per-node 2 -m grasp compress builtin -o small --num-layers 2 --num-samples 8
    """
    config = option.configuration(
        preset,
        compression_ratio=compression_ratio,
        target_bytes=None if target_bytes is None else parse_bytes(target_bytes),
        target_latency=target_latency,
        num_layers=num_layers,
        layers=None if layers is None else parse_layers(layers),
        retain_ratio=retain_ratio,
        schedule=schedule,
        sweep_dtype=sweep_dtype,
        refit=refit,
        form=form,
        bits=bits and parse_bits(bits),
        bits_dense=bits_dense and parse_bits(bits_dense),
        threshold_ratio=threshold_ratio,
        metric=metric,
    )
    from grasp.cli import console, tables  # these bring torch, which takes seconds
    from grasp.workflows.compress import compress as compress_to_folder
    from grasp.workflows.dry_run import dry_run as estimate
    from grasp.workflows.samples import Samples

    samples = Samples(calibration, num_samples, seq_len, parse_batch_size(batch_size), seed)
    job = (model, output, config, samples)
    options: dict[str, Any] = {
        "costs": costs,
        "dtype": dtype,
        "memory": None if memory is None else parse_bytes(memory),
        "host_memory": None if host_memory is None else parse_bytes(host_memory),
    }
    if dry_run:
        if os.environ.get("RANK", "0") == "0":  # of several processes only the first shows anything
            number = world_size()
            plan = estimate(*job, processes=number, sharded=shard and number > 1, device=device, **options)
            console.print_result(plan, tables.show_dry_run, as_json=as_json)
            if shard and number == 1 and not as_json:
                console.print_text(
                    "--shard: this is for one process; for N start torchrun --nproc-per-node N -m grasp compress ..."
                )
        return
    with (
        started_together(device, shard=shard) as (processes, place),
        console.step_bars(quiet=not processes.first) as progress,
    ):
        result = compress_to_folder(
            *job,
            device=place,
            progress=progress,
            notify=progress.note,
            expect=progress.expect,
            processes=processes,
            **options,
        )
    if processes.first:
        console.print_result(result, tables.show_compression, as_json=as_json)
