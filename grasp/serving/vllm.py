"""The checkpoint format for vLLM, which calls ``register`` through the entry point ``vllm.general_plugins``.

Only vLLM imports this module. A linear with a rank in ``config.json`` becomes a low-rank linear. vLLM merges some
linears, such as q, k and v. One call of ``grasp::lowrank_linear_merged`` computes a merged linear, its dense parts
included. In an MLP whose gate and up are low-rank, ``grasp::lowrank_glu`` computes them and the activation. The ops are
opaque to ``torch.compile`` and do not synchronise with the GPU, so CUDA graphs can record them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.pivoting import factored
from grasp.model.checkpoint_format import METHOD, check_rank
from grasp.model.hf_quantizer import GraspQuantizationConfig
from grasp.serving.shards import (
    WHOLE,
    LocalLinear,
    Piece,
    check_order,
    check_shape,
    linear_index,
    linear_names,
    local_columns,
    local_rows,
    merged_linears,
    output_pieces,
)
from grasp.serving.vllm_mlp import fuse_gate_, watch_parents
from grasp_kernels import Dense, Factors, lowrank_glu, lowrank_linear, lowrank_linear_merged, warm_up
from grasp_kernels.packing import RANK_MULTIPLE


class GraspVllmConfig(QuantizationConfig):
    """The ``quantization_config`` of a compressed checkpoint: the ranks of its low-rank linears, and the pivoted."""

    def __init__(self, ranks: dict[str, int], pivoted: Sequence[str] = ()) -> None:
        super().__init__()
        self.ranks, self.pivoted = ranks, list(pivoted)

    def get_name(self) -> str:
        """The name in ``config.json``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the ops support; vLLM refuses others."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: plain PyTorch runs where no kernel does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file other than ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraspVllmConfig:
        """Read the ``quantization_config`` of a ``config.json``.

        Raises:
            CheckpointError: as ``check_format``.
            UnsupportedModelError: if modules are quantised.
        """
        read = GraspQuantizationConfig.from_dict(dict(config))
        if read.quantized:
            raise UnsupportedModelError(
                f"the checkpoint has quantised modules ({', '.join(read.quantized)}), which run under transformers; "
                "vLLM serves floating factors and weights. Give it the checkpoint that `grasp quantize` was given, or "
                "a dense one: load this one with transformers and call model.dequantize() and save_pretrained"
            )
        return cls(dict(read.ranks), read.pivoted)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the low-rank linears as vLLM renames the modules of this architecture."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.pivoted = hf_to_vllm_mapper.apply_list(self.pivoted)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that loads and runs a module; vLLM calls this for linears, embeddings, attention and experts.

        Raises:
            UnsupportedModelError: if a module that is not a linear has a rank, or vLLM would damage its factors.
        """
        if isinstance(layer, LinearBase):
            names = linear_names(prefix, self.packed_modules_mapping)
            if not any(name in self.ranks for name in names):
                return UnquantizedLinearMethod()
            _check_loader(prefix)
            watch_parents()
            return GraspLinearMethod(names, self.ranks, self.pivoted)
        for name in self.ranks:
            expert = name.removeprefix(f"{prefix}.")
            if name == prefix or (expert != name and expert[:1].isdigit()):
                raise UnsupportedModelError(
                    f"config.json has a rank for {name}, which vLLM serves with {type(layer).__name__}; expected ranks "
                    "of linear layers only. Compress without it, or serve this model with transformers."
                )
        return None


# Kinds of models → linears whose rows vLLM reorders in tensors of some names: also in Vh, or only in a dense weight.
_REORDERED = {"bloom": ("query_key_value",), "llama4_text": ("q_proj", "k_proj", "qkv_proj")}


def _check_loader(path: str) -> None:
    """Raise ``UnsupportedModelError`` for a low-rank linear whose factors vLLM's loader of the model would damage."""
    config = get_current_vllm_config_or_none()
    kind = config.model_config.hf_text_config.model_type if config and config.model_config else ""
    if path.rpartition(".")[2] in _REORDERED.get(kind, ()):
        raise UnsupportedModelError(
            f"vLLM reorders the rows of {path} in models of type {kind}, which is right for a dense weight only; "
            "expected a dense one. Compress without it, or serve this model with transformers."
        )


class _Size(NamedTuple):
    """The sizes of a part's parameters in one process. A part whose rank is 0 has a weight instead of factors."""

    rows: int  # of the output
    rank: int  # in memory
    left_rows: int  # of U
    order: int  # entries; 0 if the part is not pivoted here


def _size(part: LocalLinear, in_features: int, columns: Piece) -> _Size:
    """The sizes of a part with ``in_features`` local columns, the piece ``columns`` of all."""
    rank, pivots = part.rank or 0, part.keeps_pivots
    left_rows = part.rows - rank * pivots
    split = part.rows < part.checkpoint_rows or columns.total > 1
    # Each process has one factor whole, so a piece of the factors can have more numbers than one of the weight.
    if not rank or (split and (left_rows + in_features) * rank >= part.rows * in_features):
        return _Size(part.rows, 0, part.rows, 0)
    if pivots:
        return _Size(part.rows, rank, left_rows, part.rows)
    multiple = RANK_MULTIPLE if current_platform.is_cuda_alike() else 1
    return _Size(part.rows, -(-rank // multiple) * multiple, left_rows, 0)


class GraspLinearMethod(LinearMethodBase):
    """A linear of vLLM in which some or all parts are low-rank: ``y_i = (x @ Vh_i.mT) @ U_i.mT + bias_i``.

    A process has these parameters of the linear:

    * ``Vh`` (sum of R_i, K), of all low-rank parts in order, so that one product with x serves all of them;
    * ``U``, a vector of all U_i (N_i, R_i), or (N_i − R_i, R_i) if the part is pivoted;
    * ``order`` (sum of N_i) int32 of the pivoted parts, often empty;
    * ``weight`` (sum of N_i, K) of the dense parts, often empty; LoRA needs the attribute.

    In a column-parallel linear a process has some rows of U and weight and the whole Vh; in a row-parallel linear some
    columns of Vh and weight and the whole U. Pivoted factors stay pivoted in a process that has all rows; else they are
    expanded to U (N_i, R_i) when they are loaded. If a process has a piece of a linear, and this piece of the weight
    has fewer numbers than its factors, the part becomes dense. On GPUs ranks are padded with zeros to a multiple of 16,
    as in ``grasp_kernels.pack_factors``, but not those of pivoted parts.
    """

    def __init__(self, names: Sequence[str], ranks: Mapping[str, int], pivoted: Sequence[str] = ()) -> None:
        self.names, self.ranks, self.pivoted = names, ranks, pivoted
        self.parts: tuple[LocalLinear, ...] = ()
        self.columns = WHOLE
        self.sizes: tuple[_Size, ...] = ()
        self.layer: Callable[[], LinearBase | None] = lambda: None  # the layer refers to this object
        self.waiting: dict[int, dict[str, Tensor]] = {}  # part → tensors that were loaded before others that they need

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the parameters of the linear; the constructor of the linear calls this once.

        Raises:
            UnsupportedModelError: if the number of the linear's outputs does not fit its parts.
            CheckpointError: if a rank is above that of its weight.
        """
        pieces = (WHOLE,) * len(output_partition_sizes)
        if isinstance(layer, ColumnParallelLinear):
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            pieces = output_pieces(len(output_partition_sizes), layer.tp_rank, layer.tp_size, replicas)
        elif isinstance(layer, RowParallelLinear):
            self.columns = Piece(layer.tp_rank, layer.tp_size)
        self.parts = merged_linears(self.names, self.ranks, output_partition_sizes, pieces, self.pivoted)
        for part in self.parts:
            check_rank(part.name, part.rank or 0, (part.checkpoint_rows, input_size), pivoted=part.pivoted)
        K = input_size_per_partition
        self.sizes = tuple(_size(part, K, self.columns) for part in self.parts)
        self.layer = weakref.ref(layer)
        # Some architectures reorder loaded tensors along the dimensions named here. The rows of a pivoted U are not
        # outputs; an order that was reordered is refused.
        dimensions = {} if any(part.pivoted for part in self.parts) else {"output_dim": 0}
        U = _missing(sum(size.left_rows * size.rank for size in self.sizes), dtype=params_dtype)
        self._register(layer, "U", U, self._load_U, **dimensions)
        Vh = _missing(sum(size.rank for size in self.sizes), K, dtype=params_dtype)
        self._register(layer, "Vh", Vh, self._load_Vh, input_dim=1)
        weight = _missing(sum(size.rows for size in self.sizes if not size.rank), K, dtype=params_dtype)
        self._register(layer, "weight", weight, self._load_weight, input_dim=1, output_dim=0)
        # An order that kernels can use, for engines without a checkpoint (`--load-format dummy`).
        orders = torch.cat([torch.arange(size.order, dtype=torch.int32) for size in self.sizes])
        self._register(layer, "order", orders, self._load_order, output_dim=0)

    def _register(
        self, layer: LinearBase, name: str, tensor: Tensor, load: Callable[..., None], **dimensions: int
    ) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load, **dimensions})
        layer.register_parameter(name, parameter)

    def _load_U(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:  # noqa: N802
        index, part, rank = self._low_rank_part(shard_id, "U")
        check_shape(f"{part.name}.U", loaded_weight, (part.checkpoint_rows - rank * part.pivoted, rank))
        self._load(index, "U", loaded_weight)

    def _load_Vh(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:  # noqa: N802
        index, part, rank = self._low_rank_part(shard_id, "Vh")
        width = param.shape[1]
        check_shape(f"{part.name}.Vh", loaded_weight, (rank, width * self.columns.total))
        self._load(index, "Vh", local_columns(loaded_weight, width, self.columns))

    def _load_order(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:
        index, part, rank = self._low_rank_part(shard_id, "order")
        if not part.pivoted:
            raise CheckpointError(
                f"the checkpoint has {part.name}.order, but pivoted in config.json does not name {part.name}; save the "
                "model again"
            )
        check_order(f"{part.name}.order", loaded_weight, part.checkpoint_rows, rank)
        self._load(index, "order", loaded_weight)

    def _load(self, index: int, name: str, tensor: Tensor) -> None:
        """Fill the parameters of a part that depend on a tensor, once all that they depend on are loaded."""
        waiting, needed = self.waiting.setdefault(index, {}), self._needed(index, name)
        if needed <= {name, *waiting}:
            loaded = {name: tensor, **{other: waiting.pop(other) for other in needed - {name}}}
            self._fill(index, **loaded)
        else:
            waiting[name] = tensor.clone()  # some loaders overwrite their buffer with the next tensor

    def _needed(self, index: int, name: str) -> set[str]:
        """The tensors of a part that are needed together with one of them."""
        left = {"U", "order"} if self.parts[index].pivoted else {"U"}
        if not self.sizes[index].rank:
            return {*left, "Vh"}
        return left if name in left else {name}

    def _fill(self, index: int, U: Tensor | None = None, Vh: Tensor | None = None, order: Tensor | None = None) -> None:
        layer, size = self.layer(), self.sizes[index]
        assert layer is not None
        if U is not None and not size.order:
            U = local_rows(U if order is None else factored(U, order), self.parts[index])
        if not size.rank:
            assert U is not None
            assert Vh is not None
            weight = self._split_weight(layer.weight.data)[index]
            weight.copy_(U.to(weight.device, torch.float32) @ Vh.to(weight.device, torch.float32))
            return
        if U is not None:
            memory, rank = self._split_U(layer.U.data)[index], U.shape[1]
            memory[:, :rank].copy_(U)
            memory[:, rank:].zero_()
        if Vh is not None:
            memory, rank = self._split_Vh(layer.Vh.data)[index], Vh.shape[0]
            memory[:rank].copy_(Vh)
            memory[rank:].zero_()
        if order is not None and size.order:
            self._split_order(layer.order.data)[index].copy_(order)

    def _load_weight(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:
        index = linear_index(shard_id, self.parts)
        part, width = self.parts[index], param.shape[1]
        if part.rank is not None:
            raise CheckpointError(
                f"the checkpoint has a dense {part.name}.weight, but config.json the rank {part.rank} for it; save the "
                "model again"
            )
        check_shape(f"{part.name}.weight", loaded_weight, (part.checkpoint_rows, width * self.columns.total))
        local = local_columns(local_rows(loaded_weight, part), width, self.columns)
        self._split_weight(param.data)[index].copy_(local)

    def _low_rank_part(self, shard_id: object, tensor: str) -> tuple[int, LocalLinear, int]:
        index = linear_index(shard_id, self.parts)
        part = self.parts[index]
        if part.rank is None:
            raise CheckpointError(
                f"the checkpoint has the factor {part.name}.{tensor}, but config.json has no rank for it; save the "
                "model again"
            )
        return index, part, part.rank

    def _split_U(self, U: Tensor) -> list[Tensor]:  # noqa: N802
        """The U of each part, (rows of U, rank in memory); empty if the part is dense."""
        pieces = U.split([size.left_rows * size.rank for size in self.sizes])
        return [piece.view(size.left_rows, size.rank) for piece, size in zip(pieces, self.sizes, strict=True)]

    def _split_Vh(self, Vh: Tensor) -> Sequence[Tensor]:  # noqa: N802
        """The Vh of each part, (rank in memory, K); empty if the part is dense."""
        return Vh.split([size.rank for size in self.sizes])

    def _split_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """The weight of each part, (rows, K); empty if the part is low-rank."""
        return weight.split([0 if size.rank else size.rows for size in self.sizes])

    def _split_order(self, order: Tensor) -> Sequence[Tensor]:
        """The order of each part, (rows,); empty if the part is not pivoted here."""
        return order.split([size.order for size in self.sizes])

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that all tensors were in the checkpoint, and compile the kernels.

        The parameters stay, so that vLLM can load them again.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
        """
        for index, waiting in self.waiting.items():
            for name in waiting:
                missing = ", ".join(sorted(self._needed(index, name) - waiting.keys()))
                raise CheckpointError(
                    f"{self.parts[index].name}.{missing} is not in the checkpoint; expected U and Vh of every module "
                    "in ranks, and order of those in pivoted. Save or copy the checkpoint again."
                )
        split = {"U": self._split_U, "Vh": self._split_Vh, "weight": self._split_weight}
        for name, parts in split.items():
            for part, tensor in zip(self.parts, parts(getattr(layer, name).data), strict=True):
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{part.name}.{name} is not in the checkpoint, or has NaN or infinite entries; expected finite "
                        "U and Vh of every module in ranks. Save or copy the checkpoint again."
                    )
        both = len(self.sizes) == 2 and all(size.rank for size in self.sizes) and not _serves_adapters()
        activation = fuse_gate_(layer) if both else None
        if current_platform.is_cuda_alike():
            # vLLM's own dummy runs have only the numbers of rows of its CUDA graphs and its largest batch.
            # A kernel with a bias is another one than without.
            model = functools.partial(self.apply, layer, bias=_passed_bias(layer))
            if activation is not None:
                model = functools.partial(self.gated, layer, activation=activation)
            warm_up(model, layer.Vh.new_zeros(1, layer.Vh.shape[1]))

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., sum of N_i)."""
        if not any(size.rank for size in self.sizes):
            return F.linear(x, layer.weight, bias)
        members = self._members(layer, bias)
        (first, *others) = members
        return lowrank_linear_merged(x, members) if others else lowrank_linear(x, *first)

    def gated(self, layer: LinearBase, x: Tensor, activation: str) -> Tensor:
        """``act(gate(x)) * up(x)`` by a linear of two low-rank parts of one width: (..., K) → (..., N)."""
        gate, up = self._members(layer, _passed_bias(layer))
        return lowrank_glu(x, gate, up, activation=activation)

    def _members(self, layer: LinearBase, bias: Tensor | None) -> list[Any]:
        """The factors of each low-rank part, and ``Dense`` of the others."""
        biases = [None] * len(self.parts) if bias is None else bias.split([size.rows for size in self.sizes])
        orders = [order if order.shape[0] else None for order in self._split_order(layer.order)]
        columns = self._split_U(layer.U), self._split_Vh(layer.Vh), self._split_weight(layer.weight), biases, orders
        return [
            Factors(U, None, Vh, b, order) if Vh.shape[0] else Dense(weight, b)
            for U, Vh, weight, b, order in zip(*columns, strict=True)
        ]


def _serves_adapters() -> bool:
    """Whether vLLM adds LoRA adapters, for which it wraps the linears of an MLP after their weights are loaded."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.lora_config is not None


def _passed_bias(layer: LinearBase) -> Tensor | None:
    """The bias that vLLM gives to ``apply`` in this process; it adds the bias of a row-parallel linear once."""
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if layer.skip_bias_add or elsewhere else layer.bias


def _missing(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN, so that a tensor that the checkpoint lacks is detected."""
    return torch.full(shape, torch.nan, dtype=dtype)


def register() -> None:
    """Add the format to vLLM's table of quantisation methods. Idempotent."""
    register_quantization_config(METHOD)(GraspVllmConfig)
