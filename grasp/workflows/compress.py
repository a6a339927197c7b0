"""The jobs behind the command line: from a model's name and a text to a checkpoint folder or a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.bench.costs import costs_for
from grasp.bench.costs import measure_costs as costs_of
from grasp.builtin import BUILTIN, BUILTIN_LICENSE
from grasp.calibration import NAMED_TEXTS, read_text
from grasp.checkpoint.card import model_card, read_license
from grasp.checkpoint.compression_report import FILE_NAME, CompressionReport
from grasp.checkpoint.run_state import RunState
from grasp.checkpoint.saving import check_directory, require_space, save_checkpoint
from grasp.compress import compress_
from grasp.compression.batch_size import fitting_batch_size
from grasp.config import GraspConfig
from grasp.files import remove_abandoned
from grasp.loading import find_device, load_quietly
from grasp.method.cost_table import CostTable
from grasp.progress import Notify, Progress, no_notify, no_progress
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sharding import collect_, shard_
from grasp.version import __version__
from grasp.workflows.guards import require_known, within_memory
from grasp.workflows.samples import Samples, _model_name, _text_name, draw


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


def compress(
    name: str,
    output: Path,
    config: GraspConfig,
    samples: Samples,
    *,
    costs: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
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
    check_costs(config, costs, processes)
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


def check_costs(config: GraspConfig, costs: str | None, processes: Processes = ALONE) -> None:
    """Refuse costs without a latency, and a latency that several processes would measure costs for.

    Raises:
        ValueError: in either case.
    """
    if costs is not None and config.target_latency is None:
        raise ValueError(f"costs={costs!r} needs target_latency, an option of the preset best; give both or none")
    if costs is None and config.target_latency is not None and processes.size > 1:
        raise ValueError(
            "several processes would measure different costs; give costs, a file of grasp bench costs or a card"
        )


def measure_costs(
    name: str, output: Path, *, dtype: str = "auto", device: str | None = None, progress: Progress = no_progress
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
    progress: Progress = no_progress,
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


def _how(samples: Samples, report: CompressionReport) -> str:
    source = samples.source if samples.source in NAMED_TEXTS else "a text file"
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
