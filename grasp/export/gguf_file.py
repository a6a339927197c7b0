"""A dense Llama, Qwen2 or Qwen3 as a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.errors import MissingPackageError, UnsupportedModelError
from grasp.export.gguf_tokenizer import REMEDY, add_tokenizer
from grasp.files import require_space
from grasp.model.dequantize import dequantize_
from grasp.model.lowrank_linear import Pivotable
from grasp.model.narrowing import narrowed_mlps

_BLOCK = 32  # numbers that Q8_0 scales together
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # without blocks


class _Kind(NamedTuple):
    """What llama.cpp expects of a class of models."""

    name: str
    neighbouring: bool  # it rotates neighbouring features instead of halves
    rope_types: tuple[str, ...]  # frequencies that it takes: plain ones, or as factors of the plain ones
    biased: tuple[str, ...] = ()


_KINDS = {
    "LlamaForCausalLM": _Kind("llama", True, ("default", "linear", "llama3")),
    "Qwen2ForCausalLM": _Kind("qwen2", False, ("default",), ("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": _Kind("qwen3", False, ("default",)),
}


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write ``model.gguf`` in the dtype of a model, whose low-rank and quantised modules become dense in place.

    Returns:
        What becomes of the low-rank linears.

    Raises:
        UnsupportedModelError, MissingPackageError, CheckpointError: as ``write_gguf``.
    """
    narrowed = any(narrowed_mlps(model))
    count = sum(isinstance(module, Pivotable) for module in model.modules())
    dequantize_(model)
    write_gguf(model, folder / "model.gguf", None, tokenizer)
    if not count and not narrowed:
        return "No linear is low-rank: the file has the layers that the checkpoint has."
    padded = ", and channels that MLPs have lost are 0" if narrowed else ""
    return (
        f"{count} low-rank linears are dense in this file{padded}: llama.cpp has no low-rank tensor, and one width for "
        "all MLPs, so they save neither bytes nor time there. Removed layers and llama.cpp's own quantisation do."
    )


def objection(model: PreTrainedModel) -> str | None:
    """Why a dense model cannot be written; ``None`` if it can."""
    config, kind = model.config, _KINDS.get(type(model).__name__)
    if kind is None:
        return f"expected {', '.join(_KINDS)}, got {type(model).__name__}"
    names = (name.split(".") for name, _ in model.named_parameters())
    if biased := sorted({name[-2] for name in names if name[-1] == "bias"} - {*kind.biased}):
        return f"llama.cpp expects no biases in {', '.join(biased)} of this architecture"
    if (rope_type := _rope_type(config)) not in kind.rope_types:
        return f"expected rotary embeddings of the type {' or '.join(kind.rope_types)}, got {rope_type!r}"
    if config.hidden_act != "silu":
        return f"expected the activation silu, got {config.hidden_act!r}"
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        return "some layers have a sliding window"
    if model.dtype not in _TYPES:
        return f"expected weights in fp32, fp16 or bf16, got {model.dtype}"
    return None


def write_gguf(
    model: PreTrainedModel, path: Path, weight_type: str | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a dense model. Norms and biases are F32, and matrices whose rows the type cannot divide are F16.

    The rows of a Llama's q and k are in llama.cpp's order, which rotates neighbouring features instead of halves.

    Args:
        model: a Llama, Qwen2 or Qwen3 with full attention.
        path: the new file.
        weight_type: ``F32``, ``F16``, ``BF16`` or ``Q8_0``; ``None`` for the dtype of the model.
        tokenizer: written into the file; ``None`` for callers that give tokens.

    Raises:
        UnsupportedModelError: for any other model, and as ``add_tokenizer``.
        MissingPackageError: if ``gguf`` is not installed.
        CheckpointError: as ``require_space``.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("writing a GGUF file needs the package gguf; pip install gguf") from error
    if reason := objection(model):
        raise UnsupportedModelError(f"no GGUF file is written: {reason}. {REMEDY}")
    kind, config = _KINDS[type(model).__name__], model.config
    weight_type = weight_type or _TYPES[model.dtype]
    writer = gguf.GGUFWriter(path, kind.name)
    _add_sizes(writer, config)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if kind.neighbouring else {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.name.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied ones once
        weight = parameter.detach().float().cpu()
        if (count := heads.get(name.split(".")[-2])) is not None:
            weight = neighbouring(weight, count)
        ragged = weight_type not in _TYPES.values() and weight.shape[-1] % _BLOCK
        quantization = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else "F16" if ragged else weight_type]
        data = gguf.quants.quantize(weight.numpy(), quantization)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), data, raw_dtype=quantization)
    if _rope_type(config) != "default":
        writer.add_tensor("rope_freqs.weight", _rope_factors(model).numpy())
    require_space(path, sum(tensor.nbytes for tensor in writer.tensors[0].values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    assert writer.fout is not None
    written = writer.fout[0].tell()
    writer.close()
    if (size := path.stat().st_size) != written:  # NumPy does not tell that the last bytes failed
        raise OSError(f"{path.name} has {size} of {written} bytes")


def _add_sizes(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope_type(config: Any) -> str:
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """The plain frequencies, divided by those of the model: (D / 2,) fp32."""
    frequencies = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float().cpu()
    exponents = torch.arange(len(frequencies)) / len(frequencies)
    return model.config.rope_parameters["rope_theta"] ** -exponents / frequencies


def neighbouring(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head, (heads * D, K), from halves to pairs: 0, D/2, 1, D/2 + 1, ...

    Example:
        >>> import torch
        >>> neighbouring(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
