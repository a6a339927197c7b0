"""A family of checkpoints for the Hub: one model at several sizes, each compressed, evaluated and checked.

``python -m benchmarks.study.release MODEL --ratios 0.1,0.2,0.3 -o family`` stages the folders that ``grasp push``
takes. Nothing is uploaded. A family that was interrupted is continued by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from grasp.builtin import BUILTIN, BUILTIN_NAME
from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.inspection import Inspection
from grasp.checkpoint.push import require_complete
from grasp.cli.console import print_table, step_bars
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.formatting import share, size
from grasp.reporting.card_figure import add_figure
from grasp.workflows import evaluation_results
from grasp.workflows.compress import compress
from grasp.workflows.evaluate import evaluate
from grasp.workflows.samples import Samples

RESULTS = ("before.json", "results.json")  # of the dense and the compressed model; the model card has a table of both


def folder_name(model: str, ratio: float, bits: int | None) -> str:
    """The name of a member: that of the model, and the share of its parameters that is removed.

    Example:
        >>> folder_name("HuggingFaceTB/SmolLM2-135M", 0.1, 8)
        'SmolLM2-135M-grasp-10pct-int8'
    """
    base = Path(BUILTIN_NAME if model == BUILTIN else model).name
    stored = "" if bits is None else f"-int{bits}"
    return f"{base}-grasp-{100 * ratio:g}pct{stored}"


def stage(
    model: str, folder: Path, config: GraspConfig, samples: Samples, *, text: str, window: int, dtype: str
) -> Inspection:
    """Compress a model into a folder, evaluate both on a text, and check that the folder can be pushed.

    What an earlier call has finished is not done again.

    Raises:
        GraspError, ValueError: as ``compress``, ``evaluate`` and ``require_complete`` do.
    """
    with step_bars() as progress:
        if not (folder / "config.json").is_file():
            compress(model, folder, config, samples, dtype=dtype, progress=progress)
        for name, file in zip((model, str(folder)), RESULTS, strict=True):
            if not (folder / file).is_file():
                measured = evaluate(name, text, window=window, dtype=dtype, progress=progress)
                evaluation_results.write(measured, folder / file)
    add_figure(folder)
    return require_complete(folder)


def main(
    model: Annotated[str, typer.Argument(help="A folder, a name on the Hub, or builtin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the family.")],
    ratios: Annotated[str, typer.Option(help="Shares of the parameters to remove.")] = "0.1,0.2,0.3",
    bits: Annotated[int | None, typer.Option(help="Quantise the members: 8 or 4.")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    calibration: Annotated[str, typer.Option(help="Calibration text.")] = BUILTIN,
    text: Annotated[str, typer.Option(help="Text of the perplexity.")] = BUILTIN,
    window: Annotated[int, typer.Option(help="Tokens of the text in one window.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the loaded model.")] = "auto",
) -> None:
    """Stage the members, and print their sizes, their losses and how to push them."""
    console = Console(stderr=True)
    rows: list[Sequence[str]] = []
    try:
        shares = [float(ratio) for ratio in ratios.split(",")]
        configs = [GraspConfig.best(compression_ratio=ratio, bits=bits) for ratio in shares]
        samples = Samples(calibration, num_samples, seq_len)
        for ratio, config in zip(shares, configs, strict=True):
            folder = output / folder_name(model, ratio, bits)
            console.print(f"{folder.name}:")
            member = stage(model, folder, config, samples, text=text, window=window, dtype=dtype)
            losses = CompressionReport.load(folder).held_out_text
            rows.append((folder.name, size(member.bytes), share(member.compression_ratio), losses))
    except (GraspError, ValueError) as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    print_table(("member", "size", "parameters removed", "held-out text"), rows)
    for name, *_ in rows:
        print(f"grasp push {output / name} OWNER/{name}")


if __name__ == "__main__":
    typer.run(main)
