"""A process of ``tests/model/test_tensor_parallel.py``: load a checkpoint split, compute, save it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refused(checkpoint: Path, style: str) -> str:
    """Why an architecture whose plan has another style for a low-rank layer is not split."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.base_model_tp_plan = {**config.base_model_tp_plan, "layers.*.self_attn.q_proj": style}
    AutoModelForCausalLM.from_pretrained(checkpoint, config=config)  # on one device
    try:
        AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, distributed_config=DistributedConfig(tp_plan="auto")
        )
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{style} was accepted")


def main(checkpoint: Path, output: Path, plan: Any) -> None:
    """``output`` gets logits and gradients, the shapes of this process's parts, and the checkpoint saved again."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(tp_plan=plan))
    tokens = torch.arange(3, 27).reshape(2, 12)
    model.train().eval()
    with torch.no_grad():
        results = {"logits": model(tokens).logits}
    for _ in range(2):  # the second adds to the gradients of the first
        model(tokens, labels=tokens).loss.backward()
    results |= {f"grad {name}": whole(parameter.grad) for name, parameter in model.named_parameters()}
    try:
        model.dequantize()
    except ValueError as error:
        refusal = str(error)
    shapes = {name: list((p.to_local() if isinstance(p, DTensor) else p).shape) for name, p in model.named_parameters()}
    refusals = {style: refused(checkpoint, style) for style in ("packed_colwise", "packed_rowwise", "unit_colwise")}
    rank = dist.get_rank()
    output.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, output / f"{rank}.safetensors")
    (output / f"{rank}.json").write_text(json.dumps({"shapes": shapes, "dequantize": refusal, "refusals": refusals}))
    model.save_pretrained(output / "again")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
