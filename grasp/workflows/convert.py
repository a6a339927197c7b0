"""``grasp convert``: a compressed checkpoint → the same model with its low-rank layers in another form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from grasp.checkpoint import recovery_report
from grasp.checkpoint.card import with_sizes, without_results
from grasp.checkpoint.compression_report import FILE_NAME, CompressionReport
from grasp.checkpoint.inspection import Inspection, inspect_compressed
from grasp.checkpoint.saving import LICENSES, check_directory, read_texts, save_checkpoint
from grasp.compression.selection import stored_reports
from grasp.errors import NonFiniteError
from grasp.files import remove_abandoned, require_space
from grasp.loading import load_quietly
from grasp.method.ranks import FORMS, Form
from grasp.model.checkpoint_format import weight_files
from grasp.model.checkpoint_modules import lowrank_layers
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import require_floating_factors
from grasp.model.size import model_size
from grasp.progress import Progress, no_progress, one_step

_CONVERSIONS = {"pivoted": LowRankLinear.pivot_, "factored": LowRankLinear.factor_}
TEXTS = ("README.md", recovery_report.FILE_NAME, *LICENSES)  # of a compressed checkpoint


@dataclass(frozen=True)
class Conversion:
    """The written checkpoint, beside the one that it was made of."""

    form: str  # of the layers of the result, except those that were left
    converted: tuple[str, ...]  # paths of the layers that had another form
    left: Mapping[str, str]  # path → the reason why a layer keeps the other form
    # what is not copied: results of ``grasp evaluate``, for example, which belong to one size, and licences that are no
    # text in UTF-8
    omitted: tuple[str, ...]
    before: Inspection  # the given checkpoint
    after: Inspection  # the written one

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        sizes = ("parameters", "bytes", "compression_ratio")
        return {
            **{"model": self.before.directory, "output": self.after.directory, "form": self.form},
            **{"converted": list(self.converted), "left": dict(self.left), "omitted": list(self.omitted)},
            "before": {name: getattr(self.before, name) for name in sizes},
            "after": {name: getattr(self.after, name) for name in sizes},
        }


def convert(directory: Path, output: Path, form: Form, *, progress: Progress = no_progress) -> Conversion:
    """Write the low-rank layers of a compressed checkpoint in another form, into a new folder. Exact but for rounding.

    The model is loaded on the CPU, in the dtype in which it is stored. Layers that have the form already are copied.

    Args:
        directory: a folder that ``grasp compress`` or ``save_pretrained`` wrote.
        output: new or empty.
        form: ``"pivoted"`` or ``"factored"``.
        progress: called after each layer.

    Raises:
        ValueError: if there is no such form.
        UnsupportedModelError: if its factors are quantised.
        CheckpointError: if ``directory`` is not a compressed checkpoint, or ``output`` cannot be written.
        NonFiniteError: if a factor has NaN or infinite entries.
        GraspError: as ``load_model``.
    """
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    target = check_directory(output)
    before = inspect_compressed(directory)
    remove_abandoned(target)
    texts = read_texts(directory, TEXTS)
    model, tokenizer = load_quietly(str(directory.absolute()), device="cpu", progress=progress)
    require_floating_factors(model)
    require_space(target, model.get_memory_footprint())
    converted, left = convert_(model, form, progress)
    card = texts.pop("README.md", None)
    if before.report is not None:
        texts[FILE_NAME] = with_forms(before.report, model).to_json()
    with one_step(progress, "saving"):
        save_checkpoint(
            *(model, target),
            tokenizer=tokenizer,
            card=None if card is None else with_sizes(without_results(card), model, before.parameters_before),
            extra_files=texts,
            seen={},
        )
    return Conversion(form, converted, left, _omitted(directory, target), before, inspect_compressed(target))


def convert_(
    model: PreTrainedModel, form: Form, progress: Progress = no_progress
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Convert the low-rank layers of a model in place: the paths of those that had another form, and of those left.

    Raises:
        NonFiniteError: if a factor has NaN or infinite entries; the message names the layer.
    """
    layers = dict(lowrank_layers(model))
    left: dict[str, str] = {}
    before = {name: layer.order for name, layer in layers.items()}
    for done, (name, layer) in enumerate(layers.items()):
        progress(f"converting to {form}", done, len(layers))
        try:
            if reason := _CONVERSIONS[form](layer):
                left[name] = reason
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}: {error}") from error
    progress(f"converting to {form}", len(layers), len(layers))
    return tuple(name for name, layer in layers.items() if layer.order is not before[name]), left


def with_forms(report: CompressionReport, model: PreTrainedModel) -> CompressionReport:
    """A report with the forms and sizes that the replaced linears of a model have now, and the size of the model."""
    modules = stored_reports(report.modules, model, len(report.block_influence), report.removed_layers)
    return replace(report, modules=modules, after=model_size(model), run="")


def _omitted(directory: Path, target: Path) -> tuple[str, ...]:
    """The names in a folder, besides weights and hidden files, that the new folder does not have."""
    weights = {file.name for file in weight_files(directory)} | {"model.safetensors.index.json"}
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    return tuple(sorted(names - weights - {path.name for path in target.iterdir()}))
