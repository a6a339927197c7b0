"""From a model name and a text to a compressed checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.bench.costs import costs_for, find_costs
from grasp.builtin import BUILTIN
from grasp.calibration import first_token_batches
from grasp.checkpoint.card import model_card, read_license
from grasp.checkpoint.compression_report import (
    COMPRESSED,
    DENSE,
    FILE_NAME,
    KIND_COLUMNS,
    CompressionReport,
    candidate_columns,
    kinds_text,
)
from grasp.checkpoint.fingerprint import request_fingerprint
from grasp.checkpoint.run_state import RunState
from grasp.checkpoint.saving import LICENSES, check_directory, has_finished, read_texts, save_checkpoint
from grasp.compress import compress_
from grasp.compression.batch_size import fitting_batch_size
from grasp.compression.device_speed import Rates, card_rates, decomposition_notice, measure_rates
from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import Estimate, estimate
from grasp.compression.job import CompressionJob
from grasp.compression.memory_budget import check_budgets
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from grasp.files import Contents, expanded, remove_abandoned, require_space
from grasp.formatting import Column, layer_ranges
from grasp.loading import find_device, load_config, load_quietly
from grasp.method.basis import BASES
from grasp.model.dense import dense_shape
from grasp.model.hf_quantizer import require_floating
from grasp.model.running import first_device
from grasp.model.targets import vocabulary_size
from grasp.progress import Notify, Progress, TimeLeft, no_notify, no_progress, one_step
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sharding import collect_, shard_
from grasp.version import __version__
from grasp.workflows.guards import kernel_notice, require_known, within_memory
from grasp.workflows.kinds import batches_by_kind, finite_pairs, losses_by_kind
from grasp.workflows.quantize import QUANTIZATION, quantization_text
from grasp.workflows.samples import Samples, draw, public_model_name, public_text_name, read_for
from grasp_kernels.roofline import Card

TOKENS_PER_INPUT = 4  # of the widest linear; a rule of thumb: with fewer tokens SmolLM2-135M lost clearly more


@dataclass(frozen=True)
class Compression:
    """A checkpoint that was written, with its report."""

    model: str  # the name that was given
    output: str  # the checkpoint folder
    samples: Samples  # the calibration sequences; their batch size is a number
    report: CompressionReport  # of ``compress_``, with the request

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {**asdict(self), "report": self.report.to_dict()}


def compress(
    name: str,
    output: Path,
    config: GraspConfig,
    samples: Samples,
    *,
    costs: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    memory: int | None = None,
    host_memory: int | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
    expect: Callable[[TimeLeft], None] = lambda job: None,
    processes: Processes = ALONE,
) -> Compression:
    """Compress a model into a new checkpoint folder.

    The request is checked before the long work starts. Progress is stored in ``OUTPUT.partial`` until the checkpoint
    is written, so that the same request resumes after an interruption.

    Args:
        name: model, as ``load_model`` takes it; ``dtype`` and ``device`` likewise. Processes that shard the model load
            it on the CPU, and each keeps its part.
        output: folder for the checkpoint; new or empty.
        config: what to compress and how.
        samples: the calibration sequences.
        costs: for ``target_latency``: a file of ``grasp bench costs``, a card of ``grasp_kernels.roofline``, or
            ``None`` to measure them now.
        memory: for ``compress_``, like ``host_memory``: bytes that may be taken above the loaded model.
        host_memory: bytes of CPU memory that may be taken beside a GPU.
        progress: called as ``progress(step, done, total)``.
        notify: called with one line when a run resumes, a batch size is chosen, only a part of the text is read, few
            sequences can be held out, the tokens are few, no kernel here reads weights of ``config.storage``, the loss
            on a kind of text is not finite, removing layers would lose less, or weights are not decomposed on the
            device of the model.
        expect: called with the time left of the whole job, before the long work starts.
        processes: processes that compress together; the first one writes.

    Raises:
        GraspError, ValueError: as ``load_model``, ``token_batches``, ``compress_`` and ``save_checkpoint`` do.
        CalibrationError: if the tokenizer has tokens that the model does not have.
        OutOfMemoryError: if the device has too little memory.
        CostTableError: if ``costs`` cannot be read or belong to another model.
        ResumeError: if ``OUTPUT.partial`` belongs to another request or is damaged.
        DistributedError: if another process fails.
    """
    target = Path(os.path.realpath(expanded(output)))
    state = RunState(f"{target}.partial", notify=notify, rank=processes.rank, processes=processes.size)
    finished = has_finished(target, FILE_NAME, config.to_dict())  # and then killed, or asked for again
    if not finished:
        check_directory(output)
    text = read_for(samples, notify)
    check_costs(config, costs, processes)
    require_floating(load_config(name)[0])
    licences = read_texts(expanded(name), LICENSES) if name != BUILTIN else {}
    with state:
        finished = bool(processes.least(finished))
        if processes.first:
            remove_abandoned(target)  # all processes have checked the folder, which makes a temporary of the same name
        with within_memory(samples.batch_size, samples.seq_len):
            place = "cpu" if processes.sharded else device
            model, tokenizer = load_quietly(name, dtype=dtype, device=place, progress=progress)
            if processes.sharded:
                shard_(model, find_device(device), processes)
            job = CompressionJob(
                *(model.config, config, model.dtype, first_device(model), samples.num_samples, samples.seq_len),
                processes=processes.size,
                sharded=processes.sharded,
            )
            samples = _with_batch_size(model, job, samples, state.batch_size, memory, notify, processes)
            batches, held_out = draw(tokenizer, text, samples, notify)
            if BASES[config.basis].inputs:  # covariances know the first tokens that they have seen, and no others
                batches += first_token_batches(tokenizer, batches, vocabulary=vocabulary_size(model), seed=samples.seed)
            kinds = batches_by_kind(model, tokenizer, samples.seq_len, notify)
            for batch in chain(batches, held_out):
                require_known(model, batch.input_ids)
            require_space(target, model.get_memory_footprint())
            for line in _notices(model, config, samples):
                notify(line)
            table = None
            if config.target_latency is not None:
                table = costs_for(model, costs, config.form, config.storages, measured=state.costs, progress=progress)
            if finished:
                state.require_same(request_fingerprint(model, batches, held_out, config, table))
                report = CompressionReport.load(target)
                if report.run != state.run:
                    check_directory(output)
                return Compression(name, str(target), samples, report)
            _prepare(job, int(samples.batch_size), state, memory, host_memory, expect)
            before = losses_by_kind(model, kinds, progress=progress, processes=processes)
            report = compress_(
                *(model, batches, config),
                held_out=held_out,
                costs=table,
                progress=progress,
                state=state,
                processes=processes,
                memory=memory,
                host_memory=host_memory,
            )
            after = losses_by_kind(model, kinds, progress=progress, processes=processes)
            report = replace(report, kind_losses=finite_pairs(before, after, notify))
            report = with_request(report, name, samples, costs=costs, dtype=dtype, device=device, processes=processes)
            report = replace(report, run=state.run)
            if (notice := worse_than_removal(report)) is not None:
                notify(notice)
        if processes.sharded:
            collect_(model, processes)
        if processes.first:
            write_checkpoint(model, tokenizer, target, name, samples, report, extra_files=licences, progress=progress)
    return Compression(name, str(target), samples, report)


def _prepare(
    job: CompressionJob,
    batch_size: int,
    state: RunState,
    memory: int | None,
    host_memory: int | None,
    expect: Callable[[TimeLeft], None],
) -> None:
    """Check that the disk has room for the run folder, and estimate the time of the whole job.

    Raises:
        CheckpointError: if it has not.
    """
    check_budgets(memory, host_memory, on_cpu=job.on_cpu)
    try:
        cost = estimate(job, batch_size, memory=memory, host_memory=host_memory)
    except UnsupportedModelError:
        return  # the layers cannot run without data; everything else about the model is checked by ``compress_``
    stored = sum(path.stat().st_size for path in state.folder.iterdir())
    require_space(state.folder, max(0, cost.memory.disk - stored))
    expect(cost.time_left(rates_for(job, cost)))


def rates_for(job: CompressionJob, cost: Estimate, card: Card | None = None) -> Rates:
    """FLOPs per second of a compression: the peaks of a card, or measured on the device of the job."""
    basis, tokens = BASES[job.config.basis], cost.batch_size * job.seq_len
    if card is not None:
        return card_rates(card, tokens, dtype=job.sweep_dtype, basis=basis)
    return measure_rates(cost.largest_matrix, tokens, dtype=job.sweep_dtype, device=job.device, basis=basis)


def _notices(model: PreTrainedModel, config: GraspConfig, samples: Samples) -> Iterator[str]:
    """What to say before the long work starts."""
    notices = [kernel_notice(model, config.storages)]
    if BASES[config.basis].inputs:
        notices += [few_tokens(model, samples), decomposition_notice(first_device(model))]
    yield from (notice for notice in notices if notice is not None)


def few_tokens(model: PreTrainedModel, samples: Samples) -> str | None:
    """What to say if covariances of the widest inputs are known from few tokens; ``None`` if there are enough."""
    targets = chain.from_iterable(eligible_targets(model)[0].values())
    widest = max(dense_shape(target.module)[1] for target in targets)
    tokens, enough = samples.num_samples * samples.seq_len, TOKENS_PER_INPUT * widest
    if tokens >= enough:
        return None
    return (
        f"{tokens} calibration tokens are few for linears with {widest} inputs: {enough} or more, such as "
        f"--num-samples {-(-enough // samples.seq_len)}, give a better model"
    )


def worse_than_removal(report: CompressionReport) -> str | None:
    """What to say if removing layers would lose less on held-out text; ``None`` if not, or if that was a candidate."""
    losses = dict(report.held_out_loss)
    if GraspConfig.from_dict(report.config).decides_together or len(losses) < 3:
        return None
    dense, after = losses.pop(DENSE), losses.pop(COMPRESSED)
    ((name, loss),) = losses.items()
    if loss >= after or report.candidate_bytes[name] > report.after.bytes:  # threshold_ratio may keep less
        return None
    return (
        f"removing layers would lose less on held-out text: {loss - dense:+.3f} nats per token with {name}, "
        f"{after - dense:+.3f} now. Take --preset best, which decides between both"
    )


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
    """Add the request to a report, so that it can be repeated; files are named without their folders.

    Keys are options of ``grasp compress``, except the model, the number of processes and the version of grasp.
    """
    sizes = asdict(samples)
    source = sizes.pop("source")
    request = {
        "model": public_model_name(name),
        "calibration": public_text_name(source),
        **sizes,
        "costs": None if costs is None else Path(costs).name,
        "dtype": dtype,
        "device": device,
        "shard": processes.sharded,
        "processes": processes.size,
        "grasp": __version__,
    }
    return replace(report, request=request)


def check_costs(config: GraspConfig, costs: str | None, processes: Processes = ALONE) -> None:
    """Refuse costs without a latency or that cannot be read, and a latency that several processes would measure for.

    Raises:
        ValueError, CostTableError: in these cases.
    """
    if costs is not None and config.target_latency is None:
        raise ValueError(f"costs={costs!r} needs target_latency, an option of the preset best; give both or none")
    if costs is not None:
        find_costs(costs)
    if costs is None and config.target_latency is not None and processes.size > 1:
        raise ValueError(
            "several processes would measure different costs; give costs, a file of grasp bench costs or a card"
        )


def _with_batch_size(
    model: PreTrainedModel,
    job: CompressionJob,
    samples: Samples,
    resumed: int | None,
    memory: int | None,
    notify: Notify,
    processes: Processes,
) -> Samples:
    """Replace ``batch_size="auto"`` by the batch size of the resumed run, or by the largest that fits."""
    if samples.batch_size != "auto":
        return samples
    alone = replace(job, processes=1, sharded=False)
    size = resumed or fitting_batch_size(model, alone, memory=memory, processes=processes)
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
    seen: Contents | None = None,
    progress: Progress = no_progress,
) -> None:
    """Save a compressed model with its report and model card; ``seen`` as in ``save_checkpoint``, ``None`` for empty.

    Raises:
        CheckpointError, OccupiedError: as ``save_checkpoint`` does.
    """
    base_model = str(model.config.name_or_path or name)
    with one_step(progress, "saving"):
        save_checkpoint(
            model,
            directory,
            tokenizer=tokenizer,
            card=model_card(
                model,
                base_model=base_model,
                before=report.before.parameters,
                license=read_license(base_model),
                details=_description(samples, report),
            ),
            extra_files={FILE_NAME: report.to_json(), **(extra_files or {})},
            seen=seen or {},
        )


def _losses(title: str, text: str, columns: Sequence[Column], rows: Sequence[object]) -> str:
    """Measured losses, as a section of the model card; nothing without rows."""
    if not rows:
        return ""
    cells = [[column.heading for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    cells += [[column.text_of(row) for column in columns] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"\n\n## {title}\n\nLosses in nats per token, {text}.\n\n{table}"


def _description(samples: Samples, report: CompressionReport) -> str:
    """Describe the compression for the model card."""
    config = GraspConfig.from_dict(report.config)
    selected = "as requested" if config.layers is not None else "the ones with the lowest block influence"
    if report.scope == "model":
        selected = "all"
    budget = "one budget over all matrices" if config.decides_together else "the same share of each matrix"
    removed = f"Removed layers: {layer_ranges(report.removed_layers)}. " if report.removed_layers else ""
    removed += f"{report.channels_text[:1].upper()}{report.channels_text[1:]}. " if report.channels else ""
    text = (
        f"## How it was made\n\n{removed}"
        f"Compressed layers: {layer_ranges(report.redundant_layers) or 'none'} ({selected}). "
        f"Calibrated on {samples}. "
    )
    if report.compressed:
        text += f"The most important singular groups were kept, {budget} "
        text += f"(basis `{config.basis}`, metric `{config.metric}`). "
    text += f"`{FILE_NAME}` has all details."
    held_out = "on text that was held out of the calibration"
    text += _losses("Held-out loss", held_out, candidate_columns(report.candidates), report.candidates)
    passages = f"on passages of each kind that are in no calibration text of grasp: {kinds_text(report.kinds)}"
    text += _losses("Loss by kind of text", passages, KIND_COLUMNS, report.kinds)
    if config.storage is None:
        return text
    stored = str(config.storage)
    if config.fewest_bits is not None:
        stored += f" or, where the budget chose that for a dense one, as {config.fewest_bits}"
    elif config.dense_storage != config.storage:
        stored += f" if they are low-rank and as {config.dense_storage} if they are dense"
    return f"{text}\n\n## {QUANTIZATION}\n\n{quantization_text(report.before, report.after, stored, samples)}"
