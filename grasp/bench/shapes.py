"""The shapes that benchmarks time: of a few linears, and of any model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from grasp.errors import GraspError, UnsupportedModelError
from grasp.loading import load_config
from grasp.method.ranks import break_even_rank, rank_for_retain_ratio
from grasp.model.dense import dense_shape
from grasp.model.families import family_of
from grasp.model.skeleton import skeleton
from grasp.model.targets import decoder, layer_targets
from grasp_kernels.shapes import GroupShape, LinearShape


class Widths(NamedTuple):
    """Widths of a model whose layers are built as Llama's; from its published configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


WELL_KNOWN: dict[str, Widths] = {
    "llama-2-7b": Widths(4096, 11008, 32, 32, 128),
    "llama-2-13b": Widths(5120, 13824, 40, 40, 128),
    "llama-3.1-8b": Widths(4096, 14336, 32, 8, 128),
    "llama-3.2-1b": Widths(2048, 8192, 32, 8, 64),
    "mistral-7b": Widths(4096, 14336, 32, 8, 128),
    "qwen2.5-7b": Widths(3584, 18944, 28, 4, 128),
    "qwen3-8b": Widths(4096, 12288, 32, 8, 128),
    "smollm2-135m": Widths(576, 1536, 9, 3, 64),
    "gemma-3-270m": Widths(640, 2048, 4, 1, 256),
}


def model_calls(name: str, retain_ratio: float) -> list[tuple[str, GroupShape]]:
    """The distinct calls of the ops in one decoder layer of a model: op and shape.

    ``lowrank_linear`` and ``singular_value_grad`` take every linear, ``lowrank_linear_grouped`` the linears that share
    an input, ``lowrank_glu`` gate and up. The layer is the first one with a linear to replace.

    Args:
        name: one of ``WELL_KNOWN``, or as ``grasp.loading.load_config`` takes it.
        retain_ratio: fraction of each matrix's parameters that its factors have, in (0, 1]; it sets the ranks.

    Raises:
        ValueError: if ``retain_ratio`` is out of range.
        GraspError: if the model is not found; the message lists ``WELL_KNOWN``.
        UnsupportedModelError: if low-rank factors make no linear of its layers smaller.
    """
    if not 0 < retain_ratio <= 1:
        raise ValueError(f"retain_ratio must be above 0 and at most 1, got {retain_ratio}")
    linears = _linears(_config(name), retain_ratio)
    if not linears:
        raise UnsupportedModelError(f"low-rank factors make no linear of the layers of {name} smaller")
    singles: list[GroupShape] = [(linear,) for linear in linears.values()]
    calls = [(op, shape) for op in ("lowrank_linear", "singular_value_grad") for shape in singles]
    parents = dict.fromkeys(path.rpartition(".")[0] for path in linears)
    for parent in parents:
        family = family_of(parent)
        for names in family.shared_inputs:
            group = [linears[path] for child in names if (path := f"{parent}.{child}") in linears]
            if len(group) < 2:
                continue
            calls.append(("lowrank_linear_grouped", tuple(group)))
            if names == family.gate_up and len({linear.N for linear in group}) == 1:
                calls.append(("lowrank_glu", tuple(group)))
    return list(dict.fromkeys(calls))


def _config(name: str) -> PreTrainedConfig:
    if name in WELL_KNOWN and not Path(name).exists():
        return LlamaConfig(**WELL_KNOWN[name]._asdict(), num_hidden_layers=1, vocab_size=8)
    try:
        return load_config(name)[0]
    except GraspError as error:
        raise type(error)(f"{error} Known shapes: {', '.join(WELL_KNOWN)}.") from error


def _linears(config: PreTrainedConfig, retain_ratio: float) -> dict[str, LinearShape]:
    """Shapes by path, of the first layer with a linear to replace."""
    model = skeleton(config, AutoModelForCausalLM.from_config)
    for layer in range(len(decoder(model).layers)):
        shapes = {target.name: dense_shape(target.module) for target in layer_targets(model, layer)[0]}
        linears = {
            name: LinearShape(k, n, rank_for_retain_ratio((n, k), retain_ratio, "factored"))
            for name, (n, k) in shapes.items()
            if break_even_rank((n, k), "factored") >= 1
        }
        if linears:
            return linears
    return {}
