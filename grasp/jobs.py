"""The jobs behind the command line: from a model's name and a text to a checkpoint folder or a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from grasp import __version__
from grasp.architecture import decoder
from grasp.batch_size import fitting_batch_size, free_bytes, largest_batch_size
from grasp.bench.costs import costs_for
from grasp.bench.costs import measure_costs as costs_of
from grasp.calibration import HUB_TEXTS, CalibrationBatch, bos_for, read_text, token_batches, tokenize
from grasp.checkpoint import check_directory, model_card, read_license, remove_abandoned, require_space, save_checkpoint
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.distributed import ALONE, Processes
from grasp.errors import CalibrationError, GraspError, NonFiniteError, OutOfMemoryError
from grasp.estimate import Estimate, Job, estimate
from grasp.evaluate import PerplexityResult, perplexity
from grasp.latency import CostTable
from grasp.loading import BUILTIN, BUILTIN_LICENSE, find_device, load_config, load_model, out_of_memory
from grasp.model_card import is_hub_name
from grasp.progress import Notify, Progress, silent, unheard
from grasp.rates import Rates, measure_rates
from grasp.report import FILE_NAME, CompressionReport, Size, model_size
from grasp.resume import RunState
from grasp.sharding import collect_, shard_
from grasp.tasks import TaskRequest, evaluate_tasks


@dataclass(frozen=True)
class Samples:
    """Which calibration sequences: a text source as ``read_text`` takes it, how many, how long, in which batches.

    With ``batch_size="auto"`` these are as large as the device has room for, see ``grasp.batch_size``.
    """

    source: str = BUILTIN
    num_samples: int = 128
    seq_len: int = 512
    batch_size: int | Literal["auto"] = 1
    seed: int = 0


@dataclass(frozen=True)
class Compression:
    """A checkpoint that was written, and how."""

    model: str
    output: str
    samples: Samples
    report: CompressionReport

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "model": self.model,
            "output": self.output,
            "samples": asdict(self.samples),
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth on a text, on tasks, or on both, and what it weighs.

    Attributes:
        model: its name; of a path the last part.
        text: where ``result`` is from, likewise.
        scores: lm-eval's results, see ``evaluate_tasks``.
    """

    model: str
    text: str | None
    result: PerplexityResult | None
    size: Size
    scores: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: with tasks lm-eval's own form, and what is ours under ``"grasp"``."""
        own = asdict(self)
        scores = own.pop("scores")
        return own if scores is None else {**scores, "grasp": own}


def load_quietly(
    name: str, *, dtype: str = "auto", device: str | None = None, progress: Progress = silent
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``load_model`` without the libraries' chatter; bars of downloads stay."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    step = f"loading {Path(name).name}"
    progress(step, 0, 1)
    loaded = load_model(name, dtype=dtype, device=device)
    progress(step, 1, 1)
    return loaded


def compress(
    name: str,
    output: Path,
    config: GraspConfig,
    samples: Samples,
    *,
    costs: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = silent,
    notify: Notify = unheard,
    processes: Processes = ALONE,
) -> Compression:
    """Compress a model into a new checkpoint folder. What can be wrong with the request is found before the long work.

    What is done is kept beside it, in ``OUTPUT.partial``, until the checkpoint is written: after a kill the same
    request goes on from there. ``notify`` is told so. Of several ``processes`` the first writes; where they shard the
    model, each loads it on the CPU and keeps its part. For a target in latency, ``costs`` is a file that
    ``grasp bench costs`` wrote, a card of ``grasp_kernels.roofline``, or ``None`` to measure now.

    Raises:
        GraspError, ValueError: as ``load_model``, ``token_batches``, ``compress_`` and ``save_checkpoint`` do.
        CalibrationError: if the tokenizer gives tokens that the model does not have.
        OutOfMemoryError: if the device's memory does not suffice.
        CostTableError: if ``costs`` cannot be read, or are another model's.
        ResumeError: if ``OUTPUT.partial`` belongs to another request, or cannot be used.
        DistributedError: if another process fails or is gone.
    """
    target = check_directory(output)
    text = read_text(samples.source)
    _check_costs(config, costs, processes)
    kept = target.with_name(f"{target.name}.partial")
    with RunState(kept, notify=notify, rank=processes.rank, processes=processes.size) as state:
        if processes.first:
            remove_abandoned(target)
        with within_memory(samples.batch_size, samples.seq_len):
            place = "cpu" if processes.sharded else device
            model, tokenizer = load_quietly(name, dtype=dtype, device=place, progress=progress)
            if processes.sharded:
                shard_(model, find_device(device), processes)
            samples = _with_batch_size(model, config, samples, state.batch_size, notify, processes)
            batches = draw(tokenizer, text, samples)
            for batch in batches:
                require_known(model, batch.input_ids)
            require_space(target, model.get_memory_footprint())
            table = None if config.target_latency is None else costs_for(model, costs, state.costs, progress=progress)
            report = compress_(model, batches, config, costs=table, progress=progress, state=state, processes=processes)
            report = with_request(report, name, samples, costs=costs, dtype=dtype, device=device, processes=processes)
        if processes.sharded:
            collect_(model, processes)
        if processes.first:
            write_checkpoint(model, tokenizer, target, name, samples, report, progress=progress)
    return Compression(name, str(target), samples, report)


def with_request(
    report: CompressionReport,
    name: str,
    samples: Samples,
    *,
    costs: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    processes: Processes = ALONE,
) -> CompressionReport:
    """The report with what was asked for, so that it can be asked for again; files without the folders they lie in.

    Names are those of options of ``grasp compress``, but for the model, the processes and the version of grasp.
    """
    drawn = asdict(samples)
    source = drawn.pop("source")
    request = {
        "model": _model_name(name),
        "calibration": _text_name(source),
        **drawn,
        "costs": None if costs is None else Path(costs).name,
        "dtype": dtype,
        "device": device,
        "shard": processes.sharded,
        "processes": processes.size,
        "grasp": __version__,
    }
    return replace(report, request=request)


def _check_costs(config: GraspConfig, costs: str | None, processes: Processes) -> None:
    if costs is not None and config.target_latency is None:
        raise ValueError(f"costs={costs!r} are for a target_latency; give one, or leave them out")
    if costs is None and config.target_latency is not None and processes.size > 1:
        raise ValueError(
            "several processes would measure different costs; give them a file that grasp bench costs wrote, or a card"
        )


def measure_costs(
    name: str, output: Path, *, dtype: str = "auto", device: str | None = None, progress: Progress = silent
) -> CostTable:
    """Time a model's linears on this machine, and write the table to a file.

    Raises:
        GraspError: as ``load_model`` does.
        CostTableError: if the file cannot be written.
    """
    model, _ = load_quietly(name, dtype=dtype, device=device, progress=progress)
    table = costs_of(model, progress=progress)
    table.save(output)
    return table


def _with_batch_size(
    model: PreTrainedModel,
    config: GraspConfig,
    samples: Samples,
    kept: int | None,
    notify: Notify,
    processes: Processes,
) -> Samples:
    """The same samples with a number as batch size: that of the run that is continued, or the largest that fits."""
    if samples.batch_size != "auto":
        return samples
    sizes = {"num_samples": samples.num_samples, "seq_len": samples.seq_len}
    size = kept or fitting_batch_size(model, config, **sizes, trial=not processes.sharded)
    size = processes.least(size)
    notify(f"batch size {size}")
    return replace(samples, batch_size=size)


@dataclass(frozen=True)
class Plan:
    """What a compression would do and take.

    Attributes:
        model: its name.
        samples: with a number as batch size.
        device: where it would run.
        dtype: of the model's weights.
        estimate: sweeps, FLOPs and memory.
        rates: measured on the device, in FLOPs per second.
        seconds: FLOPs over rates; about the time without loading and saving.
        free_bytes: what the device has left now, the model not being loaded.
    """

    model: str
    samples: Samples
    device: str
    dtype: str
    estimate: Estimate
    rates: Rates
    seconds: float
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "estimate": self.estimate.to_dict()}


def plan(name: str, config: GraspConfig, samples: Samples, *, dtype: str = "auto", device: str | None = None) -> Plan:
    """Estimate what ``compress`` would take, without reading the model's weights.

    Raises:
        GraspError, ValueError: as ``load_config``, ``estimate`` and ``find_device`` do.
    """
    place = find_device(device)
    model_config, weights_dtype = load_config(name, dtype=dtype)
    job = Job(model_config, config, weights_dtype, place, samples.num_samples, samples.seq_len)
    free = free_bytes(place)
    if samples.batch_size == "auto":
        made = largest_batch_size(job, free, loaded=False)
    else:
        made = estimate(job, samples.batch_size)
    tokens = made.batch_size * samples.seq_len
    rates = measure_rates(made.largest_matrix, tokens, dtype=job.sweep_dtype, device=place)
    return Plan(
        model=name,
        samples=replace(samples, batch_size=made.batch_size),
        device=str(place),
        dtype=str(weights_dtype).removeprefix("torch."),
        estimate=made,
        rates=rates,
        seconds=made.seconds(rates),
        free_bytes=free,
    )


def draw(tokenizer: PreTrainedTokenizerBase, text: str, samples: Samples) -> list[CalibrationBatch]:
    """The token batches that ``samples``, with a number as batch size, asks for."""
    assert samples.batch_size != "auto"
    return token_batches(
        tokenizer,
        text,
        num_samples=samples.num_samples,
        seq_len=samples.seq_len,
        batch_size=samples.batch_size,
        seed=samples.seed,
    )


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    samples: Samples,
    report: CompressionReport,
    *,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Save a compressed model with its report and model card.

    Raises:
        CheckpointError: as ``save_checkpoint`` does.
    """
    base_model = str(model.config._name_or_path or name)
    progress("saving", 0, 1)
    save_checkpoint(
        model,
        directory,
        tokenizer=tokenizer,
        card=model_card(
            model,
            base_model=base_model,
            license=BUILTIN_LICENSE if name == BUILTIN else read_license(base_model),
            details=_how(samples, report),
        ),
        extra_files={FILE_NAME: report.to_json(), **(extra_files or {})},
        overwrite=overwrite,
    )
    progress("saving", 1, 1)


def evaluate(
    name: str,
    source: str | None,
    *,
    tasks: TaskRequest | None = None,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Size of a model, its perplexity on the text ``source`` unless that is ``None``, and its scores on ``tasks``.

    Raises:
        GraspError, ValueError: as ``read_text``, ``load_model``, ``perplexity`` and ``evaluate_tasks`` do.
        CalibrationError: if the tokenizer gives tokens that the model does not have.
        OutOfMemoryError: if the device's memory does not suffice.
    """
    text = None if source is None else read_text(source, split="evaluation")
    if tasks is not None:
        tasks.check(batch_size)
    result = scores = None
    with within_memory(batch_size, window):
        model, tokenizer = load_quietly(name, dtype=dtype, device=device, progress=progress)
        if text is not None:
            tokens = tokenize(tokenizer, text)
            require_known(model, tokens)
            result = perplexity(
                model,
                tokens,
                window=window,
                stride=stride,
                batch_size=batch_size,
                bos_token_id=bos_for(tokenizer),
                progress=progress,
            )
        if tasks is not None:
            scores = evaluate_tasks(
                *(model, tokenizer, tasks.names, tasks.source, tasks.limit), batch_size=batch_size, progress=progress
            )
    text = None if source is None else _text_name(source)
    return Evaluation(_model_name(name), text, result, model_size(model, decoder(model).layers), scores)


def _model_name(name: str) -> str:
    """A model's name as others may read it: a folder or file without the folders it lies in."""
    return name if is_hub_name(name) else Path(name).name


def _text_name(source: str) -> str:
    return source if source in (BUILTIN, *HUB_TEXTS) else Path(source).name


def require_known(model: PreTrainedModel, token_ids: torch.Tensor) -> None:
    """Check that a model has the tokens that a tokenizer gave.

    Raises:
        CalibrationError: if it does not.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if token_ids.numel() and (highest := int(token_ids.max())) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives the token {highest}, but the model has {vocabulary} tokens: the tokenizer does not "
            "belong to the model. Save the model's own tokenizer with it"
        )


@contextmanager
def within_memory(batch_size: int | str, length: int) -> Iterator[None]:
    """Say of the work in the block what to do where it fails for want of memory, or of finite weights.

    Raises:
        OutOfMemoryError, NonFiniteError: with the remedy.
    """
    try:
        yield
    except GraspError:
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(
            f"a singular value decomposition failed ({' '.join(str(error).split())}); the weights may be damaged. "
            "Check them, or try --dtype float32 or --device cpu"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"the device has too little memory for batches of {batch_size} x {length} tokens; take a smaller batch, "
            "shorter sequences or windows, --dtype bfloat16, or --device cpu"
        ) from error


def _how(samples: Samples, report: CompressionReport) -> str:
    source = samples.source if samples.source in (BUILTIN, *HUB_TEXTS) else "a text file"
    config = report.config
    chosen = "as asked for" if config["layers"] is not None else "those with the lowest block influence"
    if report.scope == "model":
        chosen = "all of them"
    spent = "one budget over all matrices" if config["allocation"] == "global" else "the same share of each matrix"
    return (
        "## How it was made\n\n"
        f"Layers {', '.join(map(str, report.redundant_layers)) or 'none'}: {chosen}. Calibrated on "
        f"{samples.num_samples} sequences of {samples.seq_len} tokens of {source} (seed {samples.seed}). "
        f"The singular groups of the highest importance were kept, {spent} (basis `{config['basis']}`, metric "
        f"`{config['metric']}`). `{FILE_NAME}` has the whole account."
    )
