"""A causal language model with its KV cache as an ONNX graph."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from grasp.errors import UnsupportedModelError
from grasp.export.linear_pairs import pair_linears_
from grasp.files import require_space
from grasp.formatting import one_line

Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, H, P, D)
_BATCH, _LENGTH, _PAST = 2, 3, 5  # of the example; sizes that are all different and above 1 stay variable
_REMEDY = "Give the folder that `grasp convert --to linear-pairs` writes to another exporter"


class _Step(nn.Module):
    """Tokens after a past → logits, and the past with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in accepted else "past_key_values"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        cache: Any = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_argument: cache},
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def export_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write ``model.onnx`` and its weights in fp32, with configuration and tokenizer.

    Inputs are ``input_ids`` and ``position_ids`` (B, L), ``attention_mask`` (B, P + L), and for each layer
    ``past_key_values.0.key`` and ``.value`` (B, H, P, D); P is 0 at first. Outputs are ``logits`` (B, L, V) and
    ``present.0.key`` and ``.value`` (B, H, P + L, D). B, L and P are free. A low-rank linear is two MatMuls.

    Args:
        model: changed in place, as by ``pair_linears_``, and to fp32.
        tokenizer: saved beside it.
        folder: an empty one.

    Returns:
        What became of the low-rank linears.

    Raises:
        UnsupportedModelError: as ``pair_linears_``; if the architecture has another cache, or no graph.
        CheckpointError: as ``require_space``.
    """
    if reason := _objection(model):
        raise UnsupportedModelError(f"no ONNX graph is written: {reason}. {_REMEDY}")
    shapes = pair_linears_(model)
    model.float().eval().set_attn_implementation("eager")  # plain MatMul and Softmax
    model.config.dtype = torch.float32
    require_space(folder, model.get_memory_footprint())
    try:
        program = _program(_Step(model).eval())
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedModelError(
            f"no ONNX graph is written: torch.onnx.export fails: {one_line(error.__cause__ or error)}. {_REMEDY}"
        ) from error
    program.save(folder / "model.onnx", external_data=True)
    _require_complete(folder / "model.onnx")
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{len(shapes)} low-rank linears are two MatMuls each. Weights are fp32."


def _require_complete(file: Path) -> None:
    """Check that the weights of a graph are on the disk: NumPy does not tell that writing their last bytes failed.

    Raises:
        OSError: if some are missing.
    """
    import onnx

    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and (data := file.parent / place["location"]).stat().st_size < (
            end := int(place["offset"]) + int(place["length"])
        ):
            raise OSError(f"{data.name} has {data.stat().st_size} of {end} bytes")


def _objection(model: PreTrainedModel) -> str | None:
    """Why the inputs and outputs do not fit a model; ``None`` if they do."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    if other := {*(getattr(model.config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return f"some layers have another cache than keys and values: {', '.join(sorted(other))}"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of PyTorch, which concern its own code and packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _program(step: _Step) -> torch.onnx.ONNXProgram:
    """The graph of a step, with names and free sizes."""
    tokens, positions = torch.ones(_BATCH, _LENGTH, dtype=torch.long), torch.arange(_PAST, _PAST + _LENGTH)
    mask, no_past = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long), torch.ones(_BATCH, _PAST, dtype=torch.long)
    sizes, cached = {0: "batch", 1: "length"}, {0: "batch", 2: "past"}
    inputs = ["input_ids", "attention_mask", "position_ids"]
    with torch.no_grad(), _quiet():
        _, past = step(no_past, no_past, torch.arange(_PAST).expand(_BATCH, -1), [])
        layers = [f"{layer}.{name}" for layer in range(len(past)) for name in ("key", "value")]
        program = torch.onnx.export(
            step,
            (tokens, mask, positions.expand(_BATCH, -1), past),
            dynamo=True,
            dynamic_shapes=(sizes, {0: "batch", 1: "total"}, sizes, [(cached, cached)] * len(past)),
            input_names=[*inputs, *(f"past_key_values.{name}" for name in layers)],
            output_names=["logits", *(f"present.{name}" for name in layers)],
            verbose=False,
        )
    assert program is not None  # it is with ``dynamo``
    return program
