"""How much each singular group matters to the loss: calibration statistics → importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.architecture import (
    Target,
    backbone,
    batch_inputs,
    decoder,
    entering_with,
    evaluating,
    hidden_input,
    passing_through,
)
from grasp.calibration import CalibrationBatch
from grasp.errors import NonFiniteError
from grasp.modules import SVD
from grasp.progress import Progress, silent

# Importance of a singular group from its singular value and ∂L/∂σ, both (groups,). METHOD: the sum over the calibration
# set keeps its sign; the absolute value is taken once, at the end.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda singular_values, grad: (singular_values * grad).abs(),
    "gradient": lambda singular_values, grad: grad.abs(),
}


def singular_value_grad_from_weight_grad(weight_grad: Tensor, svd: SVD) -> Tensor:
    """``∂L/∂σ_k = u_kᵀ G v_k``, that is ``diag(Uᵀ G Vhᵀ)``: G (N, K) → (groups,)."""
    return ((svd.U.mT @ weight_grad) * svd.Vh).sum(1)


def sum_nll(logits: Tensor, batch: CalibrationBatch) -> Tensor:
    """Summed negative log-likelihood of each token given those before it, in nats; masked tokens are no targets."""
    labels = batch.input_ids[:, 1:].to(logits.device)
    if batch.attention_mask is not None:
        labels = labels.masked_fill(~batch.attention_mask[:, 1:].to(logits.device), -100)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].to(dtype).flatten(0, 1), labels.flatten(), reduction="sum")


def target_tokens(batch: CalibrationBatch) -> int:
    """How many tokens of a batch ``sum_nll`` counts."""
    if batch.attention_mask is None:
        return batch.input_ids[:, 1:].numel()
    return int(batch.attention_mask[:, 1:].sum())


@dataclass(frozen=True)
class Prefix:
    """What the untouched layers below each redundant layer produce: computed once, since GRASP goes deepest first."""

    hidden: dict[int, list[Tensor]]  # layer → for each batch what enters it, (B, L, H)
    returns_tuple: bool  # what this family's decoder layers return


@torch.no_grad()
def capture_prefix(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    layers: Sequence[int],
    *,
    progress: Progress = silent,
) -> Prefix:
    """Keep, for each of ``layers``, the hidden states that enter it, in the model's dtype and in CPU memory."""
    if not layers:
        return Prefix({}, returns_tuple=False)
    modules = decoder(model).layers
    prefix = Prefix({layer: [] for layer in layers}, _returns_tuple(model, batches[0]))

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prefix.hidden[layer].append(hidden_input(args, kwargs).detach().to("cpu", copy=True))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            handle = modules[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(passing_through(list(modules)[max(layers) :], prefix.returns_tuple))
        for done, batch in enumerate(batches, start=1):
            backbone(model)(**batch_inputs(model, batch), use_cache=False)
            progress("prefix", done, len(batches))
    return prefix


def weight_grads(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Sequence[Target],
    prefix: Prefix,
    *,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Gradient of the mean negative log-likelihood in the dense weight of each target, (N, K) in fp32 (fp64 for fp64).

    All targets lie in one layer. The forward pass enters that layer with what ``prefix`` kept; the backward pass stops
    at the targets' outputs; no other weight gets a gradient.

    Raises:
        NonFiniteError: if the loss or a gradient is NaN or infinite.
    """
    layer = targets[0].layer
    modules = decoder(model).layers
    grads: dict[str, Tensor] = {}
    tokens = sum(target_tokens(batch) for batch in batches)
    step = f"layer {layer} {targets[0].block}"
    with evaluating(model), passing_through(list(modules)[:layer], prefix.returns_tuple):
        for index, batch in enumerate(batches):
            with entering_with(modules[layer], prefix.hidden[layer][index]), _recording(targets) as record:
                loss = sum_nll(model(**batch_inputs(model, batch), use_cache=False).logits, batch)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of calibration batch {index} is {loss.item()}; expected a finite one. Load the model in "
                    "bfloat16 or float32, or drop that text."
                )
            outputs = [record[target.name].output for target in targets]
            for target, grad_y in zip(targets, torch.autograd.grad(loss, outputs), strict=True):
                _accumulate(grads, target.name, record[target.name].x, grad_y)
            progress(step, index + 1, len(batches))
    for name, grad in grads.items():
        if not torch.isfinite(grad).all():
            raise NonFiniteError(
                f"the gradient in {name} is NaN or infinite; expected a finite one. "
                "Load the model in bfloat16 or float32."
            )
        grad /= tokens
    return grads


def _accumulate(grads: dict[str, Tensor], name: str, x: Tensor, grad_y: Tensor) -> None:
    """``G += dᵀ x`` over all tokens of a batch, in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, grad_y = x.flatten(0, -2).to(dtype), grad_y.flatten(0, -2).to(dtype)
    if name not in grads:
        grads[name] = torch.zeros(grad_y.shape[1], x.shape[1], dtype=dtype, device=x.device)
    grads[name].addmm_(grad_y.mT, x)


@dataclass
class _Record:
    x: Tensor
    output: Tensor


@contextmanager
def _recording(targets: Sequence[Target]) -> Iterator[dict[str, _Record]]:
    """Note what enters and leaves each target, and start the graph at the first of them."""
    record: dict[str, _Record] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            record[name] = _Record(args[0].detach(), output)
            return output

        return hook

    handles = [target.module.register_forward_hook(note(target.name)) for target in targets]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _returns_tuple(model: PreTrainedModel, batch: CalibrationBatch) -> bool:
    """Whether decoder layers of this family return a tuple: asked of the first one, with two tokens."""
    layer = decoder(model).layers[0]
    answers: list[bool] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        answers.append(isinstance(output, tuple))

    handle = layer.register_forward_hook(note)
    probe = CalibrationBatch(batch.input_ids[:1, :2], None)
    try:
        with evaluating(model):
            backbone(model)(**batch_inputs(model, probe), use_cache=False)
    finally:
        handle.remove()
    return answers[0]
