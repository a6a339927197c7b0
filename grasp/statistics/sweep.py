"""A sweep: a forward and a backward pass over the calibration tokens, with the inputs and gradients of linears."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import hooked
from grasp.model.offload import fetching_again
from grasp.model.running import (
    backbone,
    batch_inputs,
    casting,
    entering_with,
    evaluating,
    hidden_input,
    passing_through,
    returns_tuple,
)
from grasp.model.targets import Target, decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.loss import loss_and_grad, without_head


def sweep_name(targets: Collection[Target]) -> str:
    """``"layer 3 mlp"`` or ``"12 layers"``: the layers of a sweep, and its block if there is only one."""
    layers, blocks = sorted({target.layer for target in targets}), sorted({target.block for target in targets})
    name = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    return f"{name} {blocks[0]}" if len(blocks) == 1 else name


class Call(NamedTuple):
    """One call of a target, with the tokens of a batch concatenated and without padding.

    Linears with the same input share ``x``.
    """

    target: Target
    x: Tensor  # (T, K)
    grad_y: Tensor  # (T, N), of the summed negative log-likelihood


@dataclass(frozen=True)
class Prefix:
    """The start of a sweep: the hidden states that enter some layers, computed once by the untouched layers below.

    Attributes:
        model: the model; sweeps run it in its present state.
        batches: the calibration batches.
        dtype: ``"bfloat16"`` if the model runs in it, ``None`` for the dtype of the model.
        hidden: layer → for each batch the hidden states at its input, (B, L, H), in CPU memory.
        returns_tuple: whether the decoder layers of this family return a tuple.
    """

    model: PreTrainedModel
    batches: Sequence[CalibrationBatch]
    dtype: str | None
    hidden: dict[int, list[Tensor]]
    returns_tuple: bool


@torch.no_grad()
def capture_prefix(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    layers: Collection[int],
    *,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> Prefix:
    """Compute the hidden states at the input of each of ``layers``, for sweeps that start there."""
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    if not layers or not batches:
        return Prefix(model, batches, dtype, hidden, returns_tuple=False)
    modules = decoder(model).layers
    prefix = Prefix(model, batches, dtype, hidden, returns_tuple(model, batches[0]))
    indices = {modules[layer]: layer for layer in layers}

    def store(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[indices[module]].append(hidden_input(args, kwargs).detach().to("cpu", copy=True))

    with (
        evaluating(model),
        casting(model, dtype),
        hooked(*indices, before=store),
        passing_through(list(modules)[max(layers) :], prefix.returns_tuple),
    ):
        for done, batch in enumerate(batches, start=1):
            backbone(model)(**batch_inputs(model, batch), use_cache=False)
            progress("prefix", done, len(batches))
    return prefix


def sweep(
    prefix: Prefix,
    targets: Collection[Target],
    visit: Callable[[Call], None],
    *,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Run a forward and a backward pass over every batch, and call ``visit`` for each call of each target.

    The forward pass starts at the lowest layer with a target, from the hidden states in ``prefix``. The backward pass
    stops at the first target. No weight gets a gradient. Logits are computed for a slice of the tokens at a time.
    ``visit`` is called in the order of the backward pass, and not for targets that do not affect the loss.

    Args:
        prefix: from ``capture_prefix``, with the lowest layer of the targets; its model is not changed.
        targets: linears of one or more layers.
        visit: called during the backward pass with detached tensors; it may modify them in place.
        start: number of batches to skip.
        after: called after each batch with the number of batches done.

    Raises:
        NonFiniteError: if the loss is NaN or infinite.
        UnsupportedModelError: if a batch has padding and a target does not process every token.
    """
    model = prefix.model
    modules = decoder(model).layers
    first = min(target.layer for target in targets)
    with (
        evaluating(model),
        casting(model, prefix.dtype),
        fetching_again(model),
        passing_through(list(modules)[:first], prefix.returns_tuple),
    ):
        for index, batch in enumerate(prefix.batches[start:], start):
            with (
                entering_with(modules[first], prefix.hidden[first][index]),
                without_head(model) as body,
                visiting(targets, batch, visit),
            ):
                model(**batch_inputs(model, batch), use_cache=False)
            loss, grad = loss_and_grad(model, body, batch)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of calibration batch {index} is {loss}; expected a finite number. Load the model in "
                    "bfloat16 or float32, or remove the text of this batch."
                )
            if body.hidden.requires_grad:
                torch.autograd.backward(body.hidden, grad)
            after(index + 1)


@contextmanager
def visiting(targets: Collection[Target], batch: CalibrationBatch, visit: Callable[[Call], None]) -> Iterator[None]:
    """Start the autograd graph at the first target, and call ``visit`` when the backward pass reaches a target."""
    rows = Rows(batch)
    by_module: dict[nn.Module, Target] = {target.module: target for target in targets}

    def register(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        target, x = by_module[module], rows.of_input(args[0])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda grad_y: visit(Call(target, x, rows.of(grad_y))))
        return output

    try:
        with hooked(*by_module, after=register):
            yield
    finally:
        rows.forget()


class Rows:
    """(B, L, features) → (T, features) without padding. An input that several linears share gives one tensor."""

    def __init__(self, batch: CalibrationBatch) -> None:
        mask = batch.attention_mask
        self._mask = None if mask is None or mask.all() else mask.bool().flatten()
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The concatenated tokens, without padding."""
        rows = tensor.detach().flatten(0, -2)
        if self._mask is None:
            return rows
        if len(rows) != len(self._mask):
            raise UnsupportedModelError(
                f"a linear processes {len(rows)} of the {len(self._mask)} tokens of a padded batch, so its padding is "
                "not known. Use sequences of one length without an attention_mask"
            )
        return rows[self._mask.to(rows.device)]

    def forget(self) -> None:
        """Release the inputs. Their graph refers to hooks that refer to this object: a reference cycle."""
        self._inputs.clear()

    def of_input(self, x: Tensor) -> Tensor:
        """The same tensor for the same input. The stored reference to the input keeps its ``id`` valid."""
        if id(x) not in self._inputs:
            self._inputs[id(x)] = (x, self.of(x))
        return self._inputs[id(x)][1]
