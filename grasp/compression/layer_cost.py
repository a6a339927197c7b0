"""The FLOPs and bytes of decoder layers, counted by running them on tensors without data."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.formatting import one_line
from grasp.method.ranks import Form
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import DenseLinear
from grasp.model.hf_quantizer import low_rank_in, require_floating
from grasp.model.hooks import hooked, replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import hidden_input, hidden_output, passing_through, run_backbone, tuple_length
from grasp.model.skeleton import skeleton
from grasp.model.targets import Target, decoder
from grasp.statistics.sweep import visiting

_aten = torch.ops.aten


# Shapes → FLOPs of the ops that the counter of PyTorch does not support.
FLOP_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
    _aten._grouped_mm: lambda x, weights, *_, **__: 2 * math.prod(x) * weights[-1],  # tokens sorted by expert
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the live tensors that were created while this mode was active, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage not in inputs and storage not in self._storages:
                    self._storages.add(storage)
                    self._grow(storage.nbytes())
                    weakref.finalize(storage, self._grow, -storage.nbytes())
        return result

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class _GroupedProducts(TorchDispatchMode):
    """Products of experts in every dtype: without data PyTorch has them in bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        x, weights, *others = args
        return func(x.bfloat16(), weights.bfloat16(), *others, **(kwargs or {})).to(x.dtype)


class LayerCost(NamedTuple):
    """The cost of one call of a layer with one batch."""

    forward: int  # FLOPs
    backward: int  # FLOPs, in activations only
    saved: int  # bytes that live from the forward to the backward pass, including the output
    transient: int  # peak bytes in addition to ``saved``


Graph = Literal["none", "starts", "enters"]  # no autograd graph; it starts in the layer; it comes from the layer below


class Tracer:
    """The layers of one model, for batches of one shape.

    Attributes:
        model: a model without data.
        batch: a batch of tokens without data.
        width: numbers in the hidden states of a token.
        base_bytes: bytes of one batch outside the layers: embeddings, masks, positions.

    Args:
        config: configuration of the model.
        dtype: dtype of the weights.
        device: the device to estimate for; nothing is allocated on it.
        batch_size: sequences in the batch.
        seq_len: tokens per sequence.
        model_class: of the model; ``None`` for the one of transformers for ``config``.

    Raises:
        UnsupportedModelError: here or in ``layer``, if the operations of the model depend on the data of its tensors.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        seq_len: int,
        model_class: type[PreTrainedModel] | None = None,
    ) -> None:
        self._mode = FakeTensorMode()
        with _traceable(config, self._mode), torch.device(device):
            self.model = _lowrank_skeleton(config, model_class, dtype, device)
            self.batch = CalibrationBatch(torch.zeros(batch_size, seq_len, dtype=torch.int64))
            self._arguments, self.base_bytes = _arguments(self.model, self.batch)
        self.width = hidden_input(*self._arguments[0]).shape[-1]
        found = decoder(self.model)
        self._path = found.path
        self._structures = [_structure(layer, *each) for layer, each in zip(found.layers, self._arguments, strict=True)]
        self._costs: dict[Any, LayerCost] = {}

    def layer(
        self,
        index: int,
        graph: Graph,
        *,
        visited: Collection[Target] = (),
        ranks: Mapping[str, int] | None = None,
        form: Form = "factored",
    ) -> LayerCost:
        """The cost of one layer. Layers of equal structure run once.

        Args:
            index: index of the layer.
            graph: the part of the layer in the autograd graph.
            visited: linears of the layer that a sweep visits.
            ranks: ranks of the linears of the layer that are low-rank already, by name.
            form: of these.
        """
        ranks = {} if ranks is None else ranks
        prefix = f"{self._path}.{index}."
        key = (
            graph,
            frozenset(target.name.removeprefix(prefix) for target in visited),
            frozenset((name.removeprefix(prefix), rank, form) for name, rank in ranks.items()),
            self._structures[index],
        )
        if key not in self._costs:
            with _traceable(self.model.config, self._mode), replaced(self.model, _lowrank(self.model, ranks, form)):
                modules = dict(self.model.named_modules())
                targets = [target._replace(module=modules[target.name]) for target in visited]
                layer = decoder(self.model).layers[index]
                self._costs[key] = _layer_cost(layer, *self._arguments[index], graph, targets, self.batch)
        return self._costs[key]


def tracer_for(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    seq_len: int,
    model_class: type[PreTrainedModel] | None = None,
) -> Tracer:
    """A ``Tracer``, with its arguments and errors. Each thread keeps its last ones, since tracing takes a second."""
    standard: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model_class = None if model_class is standard else model_class
    nameless = copy.copy(config)
    nameless.name_or_path = ""
    text = nameless.to_json_string(use_diff=False)
    key = (get_ident(), text, config._attn_implementation, dtype, device, batch_size, seq_len, model_class)
    if key not in _kept:
        while len(_kept) >= _KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = Tracer(
            config, dtype=dtype, device=device, batch_size=batch_size, seq_len=seq_len, model_class=model_class
        )
    return _kept[key]


_KEPT = 16
_kept: dict[Any, Tracer] = {}


def _layer_cost(
    layer: nn.Module, args: Any, kwargs: Any, graph: Graph, visited: Collection[Target], batch: CalibrationBatch
) -> LayerCost:
    hidden = torch.empty_like(hidden_input(args, kwargs)).requires_grad_(graph == "enters")
    args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
    flops = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with torch.set_grad_enabled(graph != "none"), LiveBytes() as live, flops:
        with visiting({target.module: target for target in visited}, batch, lambda call: None):
            output = hidden_output(layer(*args, **kwargs))
        forward, saved = flops.get_total_flops(), live.now
        if output.requires_grad:
            torch.autograd.backward(output, torch.empty_like(output))
    return LayerCost(forward, flops.get_total_flops() - forward, saved, live.peak - saved)


def _lowrank_skeleton(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A frozen model without data, with the low-rank layers of ``config``."""
    build = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    options = {"dtype": dtype, "attn_implementation": config._attn_implementation}
    model = skeleton(config, partial(build, **options), device)
    low = low_rank_in(config)
    require_floating(config)
    for name, rank in low.ranks.items():
        model.set_submodule(name, _lowrank_like(model.get_submodule(name), rank, name in low.pivoted))
    model.eval().requires_grad_(False)
    return model


def _lowrank_like(dense: nn.Module, rank: int, pivoted: bool) -> LowRankLinear:
    assert isinstance(dense, DenseLinear)
    return LowRankLinear.like(dense, rank, pivoted=pivoted).requires_grad_(False)


def _lowrank(model: PreTrainedModel, ranks: Mapping[str, int], form: Form) -> dict[str, LowRankLinear]:
    """Low-rank linears by path, for the place of dense ones."""
    return {name: _lowrank_like(model.get_submodule(name), rank, form == "pivoted") for name, rank in ranks.items()}


def _arguments(model: PreTrainedModel, batch: CalibrationBatch) -> tuple[list[tuple[Any, Any]], int]:
    """The arguments of each decoder layer, and their bytes."""
    arguments: list[tuple[Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        arguments.append((args, kwargs))

    layers = list(decoder(model).layers)
    with (
        passing_through(layers, tuple_length(model, batch)),
        hooked(*layers, before=note),
        torch.no_grad(),
        LiveBytes() as live,
    ):
        run_backbone(model, batch)
    return arguments, live.peak


def _structure(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """A key that is equal for layers of equal cost: modules, shapes of parameters and arguments."""
    modules = tuple(
        (path, type(module).__name__, tuple(tuple(p.shape) for p in module.parameters(recurse=False)))
        for path, module in layer.named_modules()
    )
    arguments = tuple(tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return modules, arguments


@contextmanager
def _traceable(config: PreTrainedConfig, mode: FakeTensorMode) -> Iterator[None]:
    try:
        with mode, _GroupedProducts():
            yield
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the cost of a {config.model_type} model cannot be estimated: {one_line(error)}. Use a number as batch "
            "size and no dry run, or try another dtype"
        ) from error
