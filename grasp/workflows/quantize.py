"""``grasp quantize``: a dense or compressed model → a checkpoint with int8, int4 or fp8 weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from grasp.builtin import BUILTIN
from grasp.calibration import read_pieces
from grasp.checkpoint.card import model_card, read_license, with_section, with_sizes, without_results
from grasp.checkpoint.compression_report import FILE_NAME, KindLoss, kinds_of, kinds_text
from grasp.checkpoint.inspection import Inspection, inspect_checkpoint
from grasp.checkpoint.saving import LICENSES, check_directory, read_texts, save_checkpoint
from grasp.compression.eligible import require_positions
from grasp.compression.quantize import quantize_
from grasp.environment import free_bytes
from grasp.files import expanded, nearest_folder, remove_abandoned, require_space
from grasp.formatting import size
from grasp.loading import load_config, load_quietly
from grasp.method.storage import Storage
from grasp.model.hf_quantizer import require_floating
from grasp.model.size import Size, model_size
from grasp.progress import Notify, Progress, no_notify, no_progress, one_step
from grasp.statistics.hidden_states import Scratch
from grasp.workflows.convert import TEXTS, with_forms
from grasp.workflows.guards import kernel_notice, require_known, within_memory
from grasp.workflows.kinds import batches_by_kind, finite_pairs, losses_by_kind
from grasp.workflows.samples import Samples, draw

QUANTIZATION = "Quantisation"  # title of the section of the model card
LOSS_AWARE = "loss-aware"
ROUNDINGS = (LOSS_AWARE, "nearest")


@dataclass(frozen=True)
class Quantization:
    """The written checkpoint, and the model that it was made of."""

    model: str  # the name that was given
    storage: Storage  # of the linears in the decoder layers
    rounding: str  # one of ``ROUNDINGS``
    samples: Samples | None  # the calibration sequences; ``None`` for ``"nearest"``, which needs none
    before: Size  # size of the model
    after: Inspection  # the written checkpoint
    seconds: float  # time of loading, quantising, measuring and saving
    # kind of text → nats per token before and after, on text that nothing was calibrated on; {} if the built-in text is
    # not installed
    kind_losses: Mapping[str, Sequence[float]]

    @property
    def kinds(self) -> tuple[KindLoss, ...]:
        """The losses by kind of text, the one that lost most first."""
        return kinds_of(self.kind_losses)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object; ``share`` is the bytes after as a fraction of those before."""
        after = {name: getattr(self.after, name) for name in ("parameters", "bytes")}
        return {
            **{"model": self.model, "output": self.after.directory, **self.storage._asdict()},
            **{"rounding": self.rounding, "samples": None if self.samples is None else asdict(self.samples)},
            **{"before": {name: getattr(self.before, name) for name in after}, "after": after},
            "share": self.after.bytes / self.before.bytes,
            "parts": [asdict(part) for part in self.after.parts],
            "kind_losses": dict(self.kind_losses),
            "seconds": self.seconds,
        }


def quantize(
    name: str,
    output: Path,
    storage: Storage,
    samples: Samples,
    *,
    rounding: str = LOSS_AWARE,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = no_progress,
    notify: Notify = no_notify,
) -> Quantization:
    """Quantise the linears and embeddings of a model, low-rank or dense, and write it into a new folder.

    Embeddings and the output layer are stored as ``storage_outside`` says. Norms, biases and the experts of a mixture
    stay floating. Hidden states that take more than half of the free CPU memory go to files beside the output.

    Args:
        name: model, as ``load_model`` takes it; ``dtype`` and ``device`` likewise.
        output: folder for the checkpoint; new or empty.
        storage: of the linears in the decoder layers.
        samples: the calibration sequences of ``"loss-aware"``; their batch size is a number.
        rounding: ``"loss-aware"`` (see ``quantize_``) or ``"nearest"``.
        progress: called as ``progress(step, done, total)``.
        notify: called with one line when only a part of the text is read, no kernel here reads such weights, the
            losses by kind of text cannot be measured, or one is not finite.

    Raises:
        ValueError: if there is no such rounding.
        UnsupportedModelError: if the model is quantised.
        NonFiniteError: if a weight, or an input of it, has NaN or infinite entries; the message has the layer.
        GraspError: as ``load_model``, ``token_batches`` and ``save_checkpoint``.
    """
    start = time.perf_counter()
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}")
    target = check_directory(output)
    used = samples if rounding == LOSS_AWARE else None
    text = read_pieces(samples.source, tokens=samples.num_samples * samples.seq_len, notify=notify) if used else None
    require_floating(load_config(name)[0])
    remove_abandoned(target)
    folder = expanded(name)
    is_folder = name != BUILTIN and folder.is_dir()
    source = _source(folder) if is_folder else None
    texts = read_texts(folder, LICENSES if source is None else TEXTS) if is_folder else {}
    with within_memory(samples.batch_size, samples.seq_len):
        model, tokenizer = load_quietly(name, dtype=dtype, device=device, progress=progress)
        before = model_size(model)
        if (notice := kernel_notice(model, [storage])) is not None:
            notify(notice)
        require_space(target, before.parameters * storage.bits // 8)
        batches = [] if text is None else draw(tokenizer, text, samples)[0]
        if batches:
            require_positions(model, batches)
        for batch in batches:
            require_known(model, batch.input_ids)
        kinds = batches_by_kind(model, tokenizer, samples.seq_len, notify)
        losses = losses_by_kind(model, kinds, progress=progress)
        scratch = Scratch(nearest_folder(target), free_bytes(torch.device("cpu")) // 2)
        quantize_(model, storage, batches, scratch=scratch, progress=progress)
        losses_after = losses_by_kind(model, kinds, progress=progress)
    card = texts.pop("README.md", None)
    if source is not None and source.report is not None:
        texts[FILE_NAME] = with_forms(source.report, model).to_json()
    with one_step(progress, "saving"):
        parameters = None if source is None else source.parameters_before
        card = _new_card(name, model) if card is None else with_sizes(without_results(card), model, parameters)
        size_after = model_size(model)
        pairs = finite_pairs(losses, losses_after, notify)
        details = quantization_text(before, size_after, str(storage), used)
        if added := kinds_text(kinds_of(pairs)):
            details += f" On passages of each kind that are in no calibration text of grasp it adds {added}."
        card = with_section(card, QUANTIZATION, details)
        save_checkpoint(model, target, tokenizer=tokenizer, card=card, extra_files=texts, seen={})
    after = inspect_checkpoint(target)
    return Quantization(name, storage, rounding, used, before, after, time.perf_counter() - start, pairs)


def _source(folder: Path) -> Inspection | None:
    """The checkpoint in a folder, if it is one that grasp has compressed."""
    if not (folder / "config.json").is_file():
        return None
    found = inspect_checkpoint(folder)
    return found if found.is_compressed else None


def _new_card(name: str, model: PreTrainedModel) -> str:
    base_model = str(model.config.name_or_path or name)
    return model_card(model, base_model=base_model, license=read_license(base_model))


def quantization_text(before: Size, after: Size, stored: str, samples: Samples | None) -> str:
    """What a model card says about the quantisation; ``stored`` says how the linears of the layers are stored."""
    how = "rounded to the nearest value"
    if samples is not None:
        how = f"fitted to the outputs of the unquantised model, and rounded such that these change least, on {samples}"
    return (
        f"The linears of the decoder layers are stored as {stored}, {how}. The output layer is int8, and so are "
        "embeddings, or int4 if linears are and the two share no weight. "
        f"The model takes {size(after.bytes)}, {after.bytes / before.bytes:.1%} of the {size(before.bytes)} before."
    )
