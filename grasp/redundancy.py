"""How little a decoder layer changes the hidden states: the redundancy scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.architecture import backbone, batch_inputs, decoder, evaluating, hidden_input, hidden_output
from grasp.calibration import CalibrationBatch, as_batches
from grasp.distributed import ALONE, Processes
from grasp.errors import NonFiniteError
from grasp.progress import Progress, silent


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """``1 − cos`` between hidden states, token by token: (..., H) twice → (...), in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    return 1 - torch.nn.functional.cosine_similarity(before.to(after.device, dtype), after.to(dtype), dim=-1)


@torch.no_grad()
def block_influence(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    *,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> list[float]:
    """Block Influence of each decoder layer: ``mean_t(1 − cos(h_in[t], h_out[t]))`` over the calibration tokens.

    The hidden states are those that the layer itself takes and returns, so that the last layer is measured before the
    final norm. Padding counts nothing. Source: arXiv 2501.00339 §3, after ShortGPT.

    Args:
        model: a decoder-only causal language model.
        batches: token batches.
        progress: called after each batch.
        processes: those that share the batches, all of which are given all of them.

    Returns:
        One score per layer, in [0, 2]; the smaller, the more redundant.

    Raises:
        NonFiniteError: if a hidden state is NaN or infinite.
        DistributedError: if another process fails.
    """
    batches = as_batches(batches)
    own = processes.share(batches)
    tokens = sum(batch.num_tokens for batch in batches)
    layers = decoder(model).layers
    totals = torch.zeros(len(layers), dtype=torch.float64)
    mask: Tensor | None = None

    def measure(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            distance = cosine_distance(hidden_input(args, kwargs), hidden_output(output)).double()
            if mask is not None:
                distance = distance[mask.bool().to(distance.device)]
            totals[index] += distance.sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with processes.together(), evaluating(model):
            for done, batch in enumerate(own, start=1):
                mask = batch.attention_mask
                backbone(model)(**batch_inputs(model, batch), use_cache=False)
                progress("block influence", done, len(own))
    finally:
        for handle in handles:
            handle.remove()
    processes.sum_([totals])
    if not torch.isfinite(totals).all():
        bad = (~torch.isfinite(totals)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"the hidden states of layers {bad} are NaN or infinite; expected finite ones. "
            "Load the model in bfloat16 or float32, or repair the checkpoint."
        )
    return (totals / tokens).tolist()
