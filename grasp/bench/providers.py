"""The models that ``grasp bench model`` compares: dense, layers removed, low-rank on each backend, unfused.

On a CPU, the dense and the low-rank model also with their dense linears in the kernel of the low-rank ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import Conv1D, PreTrainedModel

from grasp.bench.memory import leaving_out
from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.export.linear_pairs import linear_pair
from grasp.method.ranks import break_even_rank, rank_for_retain_ratio
from grasp.model.dense import dense_shape
from grasp.model.grouping import group_linears_
from grasp.model.kernel_linear import use_kernel_
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear, Pivotable, set_backend_
from grasp.model.narrowing import narrowed_shapes
from grasp.model.quantized_linear import QuantizedEmbedding, QuantizedLowRankLinear, is_quantized
from grasp.model.size import parameter_count
from grasp.model.targets import decoder, layer_targets
from grasp.progress import Progress, no_progress
from grasp_kernels.dispatch import BACKENDS, CPU_ROWS, OpCall, backend_missing, objection
from grasp_kernels.quantized import KINDS

DENSE, REMOVED, COMPRESSED, UNFUSED = "dense", "removed", "compressed", "unfused"
TOO_LARGE = "the device has too little memory for it beside the dense model; give --dtype bfloat16, or --device cpu"
KERNEL = "kernel"  # ``dense/kernel``, ``compressed/kernel``: see ``use_kernel_``


def weights_of(provider: str) -> str:
    """The provider whose weights another one has."""
    owner = provider.partition("/")[0]
    return owner if owner in (DENSE, REMOVED) else COMPRESSED


class ModelProvider(NamedTuple):
    """A model, and the backend of its low-rank linears; ``None`` if it has none."""

    model: PreTrainedModel
    backend: str | None = None

    def prepared(self) -> PreTrainedModel:
        """The model, with its low-rank linears set to the backend."""
        if self.backend is not None:
            set_backend_(self.model, self.backend)
        return self.model


def pick_layers(layers: Sequence[int] | None, num_layers: int, depth: int) -> list[int]:
    """``layers`` in ascending order, or the ``num_layers`` in the middle of ``depth`` layers.

    Raises:
        ValueError: if the model lacks one of the layers.
    """
    if layers is None:
        if not 1 <= num_layers <= depth:
            raise ValueError(f"the model has {depth} decoder layers, got num_layers={num_layers}")
        first = (depth - num_layers) // 2
        return list(range(first, first + num_layers))
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"the model has decoder layers 0..{depth - 1}, got layers {list(layers)}")
    return sorted(set(layers))


@torch.no_grad()
def truncate_(
    model: PreTrainedModel, layers: Sequence[int], retain_ratio: float, *, progress: Progress = no_progress
) -> None:
    """Replace the linears of ``layers`` by their largest singular groups, at GRASP's ranks.

    Raises:
        ValueError: if ``retain_ratio`` is out of range.
        UnsupportedModelError: if low-rank factors make no linear smaller.
    """
    if not 0 < retain_ratio <= 1:
        raise ValueError(f"retain_ratio must be above 0 and at most 1, got {retain_ratio}")
    targets = [target for layer in layers for target in layer_targets(model, layer)[0]]
    targets = [target for target in targets if break_even_rank(dense_shape(target.module), "factored") >= 1]
    if not targets:
        raise UnsupportedModelError(f"low-rank factors make no linear of the layers {list(layers)} smaller")
    for done, target in enumerate(targets, start=1):
        groups = torch.arange(rank_for_retain_ratio(dense_shape(target.module), retain_ratio, "factored"))
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, groups))
        progress("truncating", done, len(targets))
    group_linears_(model)


def unfuse_(model: nn.Module) -> None:
    """Replace every low-rank linear by two linears of PyTorch with the same tensors, without the ops."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(name, linear_pair(module))


def low_rank_layers(dense: PreTrainedModel, compressed: PreTrainedModel, name: str) -> tuple[list[int], float]:
    """The low-rank layers of ``compressed``, and the fraction of their matrices' parameters that the factors have.

    Where layers were removed, these are numbered as they are now. Without any, the fraction is 1.

    Raises:
        CheckpointError: if nothing is low-rank, narrowed, quantised or removed, or ``compressed`` was not made from
            ``dense``; the message has ``name``.
    """
    layers, factor_parameters, dense_parameters = [], 0, 0
    originals, narrowed = dict(dense.named_modules()), narrowed_shapes(compressed)
    for index, layer in enumerate(decoder(compressed).layers):
        linears = {path: module for path, module in layer.named_modules() if isinstance(module, Pivotable)}
        for path, module in linears.items():
            full = f"{decoder(compressed).path}.{index}.{path}"
            original, shape = originals.get(full), (module.out_features, module.in_features)
            before = dense_shape(original) if isinstance(original, (nn.Linear, Conv1D)) else None
            if before is None or (before != shape and full not in narrowed):
                raise CheckpointError(
                    f"{name} has a low-rank linear {full} of shape {shape}, the dense model has no such linear; "
                    "give the model that it was compressed from"
                )
            factor_parameters += parameter_count(module) - (0 if module.bias is None else module.bias.numel())
            dense_parameters += math.prod(before)
        layers += [index] if linears else []
    if not (layers or narrowed or shorter(compressed, dense) or is_quantized(compressed)):
        raise CheckpointError(f"{name} has no low-rank layers; expected a folder from grasp compress or quantize")
    expected = dense.get_input_embeddings().get_parameter("weight").float()
    embedding = compressed.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        weight, atol = embedding.dense_weight(), embedding.weight_scales.max().item()
    else:
        weight, atol = embedding.get_parameter("weight").float(), 1e-3
    if weight.shape != expected.shape or not torch.allclose(expected, weight, rtol=1e-2, atol=atol):
        raise CheckpointError(
            f"{name} has other embeddings than the dense model; give the model that it was compressed from"
        )
    return layers, factor_parameters / dense_parameters if layers else 1.0


def shorter(compressed: PreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether layers were removed."""
    return len(decoder(compressed).layers) < len(decoder(dense).layers)


def require_names(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Check that all names are known; ``what`` they are, such as ``"backend"``.

    Raises:
        ValueError: if one is not.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {what} {unknown[0]!r}; expected one of {', '.join(known)}")


def providers(
    dense: PreTrainedModel, compressed: PreTrainedModel, layers: Sequence[int], backends: Sequence[str] = ()
) -> tuple[dict[str, ModelProvider], dict[str, str]]:
    """The models to time, and the reasons of those that cannot be made. Backends share one set of weights."""
    models = {DENSE: ModelProvider(dense)}
    left_out: dict[str, str] = {}
    with leaving_out(left_out, REMOVED, TOO_LARGE, (UnsupportedModelError, ValueError)):
        if not layers:
            raise UnsupportedModelError("no layer is low-rank")
        if shorter(compressed, dense):
            raise UnsupportedModelError("layers of the compressed model were removed already")
        remove_layers_(removed := copy.deepcopy(dense), layers)
        models[REMOVED] = ModelProvider(removed)
    models[COMPRESSED] = ModelProvider(compressed, "auto")
    names = backends or [row.name for row in BACKENDS]
    models |= {f"{COMPRESSED}/{name}": ModelProvider(compressed, name) for name in names if layers}
    if "cpu" in names and not backend_missing("cpu") and dense.device.type == "cpu" and dense.dtype in CPU_ROWS:
        for name in (DENSE, COMPRESSED):
            twin = f"{name}/{KERNEL}"
            # Unsupported: all linears are quantised, or none is on the CPU.
            with leaving_out(left_out, twin, TOO_LARGE, (UnsupportedModelError,)):
                models[twin] = models[name]._replace(model=_with_kernel(models[name].model))
    if any(isinstance(module, LowRankLinear) for module in compressed.modules()):
        with leaving_out(left_out, UNFUSED, TOO_LARGE):
            unfuse_(unfused := copy.deepcopy(compressed))
            models[UNFUSED] = ModelProvider(unfused)
    else:
        left_out[UNFUSED] = "the model has no low-rank linear with floating factors"
    return models, left_out


def _with_kernel(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its dense linears in the CPU kernel, and with the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    use_kernel_(twin)
    return twin


def objections(provider: ModelProvider, rows: Sequence[int]) -> str | None:
    """Why the provider's backend refuses a low-rank linear of its model at one of these ``rows``, or ``None``."""
    row = next((row for row in BACKENDS if row.name == provider.backend), None)
    if row is None:
        return None
    modules = [module for module in provider.model.modules() if isinstance(module, Pivotable)]
    device, dtype, rank = modules[0].U.device, provider.model.dtype, max(module.rank for module in modules)
    weights = frozenset(KINDS[module.Vh.dtype] for module in modules if isinstance(module, QuantizedLowRankLinear))
    calls = [
        OpCall(op, device, dtype, count, rank, weights=weights)
        for op in ("lowrank_linear", "lowrank_linear_grouped")
        for count in rows
    ]
    return next((reason for call in calls if (reason := objection(row, call)) is not None), None)
