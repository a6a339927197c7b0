"""What differs between model families: where their decoder layers are, which linears share an input."""

from __future__ import annotations

from typing import NamedTuple


class Adapter(NamedTuple):
    """Where a family keeps its decoder layers and its final norm: attribute paths from the model."""

    layers: str
    norm: str


# The first row whose two paths exist describes the model. The families named are examples.
ADAPTERS: tuple[Adapter, ...] = (
    Adapter("model.layers", "model.norm"),  # Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Phi-3, OLMo
    Adapter("model.layers", "model.final_layernorm"),  # Phi
    Adapter("model.decoder.layers", "model.decoder.final_layer_norm"),  # OPT
    Adapter("model.language_model.layers", "model.language_model.norm"),  # text part of image-text models
    Adapter("transformer.h", "transformer.ln_f"),  # GPT-2, GPT-J, BLOOM
    Adapter("transformer.blocks", "transformer.norm_f"),  # MPT
    Adapter("gpt_neox.layers", "gpt_neox.final_layer_norm"),  # GPT-NeoX, Pythia
)


# Names of sibling linears that families give one input, the first called first.
SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT
    ("gate_proj", "up_proj"),  # their gated MLPs
)
