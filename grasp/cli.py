"""The command line. Nothing heavy is imported before a command needs it: ``grasp --help`` answers at once."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grasp import __version__
from grasp.errors import GraspError, NonFiniteError

if TYPE_CHECKING:
    from grasp.distributed import Processes

app = typer.Typer(
    name="grasp",
    help="Make a causal language model smaller by replacing redundant layers with low-rank ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BAD_INPUT = 2  # exit code
_MOST_LAYERS = 10_000  # far beyond any model; ranges are written out
# What the libraries would say on stderr, set before they are imported; a user's own settings stand.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

_MODEL = "A folder, a GGUF file, a name on the Hugging Face hub, or [bold]builtin[/bold] (SmolLM2-135M)."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: CUDA where there is a GPU.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def main() -> None:
    """Run the command line; what the user can put right ends in one line on stderr and exit code 2."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # linears that return a view: all of GPT-2's
    try:
        app()
    except (GraspError, ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _version(asked: bool) -> None:
    if asked:
        print(f"grasp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Options that stand before the command; both are acted upon elsewhere."""


def parse_layers(text: str) -> tuple[int, ...]:
    """``"3,12-17"`` → (3, 12, 13, 14, 15, 16, 17).

    Raises:
        ValueError: if the text is anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers must be numbers and ranges such as 3,12-17, got {text!r}")
        if int(match[2] or match[1]) >= _MOST_LAYERS:
            raise ValueError(f"layers must be below {_MOST_LAYERS}, got {text!r}")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(layers)


def parse_counts(text: str) -> tuple[int, ...]:
    """``"1,4,16"`` → (1, 4, 16).

    Raises:
        ValueError: if the text is anything else, or has a 0.
    """
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise ValueError(f"rows must be positive numbers such as 1,4,16; got {text!r}")
    return tuple(map(int, text.split(",")))


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """``"4"`` → 4; ``"auto"`` stays.

    Raises:
        ValueError: if the text is anything else.
    """
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"batch size must be a positive number or auto; got {text!r}")
    return int(text)


@app.command()
def compress(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the checkpoint; new or empty.", show_default=False)
    ],
    preset: Annotated[
        str, typer.Option(help="Where the settings start: paper (arXiv 2501.00339), or best: the least perplexity.")
    ] = "paper",
    compression_ratio: Annotated[
        float | None, typer.Option(help="Fraction of the whole model's parameters to remove. Paper: 0.2.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Instead: compress this many layers, the most redundant ones.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Instead: compress these layers, such as 3,12-17.")] = None,
    retain_ratio: Annotated[
        float | None, typer.Option(help="Fraction of each matrix's parameters to keep. Paper: 0.1.")
    ] = None,
    threshold_ratio: Annotated[
        float | None, typer.Option(help="Instead: keep the fewest singular groups with this share of the importance.")
    ] = None,
    basis: Annotated[
        str | None, typer.Option(help="What is decomposed: plain (paper), whitened or kfac; see GraspConfig.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Importance of a singular group: taylor (paper), gradient, magnitude or fisher.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform: the same share of every matrix (paper); global: where it helps most.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="redundant: those layers (paper); model: all; auto: what does better held out.")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit the left factors to the dense outputs at the end.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="sequential (paper), per-layer (twice as fast), or single-sweep (all on the dense model)."),
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

    [dim]Remove a fifth of the parameters, as in the paper:[/dim]

    $ grasp compress meta-llama/Llama-3.1-8B-Instruct -o small --num-samples 512 --calibration wikitext2

    [dim]A quick try, offline:[/dim]

    $ grasp compress builtin -o small --num-layers 2 --num-samples 8

    [dim]Layers of your choice, your own text:[/dim]

    $ grasp compress ./my-model -o small --layers 3,12-17 --retain-ratio 0.3 --calibration corpus.txt

    [dim]The least perplexity that is known how to reach without training:[/dim]

    $ grasp compress builtin -o small --preset best --compression-ratio 0.1 --num-samples 24

    [dim]What that would take, in time and memory, without reading the weights:[/dim]

    $ grasp compress ./my-model -o small --layers 3,12-17 --retain-ratio 0.3 --batch-size auto --dry-run

    [dim]In two processes, which share the calibration sequences:[/dim]

    $ torchrun --nproc-per-node 2 -m grasp compress builtin -o small --num-layers 2 --num-samples 8
    """
    from grasp import console, jobs, tables
    from grasp.config import GraspConfig

    choices = {
        "layers": None if layers is None else parse_layers(layers),
        "num_layers": num_layers,
        "compression_ratio": compression_ratio,
        "retain_ratio": retain_ratio,
        "threshold_ratio": threshold_ratio,
        "basis": basis,
        "metric": metric,
        "allocation": allocation,
        "scope": scope,
        "refit": refit,
        "schedule": schedule,
        "sweep_dtype": sweep_dtype,
    }
    config = GraspConfig.preset(preset, **{name: value for name, value in choices.items() if value is not None})
    samples = jobs.Samples(calibration, num_samples, seq_len, parse_batch_size(batch_size), seed)
    if dry_run:
        plan = jobs.plan(model, config, samples, dtype=dtype, device=device)
        if as_json:
            console.print_json(plan.to_dict())
        else:
            tables.show_plan(plan)
        return
    with _processes(device, shard) as (processes, place), console.step_bars(quiet=not processes.first) as progress:
        result = jobs.compress(
            *(model, output, config, samples),
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


@contextmanager
def _processes(device: str | None, shard: bool) -> Iterator[tuple[Processes, str | None]]:
    """This process among those that torchrun has started, which the environment tells, and the device that it takes."""
    from grasp.distributed import ALONE, joined
    from grasp.loading import find_device

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shard:
            raise ValueError(
                "--shard spreads a model over several processes, but this is one; start it as "
                "torchrun --nproc-per-node N -m grasp compress ... --shard"
            )
        yield ALONE, device
        return
    place = find_device(device)
    if place.type != "cpu" and str(place) == place.type:  # without a number
        place = find_device(f"{place.type}:{os.environ['LOCAL_RANK']}")
    with joined(place, sharded=shard) as processes:
        yield processes, str(place)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A text file, wikitext2, c4, or builtin: its held-out part.")
    ] = "builtin",
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="New tokens per window; fewer than the window overlap. Default: no overlap.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL, dense or compressed, on a text.

    [bold]Examples[/bold]

    $ grasp evaluate small

    $ grasp evaluate small --text wikitext2 --window 2048 --json
    """
    from grasp import console, jobs, tables

    with console.step_bars() as progress:
        result = jobs.evaluate(
            model,
            text,
            window=window,
            stride=stride,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_evaluation(result)
    if result.result.nonfinite:
        raise NonFiniteError(
            f"{result.result.nonfinite} of {result.result.tokens} tokens have a loss that is NaN or infinite, so the "
            "perplexity is no number; try --dtype float32, or check the model"
        )


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the layers and ranks of a checkpoint and where its bytes go, without loading it.

    [bold]Example[/bold]

    $ grasp inspect small
    """
    from grasp import console, inspection, tables

    result = inspection.inspect_checkpoint(directory)
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_inspection(result)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, processors, and which kernel backends can run here and why others cannot.

    [bold]Example[/bold]

    $ grasp env --json
    """
    from grasp import console, environment, tables

    facts = environment.environment()
    if as_json:
        console.print_json(facts)
    else:
        tables.show_environment(facts)


bench = typer.Typer(help="Measure the kernels on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bench, name="bench")


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
    from grasp import console, tuning

    with console.step_bars() as progress:
        files = tuning.tune(shapes or tuning.SHAPES, parse_counts(rows), dtype=dtype, output=output, progress=progress)
    if as_json:
        console.print_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            print(file)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the result; an earlier demo there is replaced.")
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M and compare: dense, layers removed, GRASP, plain SVD. Minutes, offline.

    [bold]Example[/bold]

    $ grasp demo
    """
    from grasp import console, tables
    from grasp.demo import run_demo

    with console.step_bars() as progress:
        result = run_demo(output, progress=progress)
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_demo(result)
