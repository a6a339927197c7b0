"""The weights of a Llama as a GGUF file for llama.cpp, without a tokenizer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from grasp.errors import MissingPackageError, UnsupportedModelError

_BLOCK = 32  # numbers that Q8_0 and Q4_0 scale together


def write_gguf(model: PreTrainedModel, path: Path, weight_type: str) -> None:
    """Write the weights of a Llama. Norms are F32, and matrices whose rows Q8_0 cannot divide are F16.

    With Q4_0, embeddings and the output layer are Q8_0: llama.cpp's converter, too, gives them more bits.

    The rows of q and k are in llama.cpp's order, which rotates neighbouring features instead of halves.

    Args:
        model: without biases, and with plain rotary embeddings.
        path: the new file.
        weight_type: ``F16``, ``BF16``, ``Q8_0`` or ``Q4_0``.

    Raises:
        UnsupportedModelError: for any other model.
        MissingPackageError: if ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("writing a GGUF file needs the package gguf; pip install gguf") from error
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if type(model) is not LlamaForCausalLM or any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise UnsupportedModelError(
            f"GGUF files are written from Llama models without biases, got {type(model).__name__}; give a file that "
            "llama.cpp's converter made"
        )
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"GGUF files are written with plain rotary embeddings, got {rope['rope_type']!r}; give a file that "
            "llama.cpp's converter made"
        )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # callers give tokens
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied ones once
        weight = parameter.detach().float().cpu()
        if (count := heads.get(name.split(".")[-2])) is not None:
            weight = neighbouring(weight, count)
        matrix_type = "Q8_0" if weight_type == "Q4_0" and "layers." not in name else weight_type
        kind = "F32" if weight.ndim == 1 else "F16" if weight.shape[-1] % _BLOCK else matrix_type
        quantization = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(weight.numpy(), quantization)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbouring(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head, (heads * D, K), from halves to pairs: 0, D/2, 1, D/2 + 1, ...

    Example:
        >>> import torch
        >>> neighbouring(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
