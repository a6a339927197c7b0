"""The ``quantization_config`` of a compressed checkpoint for a serving stack, without what one stack needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grasp.errors import UnsupportedModelError
from grasp.method.ranks import Shape
from grasp.method.storage import FP8, Storage
from grasp.model.checkpoint_format import METHOD, storages
from grasp.model.hf_quantizer import GraspQuantizationConfig

_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}  # kinds of models → linears whose weight alone a stack transposes


class CheckpointConfig:
    """A configuration in the sense of vLLM and SGLang, whose subclasses choose the method of each module.

    Args:
        ranks: of its low-rank linears.
        pivoted: the pivoted ones of them.
        quantized: the storage of its quantised linears and embeddings.
        shapes: (N, K) of linears in narrowed MLPs.
    """

    stack = ""  # the name of the serving stack, for messages
    reordered: Mapping[str, Sequence[str]] = {}  # kinds of models → linears whose tensors the stack reorders

    def __init__(
        self,
        ranks: dict[str, int],
        pivoted: Sequence[str] = (),
        quantized: Mapping[str, Storage] | None = None,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        super().__init__()
        self.ranks, self.pivoted, self.quantized = ranks, list(pivoted), dict(quantized or {})
        self.shapes = dict(shapes or {})

    def rename(self, mapper: Any) -> None:
        """Rename the modules with the serving stack's mapper of names."""
        self.ranks, self.quantized = mapper.apply_dict(self.ranks), mapper.apply_dict(self.quantized)
        self.shapes = mapper.apply_dict(self.shapes)
        self.pivoted = mapper.apply_list(self.pivoted)

    def get_name(self) -> str:
        """The name in ``config.json``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the ops support; the stack refuses others."""
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
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Read the ``quantization_config`` of a ``config.json``.

        Raises:
            CheckpointError: as ``check_format``.
        """
        read = GraspQuantizationConfig.from_dict(dict(config))
        return cls(dict(read.ranks), read.pivoted, storages(read.quantized), read.shapes)

    def compresses(self, name: str) -> bool:
        """Whether the checkpoint has factors or quantised values of a module, or narrows it."""
        return name in self.ranks or name in self.quantized or name in self.shapes

    def embedding_storage(self, name: str) -> Storage | None:
        """The storage of a module without factors whose values are integers, as those of embeddings are."""
        storage = None if name in self.ranks else self.quantized.get(name)
        return None if storage == FP8 else storage

    def refuse(self, layer: nn.Module, prefix: str) -> None:
        """Refuse a module, or experts in it, that the checkpoint compresses and the stack has no method for.

        Raises:
            UnsupportedModelError: if it does.
        """
        fields: dict[str, Mapping[str, object]] = {
            "a rank": self.ranks,
            "a storage": self.quantized,
            "a shape": self.shapes,
        }
        for field, modules in fields.items():
            for name in modules:
                expert = name.removeprefix(f"{prefix}.")
                if name == prefix or (expert != name and expert[:1].isdigit()):
                    raise UnsupportedModelError(
                        f"config.json has {field} for {name}, which {self.stack} serves with {type(layer).__name__}; "
                        "expected linear layers, and embeddings in int8 or int4. Compress without it, or serve this "
                        "model with transformers."
                    )

    def refuse_reordered(self, path: str, names: Sequence[str], kind: str) -> None:
        """Refuse a linear whose factors or scales the stack's loader of a model damages.

        Args:
            path: of the linear.
            names: of its linears in the checkpoint.
            kind: of the model, in ``config.json``.

        Raises:
            UnsupportedModelError: if it does.
        """
        transposed = () if any(name in self.ranks for name in names) else _TRANSPOSED.get(kind, ())
        if path.rpartition(".")[2] in (*self.reordered.get(kind, ()), *transposed):
            raise UnsupportedModelError(
                f"{self.stack} reorders {path} in models of type {kind}, which is right for a dense floating weight "
                "only; expected one. Compress without it, or serve this model with transformers."
            )
