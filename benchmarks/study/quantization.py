"""Perplexity against bytes: a dense model and compressed ones in bf16, 8 and 4 bits.

``python -m benchmarks.study.quantization DENSE COMPRESSED… -o FILE`` quantises each model in each way and measures the
perplexity of held-out text. Models run in float32; bytes are those of a checkpoint in bfloat16. llama.cpp rounds and
runs the ways that begin with GGUF. Cells that the output already has are not run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.study.records import STUDY_RECORDS, StudyQuantized
from grasp.bench.conditions import conditions, measure_card
from grasp.bench.results import append_results, check_output, read_results
from grasp.bench.yardstick import Yardstick, load_llama_cpp
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, read_text, token_batches, tokenize
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.cli.bench_tables import show_results
from grasp.compression.quantize import quantize_
from grasp.errors import GraspError
from grasp.evaluation.perplexity import perplexity
from grasp.export.gguf_file import write_gguf
from grasp.loading import load_model
from grasp.method.storage import FP8, Storage
from grasp.model.hooks import forwarding
from grasp.model.size import model_size
from grasp.workflows.samples import public_model_name

# How weights are stored, as ours or as a type of llama.cpp, and whether rounding knows the inputs.
WAYS: dict[str, tuple[Storage | str | None, bool]] = {
    "bf16": (None, False),
    "int8, nearest": (Storage(8), False),
    "int8": (Storage(8), True),
    "fp8": (FP8, True),
    "int4, nearest": (Storage(4, 64), False),
    "int4": (Storage(4, 64), True),
    **{f"GGUF {name}": (name, False) for name in ("Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")},
}
AS_SAVED = "as saved"  # the way of a checkpoint that is quantised


def measure(source: str, way: str, text: str, windows: int | None, window: int) -> tuple[int, float, float]:
    """Quantise a model in a way and measure it: bytes in bf16, perplexity, and CPU seconds of the quantisation."""
    model, tokenizer = load_model(source, dtype="float32", device="cpu")
    bos, (storage, knows_inputs) = bos_for(tokenizer), WAYS.get(way, (None, False))
    tokens = tokenize(tokenizer, read_text(text, split="evaluation"))
    count = None if windows is None else windows * (window - (bos is not None))

    start = time.process_time()
    with ExitStack() as stack:
        if isinstance(storage, str):
            size = stack.enter_context(in_llama_cpp(model, source, storage))
        elif storage is not None:
            batches = token_batches(tokenizer, read_text(BUILTIN), num_samples=24, seq_len=512, batch_size=2, seed=0)
            quantize_(model, storage, batches if knows_inputs else ())
        seconds = time.process_time() - start
        measured = perplexity(model, tokens[:count], window=window, batch_size=2, bos_token_id=bos)
    if not isinstance(storage, str):
        torch.nn.Module.to(model, torch.bfloat16)
        size = model_size(model).bytes
    return size, measured.perplexity, seconds


@contextmanager
def in_llama_cpp(model: PreTrainedModel, source: str, weight_type: str) -> Iterator[int]:
    """Have llama.cpp round the weights of a model and compute its logits; gives the bytes of the tensors.

    Args:
        model: on the CPU, in float32.
        source: where it is from; llama.cpp reads a GGUF file itself.
        weight_type: a type of llama.cpp's, such as Q4_K_M.
    """
    library = load_llama_cpp()
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{weight_type}")
    options.nthread, options.allow_requantize = torch.get_num_threads(), True
    with TemporaryDirectory() as folder:
        given, rounded = Path(source), Path(folder, "rounded.gguf")
        if given.suffix != ".gguf":
            write_gguf(model, given := Path(folder, "model.gguf"), "F32")
        if status := library.llama_model_quantize(str(given).encode(), str(rounded).encode(), options):
            raise GraspError(f"llama.cpp cannot round {source} to {weight_type}: status {status}; expected 0")
        run = Yardstick(weight_type, rounded, model)
        with closing(run), forwarding([model], lambda input_ids, **_: CausalLMOutput(logits=run.logits(input_ids))):
            yield run.weight_bytes


def ways_of(source: str, dense: str, asked: Collection[str]) -> list[str]:
    """The ways in which a model can be stored. GGUF has no low-rank linears."""
    if (Path(source) / "config.json").is_file() and inspect_checkpoint(source).quantized:
        return [AS_SAVED]
    return [way for way in WAYS if way in asked and (source == dense or not way.startswith("GGUF"))]


def main(
    models: Annotated[list[str], typer.Argument(help="The dense model, then compressed ones.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines; a study in this file is resumed.")],
    text: Annotated[str, typer.Option(help="Text for the perplexity; a text file is read whole.")] = BUILTIN,
    window: Annotated[int, typer.Option(help="Tokens of the text in one window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Number of windows. Default: the whole text.")] = None,
    ways: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
) -> None:
    """Run the missing cells, and print the table."""
    console, cpu, dense = Console(stderr=True), torch.device("cpu"), models[0]
    if unknown := sorted(set(ways or []) - set(WAYS)):
        raise typer.BadParameter(f"unknown ways {', '.join(unknown)}; expected some of {', '.join(WAYS)}")
    if len({Path(source).name for source in models}) < len(models):
        raise typer.BadParameter(
            "two models have the same last part of their names, by which cells are known; rename one"
        )
    try:
        check_output(output, STUDY_RECORDS)
        cells = read_results(output, STUDY_RECORDS) if output.exists() else []
        name, dense_name, text_name = Path(dense).name, public_model_name(dense), Path(text).name
        setting = (dense_name, text_name, windows, window)
        done = {
            (cell.model, cell.way): cell
            for cell in cells
            if isinstance(cell, StudyQuantized) and (cell.dense, cell.text, cell.windows, cell.window) == setting
        }
        if (name, "bf16") not in done and ways and "bf16" not in ways:
            raise typer.BadParameter("the excess is over the dense model in bf16: run without --ways, or with bf16 too")
        where = conditions(measure_card(cpu, torch.float32), cpu)
        asked = [(source, way) for source in models for way in ways_of(source, dense, ways or WAYS)]
        if any(way.startswith("GGUF") for _, way in asked):
            load_llama_cpp()
        for source, way in asked:
            if (Path(source).name, way) in done:
                continue
            size, value, seconds = measure(source, way, text, windows, window)
            base = done.get((name, "bf16"))
            cell = StudyQuantized(
                dense=dense_name,
                model=Path(source).name,
                way=way,
                text=text_name,
                windows=windows,
                window=window,
                bytes=size,
                of_dense=1.0 if base is None else size / base.bytes,
                perplexity=value,
                excess=0.0 if base is None else math.log(value / base.perplexity),
                cpu_seconds=seconds,
                conditions=where,
            )
            append_results(output, [cell])
            done[cell.model, way] = cell
            console.print(f"{cell.model}, {way}: {cell.of_dense:.1%}, {cell.excess:.3f} nats", soft_wrap=True)
    except GraspError as error:
        console.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    show_results(done.values())


if __name__ == "__main__":
    typer.run(main)
