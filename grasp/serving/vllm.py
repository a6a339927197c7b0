"""vLLM's side of the checkpoint format: vLLM calls ``register`` through the entry point ``vllm.general_plugins``.

Only vLLM imports this module. The linears that ``config.json`` has ranks for become low-rank ones, and where vLLM
merges several, as it does q, k and v, one call of ``grasp::lowrank_linear_grouped`` computes those of them that are
low-rank. The op is opaque to ``torch.compile`` and never waits for the GPU, so that CUDA graphs can record it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from grasp.model.hf_quantizer import METHOD, GraspQuantizationConfig
from grasp.serving.shards import (
    WHOLE,
    Part,
    Piece,
    check_shape,
    linear_names,
    merged_parts,
    output_pieces,
    own_columns,
    own_rows,
    part_index,
)
from grasp_kernels import Factors, lowrank_linear, lowrank_linear_grouped
from grasp_kernels.packing import RANK_MULTIPLE


class GraspVllmConfig(QuantizationConfig):
    """The ``quantization_config`` of a compressed checkpoint, as vLLM wants it: which linears are low-rank."""

    def __init__(self, ranks: dict[str, int]) -> None:
        super().__init__()
        self.ranks = ranks

    def get_name(self) -> str:
        """The name in ``config.json``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the ops take; vLLM refuses other dtypes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Every GPU: where no kernel runs, plain PyTorch does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file beside ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraspVllmConfig:
        """Read it.

        Raises:
            CheckpointError: if it is of another version, or the ranks make no sense.
        """
        return cls(dict(GraspQuantizationConfig.from_dict(dict(config)).ranks))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the ranks as vLLM renames the modules of this architecture."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a module is loaded and run; called for linears, embeddings, attention and experts alike.

        Raises:
            UnsupportedModelError: if something else than a linear has a rank.
        """
        if isinstance(layer, LinearBase):
            names = linear_names(prefix, self.packed_modules_mapping)
            low_rank = any(name in self.ranks for name in names)
            return GraspLinearMethod(names, self.ranks) if low_rank else UnquantizedLinearMethod()
        for name in self.ranks:
            expert = name.removeprefix(f"{prefix}.")
            if name == prefix or (expert != name and expert[0].isdigit()):
                raise UnsupportedModelError(
                    f"config.json has a rank for {name}, which vLLM serves by {type(layer).__name__}; expected linear "
                    "layers only. Compress without it, or serve this model with transformers."
                )
        return None


class GraspLinearMethod(LinearMethodBase):
    """A linear of vLLM of which some or all parts are low-rank: ``y_i = (x @ Vh_i.mT) @ U_i.mT + bias_i``.

    The parameters of the linear, on one process:

    * ``Vh`` (sum of R_i, K), those of all low-rank parts one behind the other, so that x meets them in one product;
    * ``U``, a vector of all U_i (N_i, R_i);
    * ``weight`` (sum of N_i, K) of the dense parts, often empty; LoRA wants there to be one.

    Column-parallel, a process has its rows of U and weight, and all of Vh; row-parallel, its columns of Vh and weight,
    and all of U. On GPUs ranks are padded with zeros to a multiple of 16, as ``grasp_kernels.pack_factors`` does.
    """

    def __init__(self, names: Sequence[str], ranks: Mapping[str, int]) -> None:
        self.names, self.ranks = names, ranks
        self.parts: tuple[Part, ...] = ()
        self.columns = WHOLE
        self.sizes: tuple[tuple[int, int], ...] = ()  # of each part: rows, and rank in memory, 0 of a dense one

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
        """Give the linear its parameters; called once, by its constructor.

        Raises:
            UnsupportedModelError: if the linear merges its parts in a way that is not known.
        """
        pieces = (WHOLE,) * len(output_partition_sizes)
        if isinstance(layer, ColumnParallelLinear):
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            pieces = output_pieces(len(output_partition_sizes), layer.tp_rank, layer.tp_size, replicas)
        elif isinstance(layer, RowParallelLinear):
            self.columns = Piece(layer.tp_rank, layer.tp_size)
        self.parts = merged_parts(self.names, self.ranks, output_partition_sizes, pieces)
        multiple = RANK_MULTIPLE if current_platform.is_cuda_alike() else 1
        self.sizes = tuple((part.rows, -(-(part.rank or 0) // multiple) * multiple) for part in self.parts)
        K = input_size_per_partition
        # Some architectures reorder what they load, along the dimensions named here.
        self._register(layer, "U", (sum(n * r for n, r in self.sizes),), params_dtype, self._load_U, output_dim=0)
        self._register(layer, "Vh", (sum(r for _, r in self.sizes), K), params_dtype, self._load_Vh, input_dim=1)
        dense_rows = sum(n for n, r in self.sizes if not r)
        self._register(layer, "weight", (dense_rows, K), params_dtype, self._load_weight, input_dim=1, output_dim=0)

    def _register(
        self,
        layer: LinearBase,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        load: Callable[..., None],
        **dimensions: int,
    ) -> None:
        """Add a parameter; it is NaN until it is loaded, so that what the checkpoint lacks is noticed."""
        parameter = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load, **dimensions})
        layer.register_parameter(name, parameter)

    def _load_U(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:  # noqa: N802
        index, part, rank = self._low_rank_part(shard_id, "U")
        check_shape(f"{part.name}.U", loaded_weight, (part.checkpoint_rows, rank))
        U = self._split_U(param.data)[index]
        U[:, :rank].copy_(own_rows(loaded_weight, part))
        U[:, rank:].zero_()

    def _load_Vh(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:  # noqa: N802
        index, part, rank = self._low_rank_part(shard_id, "Vh")
        width = param.shape[1]
        check_shape(f"{part.name}.Vh", loaded_weight, (rank, width * self.columns.total))
        Vh = self._split_Vh(param.data)[index]
        Vh[:rank].copy_(own_columns(loaded_weight, width, self.columns))
        Vh[rank:].zero_()

    def _load_weight(self, param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:
        index = part_index(shard_id, self.parts)
        part, width = self.parts[index], param.shape[1]
        if part.rank is not None:
            raise CheckpointError(
                f"the checkpoint has a dense {part.name}.weight, but config.json the rank {part.rank} for it; the two "
                "do not belong together: save the model again"
            )
        check_shape(f"{part.name}.weight", loaded_weight, (part.checkpoint_rows, width * self.columns.total))
        own = own_columns(own_rows(loaded_weight, part), width, self.columns)
        self._split_weight(param.data)[index].copy_(own)

    def _low_rank_part(self, shard_id: object, tensor: str) -> tuple[int, Part, int]:
        index = part_index(shard_id, self.parts)
        part = self.parts[index]
        if part.rank is None:
            raise CheckpointError(
                f"the checkpoint has the factor {part.name}.{tensor}, but config.json has no rank for it; the two do "
                "not belong together: save the model again"
            )
        return index, part, part.rank

    def _split_U(self, U: Tensor) -> list[Tensor]:  # noqa: N802
        """Of each part (rows, rank in memory), empty of a dense one."""
        pieces = U.split([rows * rank for rows, rank in self.sizes])
        return [piece.view(size) for piece, size in zip(pieces, self.sizes, strict=True)]

    def _split_Vh(self, Vh: Tensor) -> Sequence[Tensor]:  # noqa: N802
        """Of each part (rank in memory, K), empty of a dense one."""
        return Vh.split([rank for _, rank in self.sizes])

    def _split_weight(self, weight: Tensor) -> Sequence[Tensor]:
        """Of each part (rows, K), empty of a low-rank one."""
        return weight.split([0 if rank else rows for rows, rank in self.sizes])

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that everything was in the checkpoint; nothing is changed, so that vLLM can load it again.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
        """
        split = {"U": self._split_U, "Vh": self._split_Vh, "weight": self._split_weight}
        for name, parts in split.items():
            for part, tensor in zip(self.parts, parts(getattr(layer, name).data), strict=True):
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{part.name}.{name} is not in the checkpoint, or has NaN or infinite entries; expected finite "
                        "U and Vh of every module in ranks. It was not saved or copied completely: save it again."
                    )

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., sum of N_i)."""
        biases = [None] * len(self.parts) if bias is None else bias.split([rows for rows, _ in self.sizes])
        columns = self._split_U(layer.U), self._split_Vh(layer.Vh), self._split_weight(layer.weight), biases
        parts = list(zip(*columns, strict=True))
        low_rank = [Factors(U, None, Vh, b) for U, Vh, _, b in parts if Vh.shape[0]]
        if len(parts) == 1:
            return lowrank_linear(x, *low_rank[0])
        outputs = iter(lowrank_linear_grouped(x, low_rank))
        return torch.cat(
            [next(outputs) if Vh.shape[0] else F.linear(x, weight, b) for _, Vh, weight, b in parts], dim=-1
        )


def register() -> None:
    """Enter the format into vLLM's table of quantisation methods. Idempotent."""
    register_quantization_config(METHOD)(GraspVllmConfig)
