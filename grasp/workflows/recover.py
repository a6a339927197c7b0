"""``grasp recover``: a compressed checkpoint and training data → a checkpoint with trained factors or scales."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grasp.builtin import BUILTIN
from grasp.calibration import NAMED_TEXTS, read_pieces
from grasp.checkpoint import compression_report, recovery_report
from grasp.checkpoint.card import model_card, with_section, without_figure, without_results
from grasp.checkpoint.compression_report import kinds_text
from grasp.checkpoint.recovery_report import RecoveryReport
from grasp.checkpoint.recovery_state import RecoveryState
from grasp.checkpoint.saving import LICENSES, check_directory, has_finished, read_texts, save_checkpoint
from grasp.errors import CheckpointError
from grasp.files import expanded, remove_abandoned, require_space
from grasp.loading import load_quietly
from grasp.model.trainable import trained_parameters
from grasp.progress import Notify, Progress, no_notify, no_progress, one_step
from grasp.recovery import RecoveryConfig, recover_, recovery_fingerprint
from grasp.statistics.processes import ALONE, Processes
from grasp.training_data import TrainingSequence, hold_out, instruction_sequences, pack_text, read_instructions
from grasp.workflows.guards import require_known, within_memory
from grasp.workflows.kinds import batches_by_kind, finite_pairs, losses_by_kind


@dataclass(frozen=True)
class TrainingData:
    """The source of the training sequences.

    Raises:
        ValueError: if both a text and instructions are given.
    """

    text: str | None = None  # as for ``read_text``; ``None`` for the built-in one, unless there are ``instructions``
    instructions: Path | None = None  # a file for ``read_instructions``, used instead of a text
    seq_len: int = 512  # tokens per sequence

    def __post_init__(self) -> None:
        if self.text is not None and self.instructions is not None:
            raise ValueError(f"give text or instructions, got {self.text} and {self.instructions}")

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int | None, notify: Notify = no_notify
    ) -> list[TrainingSequence]:
        """All sequences of the source; of a streamed text or a large file, enough for ``tokens`` tokens.

        Raises:
            GraspError, ValueError: as ``read_pieces`` and the functions of ``grasp.training_data`` do.
        """
        if self.instructions is None:
            text = read_pieces(self._source, tokens=tokens, notify=notify)
            return pack_text(tokenizer, text, self.seq_len)
        instructions = read_instructions(self.instructions)
        sequences = instruction_sequences(tokenizer, instructions, self.seq_len)
        if skipped := len(instructions) - len(sequences):
            notify(
                f"{skipped} of {len(instructions)} instructions skipped: no room for an answer in {self.seq_len} tokens"
            )
        return sequences

    def __str__(self) -> str:
        if self.instructions is not None:
            return "a file of instructions, with the loss on the answers"
        return self._source if self._source in NAMED_TEXTS else "a text file"

    @property
    def _source(self) -> str:
        return BUILTIN if self.text is None else self.text


@dataclass(frozen=True)
class Recovery:
    """The written checkpoint and its report."""

    model: str
    output: str
    report: RecoveryReport

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {"model": self.model, "output": self.output, "report": self.report.to_dict()}


def recover(
    directory: Path,
    output: Path,
    config: RecoveryConfig,
    data: TrainingData,
    *,
    teacher: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
    processes: Processes = ALONE,
) -> Recovery:
    """Train the factors or the scales of a compressed checkpoint, and write the result into a new folder.

    The run folder ``OUTPUT.partial`` stores the progress until the checkpoint is written; the same call resumes from
    it. Rank 0 writes. ``teacher`` is the name of a model, see ``recover_``.

    Raises:
        GraspError, ValueError: as ``load_model``, ``TrainingData.sequences``, ``recover_`` and ``save_checkpoint`` do.
        CheckpointError: if ``directory`` is not a folder.
        OutOfMemoryError: if the device has too little memory.
        ResumeError: if ``OUTPUT.partial`` belongs to another run, or is not usable.
        DistributedError: if another process fails.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no folder {directory}; expected a checkpoint that `grasp compress` has written")
    texts = read_texts(directory, (compression_report.FILE_NAME, "README.md", *LICENSES))
    target = Path(os.path.realpath(expanded(output)))
    state = RecoveryState(f"{target}.partial", notify=notify, rank=processes.rank, processes=processes.size)
    finished = has_finished(target, recovery_report.FILE_NAME, asdict(config))  # and then killed, or asked for again
    if not finished:
        check_directory(output)
    with state:
        finished = bool(processes.least(finished))
        if processes.first:
            remove_abandoned(target)  # all processes have checked the folder, which makes a temporary of the same name
        with within_memory(config.micro_batch_size, data.seq_len):
            model, tokenizer = load_quietly(str(directory.absolute()), dtype=dtype, device=device, progress=progress)
            trained_parameters(model)  # raises before the text is read, which takes long
            dense = None
            if teacher is not None:
                dense, _ = load_quietly(teacher, dtype=dtype, device=device, progress=progress)
            sequences, held_out = hold_out(data.sequences(tokenizer, config.tokens, notify))
            for sequence in (*sequences, *held_out):
                require_known(model, sequence.input_ids)
            kinds = batches_by_kind(model, tokenizer, data.seq_len, notify)
            require_space(target, model.get_memory_footprint())
            if finished:
                state.require_same(recovery_fingerprint(model, sequences, held_out, config, dense))
                report = RecoveryReport.load(target)
                if report.run != state.run:
                    check_directory(output)
                return Recovery(str(directory), str(target), report)
            before = losses_by_kind(model, kinds, progress=progress, processes=processes)
            report = recover_(
                *(model, sequences, held_out, config),
                teacher=dense,
                progress=progress,
                notify=notify,
                state=state,
                processes=processes,
            )
            after = losses_by_kind(model, kinds, progress=progress, processes=processes)
            report = replace(report, kind_losses=finite_pairs(before, after, notify), run=state.run)
        if processes.first:
            card = without_figure(texts.pop("README.md", "") or model_card(model, base_model=None))
            with one_step(progress, "saving"):
                save_checkpoint(
                    *(model, target),
                    tokenizer=tokenizer,
                    card=with_section(without_results(card), "Recovery", _card_section(data, report)),
                    extra_files={**texts, recovery_report.FILE_NAME: report.to_json()},
                    seen={},
                )
    return Recovery(str(directory), str(target), report)


def _card_section(data: TrainingData, report: RecoveryReport) -> str:
    towards = ", towards the predictions of the dense model" if report.distilled else ""
    trained = "the low-rank factors" if report.factors else "the scales of quantised weights and the norms"
    text = (
        f"After compression, {trained} ({report.trained_parameters:,} parameters) were trained "
        f"on {report.tokens:,} tokens of {data} (sequences of {data.seq_len} tokens, {report.config['batch_size']} per "
        f"step, AdamW, learning rate {report.config['learning_rate']:g}{towards}). All other weights are unchanged. "
        f"The loss on held-out sequences of the same data went from {report.loss_before:.4f} to "
        f"{report.loss_after:.4f} nats per token. "
    )
    if changed := kinds_text(report.kinds):
        text += f"On passages of each kind that are in no training text of grasp it changed by {changed}. "
    return f"{text}`{recovery_report.FILE_NAME}` has the full report."
