"""``grasp bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grasp.cli.arguments import MOST, MOST_THREADS, Device, Dtype, Json, parse_counts, parse_layers
from grasp.cli.root import app

if TYPE_CHECKING:
    from grasp.bench.schema import Record
    from grasp.cli.console import StepBars


bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bench, name="bench")

WRONG = 1  # exit code: a provider ran, and its result was wrong
Rounds = Callable[["StepBars"], Iterable[Sequence["Record"]]]

BenchModel = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A folder, a GGUF file, a hub name, or [bold]builtin[/bold].")
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option("--output", "-o", help="A new .md or .csv file for tables; JSON lines are appended to any other."),
]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: PyTorch's choice.")]
Layers = Annotated[str | None, typer.Option(help="Instead of --num-layers: these layers, such as 3,12-17.")]

OpNames = Annotated[list[str] | None, typer.Option(help="Time only this op; may be repeated.")]
ShapesOfModel = Annotated[
    str | None, typer.Option(help="Take the shapes of this model: llama-2-7b, llama-3.1-8b, ..., a folder or hub name.")
]
ModelRetainRatio = Annotated[
    float | None, typer.Option(help="Fraction of each matrix's parameters that the model's shapes keep. Default: 0.1.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="KxNrR[+...]", help="Instead of --model: a linear, or several that share an input."),
]
Workload = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Time the calls that grasp bench record wrote, weighted; --op, --rows, --dtype choose some.",
    ),
]
Rows = Annotated[str, typer.Option(help="Tokens per call.")]
OpRows = Annotated[str | None, typer.Option("--rows", help="Tokens per call. Default: 1,16.")]
Dtypes = Annotated[list[str] | None, typer.Option(help="May be repeated. Default: float32 and bfloat16.")]
Form = Annotated[
    str | None, typer.Option(help="factored or pivoted; a pivoted linear of full rank is dense. Default: factored.")
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="int8|int4/64|...", help="Quantise the factors; also times them as they were. May be repeated."
    ),
]
Backends = Annotated[list[str] | None, typer.Option(help="Time only this backend; may be repeated.")]
Compiled = Annotated[bool, typer.Option(help="Also time the unfused form compiled by torch.compile, seconds per case.")]
ThreadCounts = Annotated[list[int] | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; may be repeated.")]
RotateMb = Annotated[
    int,
    typer.Option(
        min=0, max=1_000_000, help="MB of distinct weights that calls rotate through; more than a cache holds."
    ),
]
Repetitions = Annotated[int, typer.Option(min=1, max=MOST, help="Turns of every provider.")]

Compressed = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="MODEL compressed by grasp compress. Default: plain SVD.")
]
LowRankLayers = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Number of layers in the middle for plain SVD. Default: 6.")
]
FactorRatio = Annotated[
    float | None,
    typer.Option(help="Fraction of each matrix's parameters that factors by plain SVD have. Default: 0.1."),
]
MinSeconds = Annotated[float, typer.Option(min=0, help="Take turns for at least this long, at each size.")]
Precision = Annotated[
    float | None,
    typer.Option(help="Take turns until the 95 % intervals of medians are this narrow, such as 0.02."),
]
MaxSeconds = Annotated[float | None, typer.Option(min=0, help="Stop after this long at any --precision. Default: 120.")]
BatchSizes = Annotated[str, typer.Option(help="Sequences per batch.")]
Modes = Annotated[
    str, typer.Option(metavar="eager,compiled", help="compiled: steps by torch.compile, with a static KV cache.")
]
PromptTokens = Annotated[str, typer.Option(help="Prompt lengths.")]
NewTokens = Annotated[str, typer.Option(help="Decoding steps after the first token.")]
Depths = Annotated[str, typer.Option("--depth", help="Tokens before the prompt, whose time is not counted.")]
ThreadList = Annotated[str | None, typer.Option("--threads", help="CPU threads. Default: PyTorch's choice.")]
Yardsticks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="llama.cpp|FILE.gguf",
        help="Also time llama.cpp: with the weights of MODEL in 16 bits and Q8_0, or with a file; may be repeated.",
    ),
]
Text = Annotated[
    str, typer.Option(metavar="FILE|NAME", help="Text for the perplexity: a file, wikitext2, c4, or builtin.")
]
Window = Annotated[int, typer.Option(min=2, max=MOST, help="Tokens per window of the text.")]
Windows = Annotated[int, typer.Option(min=0, max=MOST, help="Number of windows; 0 measures no perplexity.")]


TuneShapes = Annotated[list[str] | None, typer.Argument(metavar="[KxNrR...]", help="Default: those of a 7B Llama.")]
TuneDtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
TuneOutput = Annotated[Path | None, typer.Option("--output", "-o", help="Folder. Default: the installed package.")]


@bench.command()
def ops(
    op: OpNames = None,
    model: ShapesOfModel = None,
    retain_ratio: ModelRetainRatio = None,
    shape: Shapes = None,
    workload: Workload = None,
    rows: OpRows = None,
    dtype: Dtypes = None,
    form: Form = None,
    weights: Weights = None,
    backend: Backends = None,
    compiled: Compiled = True,
    device: Device = None,
    threads: ThreadCounts = None,
    rotate_mb: RotateMb = 1024,
    repetitions: Repetitions = 20,
    output: Outputs = None,
    as_json: Json = False,
) -> None:
    """Time every op on every backend against dense, unfused and compiled linears.

    A provider with a wrong result is not timed, and the exit code is 1.

    [bold]Examples[/bold]

    [dim]The calls in a layer of a 7B Llama; its weights are not needed:[/dim]

    $ grasp bench ops --model llama-2-7b --dtype bfloat16 -o ops.jsonl

    [dim]One linear, quickly:[/dim]

    $ grasp bench ops --op lowrank_linear --shape 4096x4096r204 --rows 1,16 --threads 1 --no-compiled

    [dim]Quantised factors, and a quantised dense linear, beside those in bfloat16:[/dim]

    $ grasp bench ops --op lowrank_linear --shape 4096x4096r204 --weights int8 --weights int4/64 --dtype bfloat16

    $ grasp bench ops --op lowrank_linear --shape 4096x4096r4096 --form pivoted --weights int8 --dtype bfloat16

    [dim]The calls of a real run, weighted by how often it made them:[/dim]

    $ grasp bench record -o workload.json -- python generate.py && grasp bench ops --workload workload.json
    """
    from grasp.bench import ops as benchmark
    from grasp.cli import bench_tables

    request = benchmark.OpsRequest(
        ops=op or (),
        shapes=shape or (),
        model=model,
        retain_ratio=retain_ratio,
        workload=workload,
        rows=() if rows is None else parse_counts(rows),
        dtypes=dtype or (),
        form=form,
        weights=weights or (),
        backends=backend or (),
        compiled=compiled,
        device=device,
        threads=threads,
        rotate_bytes=rotate_mb << 20,
        repetitions=repetitions,
    )

    def rounds(progress: StepBars) -> Iterator[Sequence[Record]]:
        shown: dict[str, object] = {}
        for records, cards, count in benchmark.run(request, progress=progress):
            if cards != shown and not as_json:
                bench_tables.show_cards(cards, count)
                shown = dict(cards)
            yield records

    measure(rounds, output, as_json, at_the_end=workload is not None)


@bench.command()
def model(
    model: BenchModel = "builtin",
    compressed: Compressed = None,
    num_layers: LowRankLayers = None,
    layers: Layers = None,
    retain_ratio: FactorRatio = None,
    mode: Modes = "eager",
    batch_size: BatchSizes = "1,4,16",
    prompt_tokens: PromptTokens = "128",
    new_tokens: NewTokens = "16",
    depth: Depths = "0",
    repeats: Repetitions = 5,
    min_seconds: MinSeconds = 0.0,
    precision: Precision = None,
    max_seconds: MaxSeconds = None,
    backend: Backends = None,
    yardstick: Yardsticks = None,
    text: Text = "builtin",
    window: Window = 512,
    windows: Windows = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    threads: ThreadList = None,
    output: Outputs = None,
    as_json: Json = False,
) -> None:
    """Time MODEL dense, with layers removed, and low-rank on each backend and unfused, at all sizes that are listed.

    A model with wrong logits is not timed, and the exit code is 1.

    [bold]Examples[/bold]

    [dim]Speed at the paper's ranks:[/dim]

    $ grasp bench model meta-llama/Llama-3.1-8B --num-layers 12 -o model.jsonl

    [dim]A compressed and its dense model as servers run them, and llama.cpp:[/dim]

    $ grasp bench model builtin --compressed small --batch-size 1 --mode eager,compiled --yardstick llama.cpp
    """
    from grasp.bench import model as benchmark
    from grasp.bench.timing import StopRule

    request = benchmark.ModelRequest(
        model=model,
        checkpoint=compressed,
        layers=None if layers is None else parse_layers(layers),
        num_layers=num_layers,
        retain_ratio=retain_ratio,
        modes=[part.strip() for part in mode.split(",")],
        batch_sizes=parse_counts(batch_size, "batch_size"),
        prompt_tokens=parse_counts(prompt_tokens, "prompt_tokens"),
        new_tokens=parse_counts(new_tokens, "new_tokens"),
        depths=parse_counts(depth, "depth", least=0),
        stop=StopRule(repeats, min_seconds, precision, max_seconds),
        backends=backend or (),
        text=text,
        window=window,
        windows=windows,
        dtype=dtype,
        device=device,
        threads=() if threads is None else parse_counts(threads, "threads", most=MOST_THREADS),
        yardsticks=yardstick or (),
    )
    measure(lambda progress: benchmark.run(request, progress=progress), output, as_json)


@bench.command()
def tune(
    shapes: TuneShapes = None,
    rows: Rows = "1,2,4,16,32,64,128,256,512",
    dtype: TuneDtype = "bfloat16",
    output: TuneOutput = None,
    as_json: Json = False,
) -> None:
    """Find the fastest launch configurations of the Triton kernels on this GPU, and save them for later calls.

    [bold]Examples[/bold]

    $ grasp bench tune

    [dim]Two linears that share an input of 4096 features, with 11008 outputs and rank 298 each:[/dim]

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
            console.print_line(file)


def measure(rounds: Rounds, outputs: Sequence[Path] | None, as_json: bool, *, at_the_end: bool = False) -> None:
    """Save and print the records of all rounds, one by one or ``at_the_end``. A wrong result makes the exit code 1."""
    from grasp.bench.records import NotMeasured
    from grasp.bench.results import check_outputs, save_results
    from grasp.bench.signals import ending_by_interrupt
    from grasp.cli import bench_tables, console

    check_outputs(outputs or ())
    results: list[Record] = []
    try:
        with ending_by_interrupt(), console.step_bars() as progress:
            for records in rounds(progress):
                earlier, results = results, [*results, *records]
                try:
                    save_results(outputs or (), records, earlier)
                finally:  # also if the disk is full
                    if not as_json and not at_the_end:
                        bench_tables.show_results(records)
    except BaseException:  # such as Ctrl-C: what was measured is printed
        if results:
            _show(results, as_json, at_the_end)
        raise
    _show(results, as_json, at_the_end)
    if any(isinstance(record, NotMeasured) and record.wrong for record in results):
        raise typer.Exit(WRONG)


def _show(results: Sequence[Record], as_json: bool, with_tables: bool) -> None:
    """Print all results as JSON, or what was noted and left out, perhaps with the tables."""
    from grasp.cli import bench_tables, console

    if as_json:
        console.print_json({"results": [record.to_dict() for record in results]})
        return
    if with_tables:
        bench_tables.show_results(results)
    bench_tables.show_notes(results)
    bench_tables.show_left_out(results)
