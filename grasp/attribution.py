"""How much each singular group matters to the loss: calibration statistics → importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from grasp_kernels import singular_value_grad
from grasp_kernels.routes import accumulate_weight_grad_, choose_route, contract_weight_grad

# Importance of a singular group from its singular value and ∂L/∂σ, both (groups,). METHOD: the sum over the calibration
# set keeps its sign; the absolute value is taken once, at the end.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda singular_values, grad: (singular_values * grad).abs(),
    "gradient": lambda singular_values, grad: grad.abs(),
}


def sum_nll(logits: Tensor, batch: CalibrationBatch) -> Tensor:
    """Summed negative log-likelihood of each token given those before it, in nats; padding counts nothing."""
    labels = batch.input_ids[:, 1:].masked_fill(~batch.is_target, -100).to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].to(dtype).flatten(0, 1), labels.flatten(), reduction="sum")


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


def singular_value_grads(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Mapping[Target, SVD],
    prefix: Prefix,
    *,
    progress: Progress = silent,
) -> dict[Target, Tensor]:
    """Gradient of the mean negative log-likelihood in each singular value of each target.

    The forward pass enters the targets' layer with what ``prefix`` kept; the backward pass stops at their outputs; no
    weight gets a gradient in the graph. ``∂L/∂σ_k = u_kᵀ G v_k`` is summed batch by batch, or taken once from the
    accumulated G, whichever costs less (``grasp_kernels.routes``).

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from.
        targets: linears of one layer, with their decompositions.
        prefix: see ``capture_prefix``.
        progress: called after each batch.

    Returns:
        For each target (groups,), in fp32 (fp64 for fp64); none for a target whose output does not reach the loss.

    Raises:
        NonFiniteError: if the loss or a gradient is NaN or infinite.
    """
    first = next(iter(targets))
    modules = decoder(model).layers
    tokens = sum(batch.input_ids.numel() for batch in batches)
    sums = {target: _sum_for(svd, tokens) for target, svd in targets.items()}
    with evaluating(model), passing_through(list(modules)[: first.layer], prefix.returns_tuple):
        for index, batch in enumerate(batches):
            with entering_with(modules[first.layer], prefix.hidden[first.layer][index]), _recording(targets) as record:
                loss = sum_nll(model(**batch_inputs(model, batch), use_cache=False).logits, batch)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of calibration batch {index} is {loss.item()}; expected a finite one. Load the model in "
                    "bfloat16 or float32, or drop that text."
                )
            grads = torch.autograd.grad(loss, [call.output for call in record], allow_unused=True)
            for call, grad_y in zip(record, grads, strict=True):
                if grad_y is not None:
                    sums[call.target].add(call.x.flatten(0, -2), grad_y.flatten(0, -2))
            progress(f"layer {first.layer} {first.block}", index + 1, len(batches))
    count = sum(batch.num_targets for batch in batches)
    result = {target: total.result() / count for target, total in sums.items() if total.calls}
    for target, grad in result.items():
        if not torch.isfinite(grad).all():
            raise NonFiniteError(
                f"the gradient in {target.name} is NaN or infinite; expected a finite one. "
                "Load the model in bfloat16 or float32."
            )
    return result


class _FactoredSum:
    """``Σ colsum((d U) ⊙ (x Vhᵀ))``, batch by batch."""

    def __init__(self, svd: SVD) -> None:
        self._svd = svd
        self._sum = torch.zeros_like(svd.S)
        self.calls = 0

    def add(self, x: Tensor, grad_y: Tensor) -> None:
        self.calls += 1
        U, S, Vh = self._svd
        self._sum += singular_value_grad(x.to(S.dtype), grad_y.to(S.dtype), U, Vh).first

    def result(self) -> Tensor:
        return self._sum


class _DenseSum:
    """``diag(Uᵀ (Σ dᵀ x) Vhᵀ)``: the weight's gradient, contracted once."""

    def __init__(self, svd: SVD) -> None:
        self._svd = svd
        self._weight_grad = svd.S.new_zeros(svd.U.shape[0], svd.Vh.shape[1])
        self.calls = 0

    def add(self, x: Tensor, grad_y: Tensor) -> None:
        self.calls += 1
        dtype = self._weight_grad.dtype
        accumulate_weight_grad_(self._weight_grad, x.to(dtype), grad_y.to(dtype))

    def result(self) -> Tensor:
        return contract_weight_grad(self._weight_grad, self._svd.U, self._svd.Vh)


def _sum_for(svd: SVD, tokens: int) -> _FactoredSum | _DenseSum:
    """The cheaper of the two. G is as large as the weight it belongs to, of which there is a copy already."""
    n, k, r = svd.U.shape[0], svd.Vh.shape[1], svd.S.shape[0]
    route = choose_route(tokens, n, k, r, plain_sum=True, spare_bytes=4 * n * k, fused=True)
    return _DenseSum(svd) if route == "dense" else _FactoredSum(svd)


class _Call(NamedTuple):
    target: Target
    x: Tensor
    output: Tensor


@contextmanager
def _recording(targets: Iterable[Target]) -> Iterator[list[_Call]]:
    """Note what enters and leaves each target, call by call, and start the graph at the first of them."""
    record: list[_Call] = []

    def note(target: Target) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            record.append(_Call(target, args[0].detach(), output))
            return output

        return hook

    handles = [target.module.register_forward_hook(note(target)) for target in targets]
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
