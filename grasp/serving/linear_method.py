"""A linear of a serving stack in which some or all parts are low-rank or quantised, without what one stack needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp.errors import CheckpointError
from grasp.method.ranks import Shape
from grasp.method.storage import Storage
from grasp.model.checkpoint_format import check_rank
from grasp.serving.parts import NAMES, Part, Spec
from grasp.serving.shards import Piece, linear_index, local_size, merged_linears
from grasp_kernels import Dense, Factors, lowrank_linear, lowrank_linear_merged
from grasp_kernels.packing import RANK_MULTIPLE
from grasp_kernels.quantized import dequantize

ALL = slice(None)


class LowRankMethod:
    """A method for linears in the sense of vLLM and SGLang, whose subclasses say how processes share a linear.

    It computes ``y_i = (x @ Vh_i.mT) @ U_i.mT + bias_i`` or ``x @ weight_i.mT + bias_i``. ``parts.Part`` says which
    tensors a part has in this process. The layer has a parameter of each name in ``parts.NAMES``, a vector with the
    tensors of all parts, often empty, by which the stack finds the loaders. The Vh of all parts lie one behind the
    other, so one product with x serves all of them. On GPUs ranks are padded with zeros to a multiple of 16, as in
    ``grasp_kernels.pack_factors``, but not those of pivoted or quantised parts.
    """

    def __init__(
        self,
        names: Sequence[str],
        ranks: Mapping[str, int],
        pivoted: Sequence[str] = (),
        quantized: Mapping[str, Storage] | None = None,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        self.names, self.ranks, self.pivoted, self.quantized = names, ranks, pivoted, quantized or {}
        self.shapes = shapes or {}
        self.parts: tuple[Part, ...] = ()
        self.dtype = torch.get_default_dtype()
        self.layer: Callable[[], nn.Module | None] = lambda: None  # the layer refers to this object
        self.waiting: dict[int, dict[str, Tensor]] = {}  # part → tensors that were loaded before its others

    def local_pieces(self, layer: Any, outputs: int) -> tuple[Sequence[Piece], Piece]:
        """The rows of each output, and the columns, that this process has."""
        raise NotImplementedError

    def on_cpu(self) -> bool:
        """Whether the stack runs on a CPU."""
        raise NotImplementedError

    def on_gpu(self) -> bool:
        """Whether the stack runs on a GPU of NVIDIA or AMD."""
        raise NotImplementedError

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the parameters of the linear; the constructor of the linear calls this once.

        Raises:
            UnsupportedModelError: if the number of the linear's outputs does not fit its parts, only some of them are
                quantised, or a shape or the columns of a quantised part cannot be cut at the borders of processes.
            CheckpointError: if a rank is above that of its weight, or only some of the linears have a shape.
        """
        pieces, columns = self.local_pieces(layer, len(output_partition_sizes))
        widths = output_partition_sizes
        if any(name in self.shapes for name in self.names):  # an MLP has fewer channels than the stack expects
            if missing := [name for name in self.names if name not in self.shapes]:
                raise CheckpointError(
                    f"config.json has the shape of a narrowed linear beside {missing[0]}, but not of that one; "
                    "expected those of all linears that the stack merges. Save the checkpoint again"
                )
            rows, inputs = zip(*(self.shapes[name] for name in self.names), strict=True)
            widths = [local_size(n, piece, self.names) for n, piece in zip(rows, pieces, strict=True)]
            input_size, input_size_per_partition = inputs[0], local_size(inputs[0], columns, self.names)
        linears = merged_linears(self.names, self.ranks, widths, pieces, self.pivoted, self.quantized)
        for linear in linears:
            check_rank(linear.name, linear.rank or 0, (linear.checkpoint_rows, input_size), pivoted=linear.pivoted)
        multiple = RANK_MULTIPLE if self.on_gpu() else 1
        self.parts = tuple(
            Part(linear, input_size_per_partition, columns, weight_as_factors=self.on_cpu(), rank_multiple=multiple)
            for linear in linears
        )
        self.dtype, self.layer = params_dtype, weakref.ref(layer)
        # Some architectures reorder loaded tensors along the dimensions named here. The rows of a pivoted U are not
        # outputs; an order that was reordered is refused.
        left = {} if any(part.linear.pivoted for part in self.parts) else {"output_dim": 0}
        dimensions = {
            **{"U": left, "U_scales": left, "Vh": {"input_dim": 1}, "order": {"output_dim": 0}},
            **{"weight": {"input_dim": 1, "output_dim": 0}, "weight_scales": {"output_dim": 0}},
        }
        for name in NAMES:
            parameter = nn.Parameter(self._memory(name), requires_grad=False)
            for attribute, value in {"weight_loader": self._loader(name), **dimensions.get(name, {})}.items():
                setattr(parameter, attribute, value)
            layer.register_parameter(name, parameter)

    def _memory(self, name: str) -> Tensor:
        """The parameter of a name before it is loaded: NaN, so that a tensor that the checkpoint lacks is detected."""
        size = sum(spec.numel for spec in self._specs(name))
        if name == "order":  # one that kernels can use, for engines without a checkpoint (`--load-format dummy`)
            return torch.cat([torch.arange(spec.numel, dtype=torch.int32) for spec in self._specs(name)])
        # A quantised weight may be held under another name; a loader of vLLM warns of dtypes that differ.
        dtypes = (specs[name].dtype for part in self.parts for specs in (part.held, part.stored) if name in specs)
        dtype = next(filter(None, dtypes), self.dtype)
        return torch.full((size,), torch.nan if dtype.is_floating_point else 0, dtype=dtype)

    def _specs(self, name: str) -> list[Spec]:
        return [part.held.get(name, Spec((0,))) for part in self.parts]

    def views(self, name: str, memory: Tensor) -> list[Tensor]:
        """The tensor of each part in the parameter of a name; empty if the part has none.

        Values of 8 and 4 bits have two dtypes of one byte, and lie in one parameter.
        """
        specs = self._specs(name)
        pieces = memory.split([spec.numel for spec in specs])
        return [p.view(spec.dtype or p.dtype).view(spec.shape) for p, spec in zip(pieces, specs, strict=True)]

    def _loader(self, name: str) -> Callable[..., None]:
        """The loader of a parameter. It is a function because vLLM's reloading needs ``__name__``."""

        def load(param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:
            self._load(name, param, loaded_weight, shard_id)

        return load

    def _load(self, name: str, param: nn.Parameter, loaded_weight: Tensor, shard_id: object) -> None:
        """Check a tensor of the checkpoint, and fill the parameters of its part once all tensors of it are there."""
        index = linear_index(shard_id, [part.linear for part in self.parts])
        self.parts[index].check(name, loaded_weight)
        loaded = {**self.waiting.pop(index, {}), name: loaded_weight}
        if loaded.keys() < self.parts[index].stored.keys():
            # Some loaders overwrite their buffer with the next tensor.
            self.waiting[index] = {**loaded, name: loaded_weight.clone()}
            return
        layer = self.layer()
        assert layer is not None
        for held, tensor in self.parts[index].make(loaded, param.device).items():
            memory = self.views(held, getattr(layer, held).data)[index]
            if memory.shape != tensor.shape:  # a padded rank
                memory.zero_()
            memory[tuple(slice(size) for size in tensor.shape)].copy_(tensor)

    def check_loaded(self, layer: Any) -> None:
        """Check that all tensors were in the checkpoint.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
        """
        for index, loaded in self.waiting.items():
            part = self.parts[index]
            missing = ", ".join(f"{part.linear.name}.{name}" for name in part.stored if name not in loaded)
            raise CheckpointError(
                f"{missing} is not in the checkpoint; expected {', '.join(part.stored)} of {part.linear.name}. Save or "
                "copy the checkpoint again."
            )
        for name in NAMES:
            for part, tensor in zip(self.parts, self.views(name, getattr(layer, name).data), strict=True):
                if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
                    stored = name if name in part.stored else name.replace("Vh", "weight")
                    raise CheckpointError(
                        f"{part.linear.name}.{stored} is not in the checkpoint, or has NaN or infinite entries; "
                        f"expected finite {', '.join(part.stored)}. Save or copy the checkpoint again."
                    )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., sum of N_i)."""
        if all(part.held.keys() == {"weight"} for part in self.parts):
            return F.linear(x, layer.weight.view(-1, x.shape[-1]), bias)
        return self.compute(layer, x, bias)

    def compute(self, layer: Any, x: Tensor, bias: Tensor | None, parts: slice = ALL) -> Tensor:
        """The outputs of some neighbouring parts, whose bias is given, side by side; one call of an op of grasp."""
        members = self.members(layer, x, bias, parts)
        (first, *others) = members
        if others:
            return lowrank_linear_merged(x, members)
        return F.linear(x, *first) if isinstance(first, Dense) else lowrank_linear(x, *first)

    def members(self, layer: Any, x: Tensor, bias: Tensor | None, chosen: slice = ALL) -> list[Any]:
        """The factors of each chosen part that has some, and ``Dense`` of the others."""
        parts = self.parts[chosen]
        biases = [None] * len(parts) if bias is None else bias.split([part.linear.rows for part in parts])
        used = [name for name in NAMES if any(name in part.held for part in parts)]
        views = {name: self.views(name, getattr(layer, name))[chosen] for name in used}
        members: list[Any] = []
        for index, (part, b) in enumerate(zip(parts, biases, strict=True)):
            tensors = {name: views[name][index] for name in part.held}
            if "weight" not in tensors:
                none = {} if "U" in tensors else {"U": x.new_empty(0, part.linear.rows)}
                members.append(Factors(s=None, bias=b, **none, **tensors))
            elif "weight_scales" not in tensors:
                members.append(Dense(tensors["weight"], b))
            else:
                weight = dequantize(tensors["weight"], tensors["weight_scales"], part.width, x.dtype)
                members.append(Dense(weight, b))
        return members
