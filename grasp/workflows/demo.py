"""The demonstration: one model dense, compressed by best, by GRASP and by plain SVD, and with layers removed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.bench.providers import truncate_
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, builtin_text, first_token_batches, tokenize
from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.saving import check_directory
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.environment import environment
from grasp.errors import GraspError
from grasp.evaluation.generation import GenerationTime, time_generation
from grasp.evaluation.perplexity import perplexity
from grasp.files import contents, expanded
from grasp.loading import load_quietly
from grasp.model.layer_removal import remove_layers_
from grasp.model.size import model_size
from grasp.model.targets import vocabulary_size
from grasp.progress import Progress, named, no_progress
from grasp.reading import read_json
from grasp.workflows.compress import with_request, write_checkpoint
from grasp.workflows.samples import Samples, draw

DEMO_FILE = "demo.json"
_MADE_BY = "grasp demo"
_LEAST_NOISE = 0.03  # smaller relative differences between medians of a few repeats are noise

DENSE, BEST, REMOVED, GRASP, PLAIN_SVD = "dense", "best", "layers removed", "GRASP", "plain SVD"


@dataclass(frozen=True)
class DemoSizes:
    """The sizes of the demonstration; the defaults take a few minutes on two CPU cores."""

    num_samples: int = 8
    seq_len: int = 512
    num_layers: int = 6
    retain_ratio: float = 0.1
    seed: int = 0
    windows: int = 16  # of evaluation text, for perplexity
    window: int = 512  # tokens
    prompt_tokens: int = 512
    new_tokens: int = 32
    repeats: int = 7


class Row(NamedTuple):
    """One row of the table. Speeds are medians in tokens per second at batch size 1."""

    name: str
    parameters: int
    bytes: int
    perplexity: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Demo:
    """The result of the demonstration."""

    output: str  # the folder with the checkpoint of best
    rows: tuple[Row, ...]  # the table
    findings: tuple[str, ...]  # sentences about the table
    conditions: Mapping[str, Any]  # model, device, text and sizes of the measurement
    report: CompressionReport  # of best

    def to_dict(self) -> dict[str, Any]:
        """Return all but the report, which has its own file, as values that JSON can hold."""
        return {
            "made_by": _MADE_BY,
            "output": self.output,
            "rows": [row._asdict() for row in self.rows],
            "findings": list(self.findings),
            "conditions": dict(self.conditions),
        }


def run_demo(output: str | Path, sizes: DemoSizes | None = None, *, progress: Progress = no_progress) -> Demo:
    """Compress the built-in model, compare it with the alternatives, and write checkpoint, report and table.

    An earlier demonstration in ``output`` is replaced in one step.

    Raises:
        CheckpointError: if ``output`` holds anything else, or cannot be written.
        OccupiedError: if ``output`` is changed by somebody else in the meantime.
        MissingPackageError: if the built-in model or text is not installed.
    """
    sizes = DemoSizes() if sizes is None else sizes
    start = time.perf_counter()
    output = expanded(output)
    seen = contents(output) if _is_demo(output) else {}
    target = check_directory(output, overwrite=bool(seen))
    samples = Samples(BUILTIN, sizes.num_samples, sizes.seq_len, seed=sizes.seed)
    text = builtin_text("calibration")
    dense, tokenizer = load_quietly(BUILTIN, progress=progress)

    batches, held_out = draw(tokenizer, text, samples)
    grasp = copy.deepcopy(dense)
    paper = GraspConfig.paper(num_layers=sizes.num_layers, retain_ratio=sizes.retain_ratio)
    published = compress_(grasp, batches, paper, progress=progress)
    best = copy.deepcopy(dense)
    config = GraspConfig.best(compression_ratio=published.compression_ratio)
    best_batches = [
        *batches,
        *first_token_batches(tokenizer, batches, vocabulary=vocabulary_size(best), seed=sizes.seed),
    ]
    report = with_request(compress_(best, best_batches, config, held_out=held_out, progress=progress), BUILTIN, samples)
    removed = copy.deepcopy(dense)
    remove_layers_(removed, published.redundant_layers)
    truncated = copy.deepcopy(dense)
    truncate_(truncated, published.redundant_layers, sizes.retain_ratio)

    models = {DENSE: dense, BEST: best, REMOVED: removed, GRASP: grasp, PLAIN_SVD: truncated}
    rows = _measure(models, tokenizer, sizes, progress)
    conditions = {
        "model": str(dense.config.name_or_path),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "text": "builtin: calibration and evaluation split have no document in common",
        "sizes": asdict(sizes),
        "layers": list(published.redundant_layers),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    demo = Demo(str(target), rows, findings(rows), conditions, report)
    write_checkpoint(
        *(best, tokenizer, target, BUILTIN, samples, report),
        extra_files={DEMO_FILE: json.dumps(demo.to_dict(), indent=2)},
        seen=seen,
        progress=progress,
    )
    return demo


def findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Derive sentences from the numbers: which method wins, and where."""
    by_name = {row.name: row for row in rows}
    return (
        _perplexity_finding(by_name),
        _size_finding(by_name),
        _speed_finding("Prefill", by_name, lambda row: row.prefill_tokens_per_s),
        _speed_finding("Decode", by_name, lambda row: row.decode_tokens_per_s),
    )


def _perplexity_finding(rows: Mapping[str, Row]) -> str:
    grasp, removed, plain = (rows[name].perplexity for name in (GRASP, REMOVED, PLAIN_SVD))
    ordered = sorted((row for row in rows.values() if row.name != DENSE), key=lambda row: row.perplexity)
    ranking = ", ".join(f"{row.name} {row.perplexity:.1f}" for row in ordered)
    text = f"Perplexity (dense {rows[DENSE].perplexity:.1f}), best first: {ranking}."
    if removed < grasp:
        text += (
            " GRASP as published has a higher perplexity here than removing the layers, although it keeps more "
            "parameters. This is usual for models this small."
        )
    else:
        text += " GRASP as published has a lower perplexity here than removing the layers."
    return (
        text + f" Choosing groups by gradient is {'better' if grasp < plain else 'not better'} than by singular value."
    )


def _size_finding(rows: Mapping[str, Row]) -> str:
    dense = rows[DENSE].parameters
    removed = {name: 1 - rows[name].parameters / dense for name in (REMOVED, GRASP)}
    return (
        f"Size: removing layers saves {removed[REMOVED]:.1%} of the parameters, the others {removed[GRASP]:.1%}. "
        "Removed layers also have no KV cache; low-rank layers keep theirs."
    )


def _speed_finding(phase: str, rows: Mapping[str, Row], speed: Callable[[Row], float]) -> str:
    """Compare speeds. GRASP and plain SVD have the same shapes, so the difference between them is noise."""
    dense, best = speed(rows[DENSE]), max(map(speed, rows.values()))
    parts = ", ".join(f"{name} {speed(rows[name]) / dense:.2f}x" for name in (BEST, REMOVED, GRASP, PLAIN_SVD))
    slower, faster = sorted((speed(rows[GRASP]), speed(rows[PLAIN_SVD])))
    noise = max(faster / slower - 1, _LEAST_NOISE)
    leaders = [row.name for row in rows.values() if speed(row) * (1 + noise) >= best]
    if len(leaders) == 1:
        verdict = f"{leaders[0]} is fastest"
    else:
        verdict = f"{', '.join(leaders[:-1])} and {leaders[-1]} are too close to call"
    return (
        f"{phase} speed relative to dense: {parts}. GRASP and plain SVD have the same shapes, so differences up to "
        f"{noise:.0%} count as noise: {verdict}."
    )


def _is_demo(output: Path) -> bool:
    """Whether a folder holds an earlier demonstration."""
    try:
        return read_json(output / DEMO_FILE, "an earlier demonstration").get("made_by") == _MADE_BY
    except GraspError:
        return False


def _measure(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    sizes: DemoSizes,
    progress: Progress,
) -> tuple[Row, ...]:
    held_out = tokenize(tokenizer, builtin_text("evaluation"))[: sizes.windows * sizes.window]

    options: dict[str, Any] = {"window": sizes.window, "bos_token_id": bos_for(tokenizer)}
    values = {
        name: perplexity(model, held_out, progress=named(progress, name), **options).perplexity
        for name, model in models.items()
    }
    times: dict[str, list[GenerationTime]] = {name: [] for name in models}
    total = (sizes.repeats + 1) * len(models)
    for repeat in range(sizes.repeats + 1):  # models take turns, so that a slow minute slows all of them
        for index, (name, model) in enumerate(models.items(), start=1):
            times[name].append(time_generation(model, prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.new_tokens))
            progress("speed", repeat * len(models) + index, total)
    rows = []
    for name, model in models.items():
        size, timed = model_size(model), times[name][1:]  # the first repetition warms up
        prefill = sizes.prompt_tokens / median(generation.prefill_s for generation in timed)
        decode = sizes.new_tokens / median(generation.decode_s for generation in timed)
        rows.append(Row(name, size.parameters, size.bytes, values[name], prefill, decode))
    return tuple(rows)
