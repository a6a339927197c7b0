"""``grasp bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json, parse_counts, parse_layers
from grasp.cli.root import app

if TYPE_CHECKING:
    from grasp.bench.schema import Record


bench = typer.Typer(help="Measure the kernels on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bench, name="bench")

WRONG = 1  # exit code: something ran, and its result was not right
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON lines are added to this file; see docs/benchmarks.md.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")]
BenchModel = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A folder, a GGUF file, a hub name, or [bold]builtin[/bold].")
]


@bench.command()
def ops(
    op: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Take the shapes of this model: llama-2-7b, llama-3.1-8b, ..., or as MODEL elsewhere."),
    ] = None,
    retain_ratio: Annotated[
        float | None, typer.Option(help="Parameters that the model's factors keep of each matrix. Default: 0.1.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="KxNrR[+...]", help="Instead: a linear, or several that share an input.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Tokens per call.")] = "1,16",
    dtype: Annotated[list[str] | None, typer.Option(help="Default: float32 and bfloat16.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    compiled: Annotated[
        bool, typer.Option(help="Also time what torch.compile makes of the two calls; it costs seconds per case.")
    ] = True,
    device: Device = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; each in turn if repeated.")] = None,
    rotate_mb: Annotated[
        int, typer.Option(min=0, help="MB of distinct weights that calls go through; more than any cache holds.")
    ] = 1024,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that every provider gets its turn.")] = 20,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time every op on every backend against dense, unfused and compiled linears.

    What gives wrong results is not timed, and makes the exit code 1.

    [bold]Examples[/bold]

    [dim]The calls of a 7B Llama's layers, whose weights are not needed:[/dim]

    $ grasp bench ops --model llama-2-7b --dtype bfloat16 -o ops.jsonl

    [dim]One linear, quickly:[/dim]

    $ grasp bench ops --op lowrank_linear --shape 4096x4096r204 --rows 1,16 --threads 1 --no-compiled
    """
    from grasp.bench import ops, results
    from grasp.cli import bench_tables, console

    request = ops.OpsRequest(
        ops=op or (),
        shapes=shape or (),
        model=model,
        retain_ratio=retain_ratio,
        rows=parse_counts(rows),
        dtypes=dtype or ("float32", "bfloat16"),
        backends=backend or (),
        compiled=compiled,
        device=device,
        threads=threads,
        rotate_bytes=rotate_mb << 20,
        repetitions=repetitions,
    )
    results.check_output(output)
    found: list[Record] = []
    shown: dict[str, object] = {}
    with console.step_bars() as progress:
        for records, cards, count in ops.run(request, progress=progress):
            results.append_results(output, records)
            found += records
            if as_json:
                continue
            if cards != shown:
                bench_tables.show_cards(cards, count)
                shown = dict(cards)
            bench_tables.show_results(records)
    _finish(found, as_json)


@bench.command()
def model(
    model: BenchModel = "builtin",
    compressed: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="MODEL as grasp compress has written it. Default: plain SVD.")
    ] = None,
    num_layers: Annotated[int, typer.Option(min=1, help="By plain SVD: this many layers, in the middle.")] = 6,
    layers: Annotated[str | None, typer.Option(help="Instead: these layers, such as 3,12-17.")] = None,
    retain_ratio: Annotated[float, typer.Option(help="Fraction of each matrix's parameters to keep.")] = 0.1,
    batch_size: Annotated[str, typer.Option(help="Sequences at a time, each number in turn.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoding steps after the first token.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every provider gets its turn.")] = 5,
    backend: Annotated[list[str] | None, typer.Option(help="Only this one by itself; may be repeated.")] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="For perplexity: a text file, wikitext2, c4, or builtin.")
    ] = "builtin",
    window: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once there.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="How many of them; 0 leaves perplexity out.")] = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time MODEL dense, with layers removed, and low-rank with each backend and unfused.

    Low-rank models whose logits are not those of the reference backend are not timed, and make the exit code 1.

    [bold]Examples[/bold]

    [dim]Speed at the paper's ranks:[/dim]

    $ grasp bench model meta-llama/Llama-3.1-8B --num-layers 12 -o model.jsonl

    [dim]Speed and perplexity of what was compressed, beside the model that it was made from:[/dim]

    $ grasp bench model builtin --compressed small --batch-size 1 --threads 2
    """
    from grasp.bench import model as model_bench
    from grasp.bench import results
    from grasp.cli import bench_tables, console

    request = model_bench.Request(
        model=model,
        checkpoint=compressed,
        layers=None if layers is None else parse_layers(layers),
        num_layers=num_layers,
        retain_ratio=retain_ratio,
        batch_sizes=parse_counts(batch_size),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        backends=backend or (),
        text=text,
        window=window,
        windows=windows,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    results.check_output(output)
    found: list[Record] = []
    with console.step_bars() as progress:
        for records in model_bench.run(request, progress=progress):
            results.append_results(output, records)
            found += records
            if not as_json:
                bench_tables.show_results(records)
    _finish(found, as_json)


@bench.command()
def compress(
    model: BenchModel = "builtin",
    num_layers: Annotated[int, typer.Option(min=1, help="Compress so many, those with the least influence.")] = 6,
    layers: Annotated[str | None, typer.Option(help="Instead: these layers, such as 3,12-17.")] = None,
    retain_ratio: Annotated[float, typer.Option(help="Fraction of each matrix's parameters to keep.")] = 0.3,
    schedule: Annotated[
        list[str] | None, typer.Option(help="sequential, per-layer or single-sweep; may be repeated. Default: all.")
    ] = None,
    sweep_dtype: Annotated[str | None, typer.Option(help="bfloat16. Default: as the model is.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in the package's sweeps.")] = 1,
    num_samples: Annotated[int, typer.Option(min=2, help="Calibration sequences.")] = 24,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    timed_batches: Annotated[int, typer.Option(min=2, help="Of each sweep; the first warms up.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Time the whole set; nothing is extrapolated.")] = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time the attribution of a compression against a naive one written from the paper's formulas.

    Where the two choose other singular groups than rounding explains, nothing is reported and the exit code is 1.

    [bold]Example[/bold]

    $ grasp bench compress builtin --layers 22-27 --threads 2 -o compress.jsonl
    """
    from grasp.bench import compress as compress_bench
    from grasp.bench import results
    from grasp.bench.race import WrongSelectionError
    from grasp.cli import bench_tables, console

    request = compress_bench.Request(
        model=model,
        layers=None if layers is None else parse_layers(layers),
        num_layers=num_layers,
        retain_ratio=retain_ratio,
        schedules=schedule or (),
        sweep_dtype=sweep_dtype,
        batch_size=batch_size,
        num_samples=num_samples,
        seq_len=seq_len,
        timed_batches=None if full else timed_batches,
        device=device,
        threads=threads,
    )
    results.check_output(output)
    with console.step_bars() as progress:
        try:
            found = compress_bench.run(request, progress=progress)
        except WrongSelectionError as error:
            progress.note(f"WRONG: {error}; nothing is reported")
            raise typer.Exit(WRONG) from error
    results.append_results(output, found)
    if not as_json:
        bench_tables.show_results(found)
    _finish(found, as_json)


def _finish(records: Sequence[Record], as_json: bool) -> None:
    """Print one JSON document, or the notes and what was left out. A wrong result makes the exit code 1."""
    from grasp.bench.records import NotMeasured
    from grasp.cli import bench_tables, console

    if as_json:
        console.print_json({"results": [record.to_dict() for record in records]})
    else:
        bench_tables.show_notes(records)
        bench_tables.show_left_out(records)
    if any(isinstance(record, NotMeasured) and record.wrong for record in records):
        raise typer.Exit(WRONG)


@bench.command()
def tune(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KxNrR...]", help="Default: the linears of a 7B Llama at a tenth of their parameters."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Tokens per call.")] = "1,2,4,16,32,64,128,256,512",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the installed package.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest launch configurations of the Triton kernels on this GPU, and keep them for later calls.

    [bold]Examples[/bold]

    $ grasp bench tune

    [dim]Two linears that share their input, of 4096 features, to 11008 at rank 298:[/dim]

    $ grasp bench tune 4096x11008r298+4096x11008r298 --rows 1,4,16
    """
    from grasp.bench import tuning
    from grasp.cli import console

    with console.step_bars() as progress:
        files = tuning.tune(shapes or tuning.SHAPES, parse_counts(rows), dtype=dtype, output=output, progress=progress)
    if as_json:
        console.print_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            print(file)
