"""Tiny random models of every family that the tests cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 97

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GQA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

# family → (configuration class, model class, configuration)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA),  # biases on q, k, v
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GQA, "head_dim": 8}),
    "gemma3": (  # tied embeddings; the first two layers have sliding windows
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_GQA,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 128,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_COMMON, **_NO_DROPOUT, "intermediate_size": 48, "max_position_embeddings": 128},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_COMMON, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GQA, "pad_token_id": 0}),  # fused qkv and gate_up
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GQA, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
IMAGE_TEXT = "gemma3_image_text"  # as Gemma-3 from 4B up; its tensors have other names in files than in the model
_BUILT = {
    **FAMILIES,
    IMAGE_TEXT: (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**FAMILIES["gemma3"][2], "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {**_COMMON, "num_hidden_layers": 1, "intermediate_size": 48, "image_size": 28},
            "mm_tokens_per_image": 1,
        },
    ),
}
DENSE_FAMILIES = [family for family in FAMILIES if family != "mixtral"]


class ExactRMSNorm(nn.Module):
    """An RMS norm in the dtype of its input; the one of transformers computes in fp32, which hides errors of 1e-7."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        self.eps = getattr(norm, "eps", None) or norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + self.weight)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode, with weights large enough that every layer matters to the loss."""
    config_class, model_class, values = _BUILT[family]
    tied = family.startswith("gemma3")
    values = {**values, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, **overrides}
    torch.manual_seed(seed)
    build: Callable[..., PreTrainedModel] = getattr(transformers, model_class)
    model = build(getattr(transformers, config_class)(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ExactRMSNorm(module))
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped matrix product does not support fp64
    return model.to(dtype).eval()


def tiny_batches(count: int = 2, batch_size: int = 2, length: int = 12, *, seed: int = 1) -> list[Tensor]:
    """Random token batches, (batch_size, length) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (batch_size, length), generator=generator) for _ in range(count)]
