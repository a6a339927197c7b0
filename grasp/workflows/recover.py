"""The job behind ``grasp recover``: from a compressed checkpoint and data to a checkpoint that is nearer to dense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.calibration import BUILTIN, HUB_TEXTS, read_text
from grasp.checkpoint import compression_report, recovery_report
from grasp.checkpoint.card import model_card, with_section, without_results
from grasp.checkpoint.recovery_report import RecoveryReport
from grasp.checkpoint.recovery_state import RecoveryState
from grasp.checkpoint.saving import check_directory, require_space, save_checkpoint
from grasp.errors import CheckpointError
from grasp.files import remove_abandoned
from grasp.loading import load_quietly
from grasp.progress import Notify, Progress, no_notify, no_progress
from grasp.recovery import RecoveryConfig, recover_, trainable_factors
from grasp.statistics.processes import ALONE, Processes
from grasp.training_data import TrainingSequence, hold_out, instruction_sequences, pack_text, read_instructions
from grasp.workflows.guards import require_known, within_memory

_CHARACTERS = 8_000_000  # the least that is fetched of a text without end, and
_CHARACTERS_PER_TOKEN = 6  # more than there are on average in the languages of those texts


@dataclass(frozen=True)
class Data:
    """What to train on: a text source as ``read_text`` takes it, or a file of instructions; tokens in a sequence."""

    text: str = BUILTIN
    instructions: Path | None = None
    seq_len: int = 512

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int | None, notify: Notify = no_notify
    ) -> list[TrainingSequence]:
        """All there are; of a text without end enough for ``tokens``.

        Raises:
            GraspError, ValueError: as ``read_text`` and the functions of ``grasp.training_data`` do.
        """
        if self.instructions is None:
            characters = max(_CHARACTERS, _CHARACTERS_PER_TOKEN * (tokens or 0))
            return pack_text(tokenizer, read_text(self.text, characters=characters), self.seq_len)
        instructions = read_instructions(self.instructions)
        sequences = instruction_sequences(tokenizer, instructions, self.seq_len)
        if left := len(instructions) - len(sequences):
            notify(f"{left} of {len(instructions)} instructions left out: {self.seq_len} tokens end before the answer")
        return sequences

    def __str__(self) -> str:
        if self.instructions is not None:
            return "a file of instructions, of which only the answers counted"
        return self.text if self.text in (BUILTIN, *HUB_TEXTS) else "a text file"


@dataclass(frozen=True)
class Recovery:
    """A checkpoint that was written, and how."""

    model: str
    output: str
    report: RecoveryReport

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"model": self.model, "output": self.output, "report": self.report.to_dict()}


def recover(
    directory: Path,
    output: Path,
    config: RecoveryConfig,
    data: Data,
    *,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
    processes: Processes = ALONE,
) -> Recovery:
    """Train the factors of a compressed checkpoint, and write the result into a new folder.

    What is done is kept beside it, in ``OUTPUT.partial``, until the checkpoint is written: after a kill the same
    request goes on from there. ``notify`` is told so. Of several ``processes`` the first writes.

    Raises:
        GraspError, ValueError: as ``load_model``, ``Data.sequences``, ``recover_`` and ``save_checkpoint`` do.
        CheckpointError: if ``directory`` is no folder.
        OutOfMemoryError: if the device's memory does not suffice.
        ResumeError: if ``OUTPUT.partial`` belongs to another request, or cannot be used.
        DistributedError: if another process fails or is gone.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no folder {directory}; expected a checkpoint that `grasp compress` wrote")
    target = check_directory(output)
    kept = target.with_name(f"{target.name}.partial")
    with RecoveryState(kept, notify=notify, rank=processes.rank, processes=processes.size) as state:
        if processes.first:
            remove_abandoned(target)
        with within_memory(config.micro_batch_size, data.seq_len):
            model, tokenizer = load_quietly(str(directory), dtype=dtype, device=device, progress=progress)
            trainable_factors(model)  # before the long work of reading the text
            sequences, held_out = hold_out(data.sequences(tokenizer, config.tokens, notify))
            for sequence in (*sequences, *held_out):
                require_known(model, sequence.input_ids)
            require_space(target, model.get_memory_footprint())
            made = recover_(
                *(model, sequences, held_out, config),
                progress=progress,
                notify=notify,
                state=state,
                processes=processes,
            )
        if processes.first:
            _write(model, tokenizer, directory, target, data, made, progress)
    return Recovery(str(directory), str(target), made)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    target: Path,
    data: Data,
    made: RecoveryReport,
    progress: Progress,
) -> None:
    progress("saving", 0, 1)
    files = {name: source / name for name in (compression_report.FILE_NAME, "README.md")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    card = texts.pop("README.md", None) or model_card(model, base_model=None)
    save_checkpoint(
        model,
        target,
        tokenizer=tokenizer,
        card=with_section(without_results(card), "Recovery", _how(data, made)),
        extra_files={**texts, recovery_report.FILE_NAME: made.to_json()},
    )
    progress("saving", 1, 1)


def _how(data: Data, made: RecoveryReport) -> str:
    return (
        f"After compression the factors of the low-rank layers, {made.trained_parameters:,} parameters, were trained "
        f"on {made.tokens:,} tokens of {data} (sequences of {data.seq_len}, {made.config['batch_size']} per step, "
        f"AdamW, learning rate {made.config['learning_rate']:g}); all other weights are as they were. The loss on "
        f"held-out sequences of the same data went from {made.loss_before:.4f} to {made.loss_after:.4f} nats per "
        f"token. `{recovery_report.FILE_NAME}` has the whole account."
    )
