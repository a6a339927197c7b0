"""Which linears of a model can be compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport
from grasp.config import GraspConfig
from grasp.errors import CalibrationError, UnsupportedModelError
from grasp.method.ranks import break_even_rank
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape
from grasp.model.hf_quantizer import GraspHfQuantizer, require_floating
from grasp.model.targets import Target, decoder, layer_targets, max_positions

ModulesLeft = Mapping[int, Sequence[ModuleReport]]  # layer → modules that cannot be compressed, with the reason


def check_layers(config: GraspConfig, depth: int) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ValueError: if a configuration names one, or more than there are.
    """
    if config.layers and config.layers[-1] >= depth:
        raise ValueError(f"the model has decoder layers 0..{depth - 1}, got layers={list(config.layers)}")
    if config.num_layers is not None and config.num_layers > depth:
        raise ValueError(f"the model has {depth} decoder layers, got num_layers={config.num_layers}")


def require_positions(model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> None:
    """Refuse sequences that are longer than the model's context.

    Raises:
        CalibrationError: if one is.
    """
    limit, longest = max_positions(model), max(batch.input_ids.shape[1] for batch in batches)
    if limit is not None and longest > limit:
        raise CalibrationError(
            f"calibration sequences have {longest} tokens, the model has {limit} positions; take shorter sequences"
        )


def eligible_targets(model: PreTrainedModel) -> tuple[dict[int, list[Target]], dict[int, list[ModuleReport]]]:
    """For each layer, the linears that low-rank factors can make smaller, and the other modules with the reason.

    Raises:
        UnsupportedModelError: if the model is quantised, or no layer has a linear that can be made smaller.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, GraspHfQuantizer):
        raise UnsupportedModelError(
            f"the model is quantised ({type(quantizer).__name__}); expected a dense one. Load it unquantised."
        )
    if quantizer is not None:
        require_floating(model.config)
    targets: dict[int, list[Target]] = {}
    left: dict[int, list[ModuleReport]] = {}
    for layer in range(len(decoder(model).layers)):
        linears, reasons = layer_targets(model, layer)
        shapes = {target.name: dense_shape(target.module) for target in linears}
        targets[layer] = [target for target in linears if break_even_rank(shapes[target.name], "factored") >= 1]
        small = {
            t.name: f"too small: rank 1 does not shrink {shapes[t.name]}" for t in linears if t not in targets[layer]
        }
        left[layer] = [ModuleReport(name, layer, "", reason) for name, reason in (reasons | small).items()]
    if not any(targets.values()):
        raise UnsupportedModelError(
            f"no decoder layer of {type(model).__name__} has a dense nn.Linear or Conv1D to compress; expected some. "
            "A model that is quantised must be loaded unquantised."
        )
    return targets, left
