"""LoRA of the ``peft`` library for low-rank linears."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge

from grasp.model.lowrank_linear import LowRankLinear

_INITIALISATIONS = (True, False, "gaussian")  # other initialisations need the dense weight of the base layer


def lowrank_targets(config: LoraConfig) -> LoraConfig:
    """Let the target modules of a LoRA configuration include low-rank linears beside dense ones.

    peft does not save this: call it again for a configuration that was read from a file. Only plain LoRA with random
    initialisation is supported.

    Args:
        config: changed in place.

    Returns:
        ``config``.

    Raises:
        ValueError: if the targets are "all-linear", which means only dense linears in peft.

    Example:
        >>> from torch import nn
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> from grasp import LowRankLinear
        >>> model = nn.ModuleDict({"up_proj": LowRankLinear(8, 16, 4)})
        >>> config = lowrank_targets(LoraConfig(r=2, target_modules=["up_proj"]))
        >>> type(inject_adapter_in_model(config, model)["up_proj"]).__name__
        'LowRankLora'
    """
    if config.target_modules == "all-linear":
        raise ValueError(
            "target_modules='all-linear' does not include low-rank linears; name the modules, for example "
            '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'
        )
    config._register_custom_module({LowRankLinear: LowRankLora})
    return config


class LowRankLora(Linear):
    """``y = U Vh x + bias + α/r·B A x``. Merging gives the low-rank linear ``U' = [U, α/r·B]``, ``Vh' = [Vh; A]``.

    A pivoted linear loses that form when adapters are merged.
    """

    base_layer: LowRankLinear

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Only plain LoRA: the other variants of peft, such as DoRA, need a dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; peft calls this.

        Raises:
            ValueError: if its initialisation needs the dense weight of the base layer, or it has a bias.
        """
        if config.init_lora_weights not in _INITIALISATIONS or config.lora_bias:
            raise ValueError(
                f"a low-rank linear supports plain LoRA, got init_lora_weights={config.init_lora_weights!r} and "
                f"lora_bias={config.lora_bias}; expected one of {_INITIALISATIONS} and no bias. Or call "
                "model.dequantize() first"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append adapters to the factors. The rank of the layer grows by their ranks.

        Args:
            safe_merge: check adapters for NaN and infinite entries.
            adapter_names: ``None`` for the active adapters.

        Raises:
            ValueError: if the rank exceeds the limit of the layer's shape, or ``safe_merge`` finds such an entry.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            layer = self.base_layer
            A, B = (self.get_parameter(f"{matrix}.{name}.weight") for matrix in ("lora_A", "lora_B"))
            rank, limit = layer.rank + self.r[name], min(layer.in_features, layer.out_features)
            if rank > limit:
                raise ValueError(
                    f"adapter {name} of rank {self.r[name]} and a linear of rank {layer.rank} give rank {rank}, "
                    f"above {limit}, the limit of the shape; do not merge it, or dequantize the model before adding it"
                )
            if safe_merge and not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise ValueError(f"adapter {name} has NaN or infinite entries; expected none. Train it again.")
            layer.factor_()
            left, right = (B * self.scaling[name]).to(layer.U.dtype), A.to(layer.Vh.dtype)
            layer.set_factors_(torch.cat([layer.U, left], dim=1), torch.cat([layer.Vh, right]))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Remove the adapters from the factors."""
        while self.merged_adapters:
            layer, rank = self.base_layer, self.base_layer.rank - self.r[self.merged_adapters.pop()]
            layer.set_factors_(layer.U[:, :rank].clone(), layer.Vh[:rank].clone())
