"""LoRA of the ``peft`` library on top of low-rank linears, which it refuses unless it is told of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from grasp.model.lowrank_linear import LowRankLinear

_INITIALISATIONS = (True, False, "gaussian")  # the others decompose the base layer's dense weight


def lowrank_targets(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration name low-rank linears among its targets, dense ones as ever; changed in place.

    peft does not save this: an adapter's configuration that was read from a file needs it again. Plain LoRA alone, with
    random initialisation, is supported.

    Returns:
        ``config``.

    Raises:
        ValueError: if its targets are "all-linear", by which peft means the dense ones.
    """
    if config.target_modules == "all-linear":
        raise ValueError(
            "target_modules='all-linear' would leave the low-rank linears out; name them, as in "
            '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'
        )
    config._register_custom_module({LowRankLinear: LowRankLora})
    return config


class LowRankLora(Linear):
    """``y = U Vh x + bias + α/r·B A x``; merged, ``U' = [U, α/r·B]`` and ``Vh' = [Vh; A]``, a low-rank linear still."""

    base_layer: LowRankLinear

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA: the variants that peft has, DoRA among them, need a dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; peft calls this.

        Raises:
            ValueError: if it is to be made from the base layer's dense weight, or has a bias of its own.
        """
        if config.init_lora_weights not in _INITIALISATIONS or config.lora_bias:
            raise ValueError(
                f"a low-rank linear takes plain LoRA, got init_lora_weights={config.init_lora_weights!r} and "
                f"lora_bias={config.lora_bias}; expected {_INITIALISATIONS} and no bias. Or call model.dequantize() "
                "first"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append adapters to the factors: the rank grows by theirs, the layer stays low-rank.

        Args:
            safe_merge: refuse an adapter with NaN or infinite entries.
            adapter_names: ``None`` for the active ones.

        Raises:
            ValueError: if the rank would be above what a matrix of this shape can have; or as ``safe_merge`` says.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer = self.base_layer
            A, B = (self.get_parameter(f"{matrix}.{name}.weight") for matrix in ("lora_A", "lora_B"))
            rank, limit = layer.rank + self.r[name], min(layer.in_features, layer.out_features)
            if rank > limit:
                raise ValueError(
                    f"adapter {name} of rank {self.r[name]} would give a low-rank linear of rank {layer.rank} the rank "
                    f"{rank}, above the {limit} of its shape; keep it apart, or dequantize the model before adding it"
                )
            if safe_merge and not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise ValueError(f"adapter {name} has NaN or infinite entries; expected none. Train it again.")
            left, right = (B * self.scaling[name]).to(layer.U.dtype), A.to(layer.Vh.dtype)
            _set_factors(layer, torch.cat([layer.U, left], dim=1), torch.cat([layer.Vh, right]))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapters off the factors again."""
        while self.merged_adapters:
            layer, rank = self.base_layer, self.base_layer.rank - self.r[self.merged_adapters.pop()]
            _set_factors(layer, layer.U[:, :rank].clone(), layer.Vh[:rank].clone())


def _set_factors(layer: LowRankLinear, U: torch.Tensor, Vh: torch.Tensor) -> None:
    layer.U = nn.Parameter(U, requires_grad=layer.U.requires_grad)
    layer.Vh = nn.Parameter(Vh, requires_grad=layer.Vh.requires_grad)
    layer.rank = len(Vh)
