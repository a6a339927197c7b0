"""The table of model families: where decoder layers are, and the names of the modules in them."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Everything that the package needs to know about a family of models; the defaults are the usual names."""

    layers: str  # path of the decoder layers, from the model
    norms: tuple[str, ...]  # paths that the norm after the last layer may have, from the model
    # a linear belongs to the attention of its layer if its path in the layer contains one of these
    attention: tuple[str, ...] = ("attn", "attention")
    # sibling linears of the attention that take one input, the first to be called first
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    # sibling linears of a gated MLP that take one input, the first to be called first
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    # attributes of a layer's modules that hold the index of the layer
    index_names: tuple[str, ...] = ("layer_idx", "layer_id", "layer_number")
    # lists in the configuration that hold indices of layers
    index_lists: tuple[str, ...] = ("mlp_only_layers", "moe_layers")

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Names of sibling linears that take one input."""
        return self.qkv, self.gate_up

    def block(self, path: str) -> str:
        """The part of a layer that a linear belongs to, ``"attention"`` or ``"mlp"``; ``path`` starts in the layer."""
        return "attention" if any(name in path for name in self.attention) else "mlp"


# The first row whose paths exist describes a model. The families named are examples.
FAMILIES: list[Family] = [
    Family("model.layers", ("model.norm", "model.final_layernorm")),  # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OLMo
    Family("model.decoder.layers", ("model.decoder.final_layer_norm",)),  # OPT
    Family("model.language_model.layers", ("model.language_model.norm",)),  # the text part of image-text models
    Family("transformer.h", ("transformer.ln_f",)),  # GPT-2, GPT-J, BLOOM
    Family("transformer.blocks", ("transformer.norm_f",)),  # MPT
    Family("gpt_neox.layers", ("gpt_neox.final_layer_norm",)),  # GPT-NeoX, Pythia
]
_USUAL_NAMES = Family("", ())


def family_of(path: str) -> Family:
    """The family of a model in which a module or tensor has this path; a row of usual names if no row fits."""
    return next((family for family in FAMILIES if f".{family.layers}." in f".{path}."), _USUAL_NAMES)
