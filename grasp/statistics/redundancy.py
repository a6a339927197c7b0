"""Block influence: how much each decoder layer changes the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError
from grasp.method.blocks import fp64_device, to_double
from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.hooks import hooked
from grasp.model.running import evaluating, hidden_input, hidden_output, run_backbone
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.processes import ALONE, Processes


@torch.no_grad()
def block_influence(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    *,
    span: int = 1,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> list[float]:
    """Block influence of each decoder layer: ``mean_t(1 − cos(h_in[t], h_out[t]))`` over the calibration tokens.

    The smaller the block influence, the more redundant the layer. The last layer is measured before the final norm.
    Padding is not counted. Source: arXiv 2501.00339 §3, after ShortGPT.

    Args:
        model: a decoder-only causal language model.
        batches: calibration token batches.
        span: so many consecutive layers are taken for one.
        progress: called after each batch.
        processes: the processes that share the batches. All are given all batches.

    Returns:
        One score per layer, or per block of ``span`` layers by its first, in [0, 2].

    Raises:
        NonFiniteError: if a hidden state is NaN or infinite.
        DistributedError: if another process fails.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
        >>> scores = block_influence(LlamaForCausalLM(config), [torch.arange(64)[None]])
        >>> len(scores), all(0 < score < 2 for score in scores)
        (2, True)
    """
    batches = as_batches(batches)
    local_batches = processes.local_batches(batches)
    indices = {layer: index for index, layer in enumerate(decoder(model).layers)}
    sums = torch.zeros(len(indices) - span + 1, dtype=torch.float64)
    inputs: dict[int, Tensor] = {}  # of the last ``span`` layers
    mask: Tensor | None = None

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs[indices[layer]] = hidden_input(args, kwargs)
        start = indices[layer] - span + 1
        if start < 0:
            return
        distances = cosine_distance(inputs.pop(start), hidden_output(output))
        distances = to_double(distances, fp64_device(distances.device))
        if mask is not None:
            distances = distances[mask.bool().to(distances.device)]
        sums[start] += distances.sum().cpu()

    with processes.fail_together(), evaluating(model), hooked(*indices, after=add):
        for done, batch in enumerate(local_batches, start=1):
            mask = batch.attention_mask
            run_backbone(model, batch)
            inputs.clear()
            progress("block influence", done, len(local_batches))
    processes.sum_([sums])
    if not torch.isfinite(sums).all():
        layers = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"the hidden states of layers {layers} are NaN or infinite. Load the model in bfloat16 or float32, or "
            "repair the checkpoint"
        )
    return (sums / sum(batch.num_tokens for batch in batches)).tolist()


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """``1 − cos`` between hidden states, token by token: (..., H) twice → (...), in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    return 1 - torch.nn.functional.cosine_similarity(before.to(after.device, dtype), after.to(dtype), dim=-1)
