"""One pass of the calibration tokens through part of a model: what enters each linear, what gradient comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    """What to call a sweep: its layer or layers, and its block where there is one."""
    layers, blocks = sorted({target.layer for target in targets}), sorted({target.block for target in targets})
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    return f"{where} {blocks[0]}" if len(blocks) == 1 else where


class Call(NamedTuple):
    """One call of a target, its tokens one after the other, padding left out. Linears given one input share ``x``."""

    target: Target
    x: Tensor  # (T, K)
    grad_y: Tensor  # (T, N), of the summed negative log-likelihood
    cu_seqlens: Tensor  # (B + 1,) int64, where each sequence starts among the tokens


@dataclass(frozen=True)
class Prefix:
    """What the untouched layers below each redundant layer produce: computed once, since GRASP goes deepest first."""

    hidden: dict[int, list[Tensor]]  # layer → for each batch what enters it, (B, L, H)
    returns_tuple: bool  # what this family's decoder layers return


@torch.no_grad()
def capture_prefix(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    layers: Collection[int],
    *,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> Prefix:
    """Keep, for each of ``layers``, the hidden states that enter it, in CPU memory; ``dtype`` is as in ``sweep``."""
    if not layers or not batches:
        return Prefix({layer: [] for layer in layers}, returns_tuple=False)
    modules = decoder(model).layers
    prefix = Prefix({layer: [] for layer in layers}, returns_tuple(model, batches[0]))

    indices = {modules[layer]: layer for layer in layers}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prefix.hidden[indices[module]].append(hidden_input(args, kwargs).detach().to("cpu", copy=True))

    with (
        evaluating(model),
        casting(model, dtype),
        hooked(*indices, before=keep),
        passing_through(list(modules)[max(layers) :], prefix.returns_tuple),
    ):
        for done, batch in enumerate(batches, start=1):
            backbone(model)(**batch_inputs(model, batch), use_cache=False)
            progress("prefix", done, len(batches))
    return prefix


def sweep(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Collection[Target],
    prefix: Prefix,
    visit: Callable[[Call], None],
    *,
    dtype: str | None = None,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Run every batch forward and backward, and show ``visit`` each call of each target.

    The forward pass enters the lowest target's layer with what ``prefix`` kept, the backward pass stops at the first
    target, no weight gets a gradient, and the logits are made some tokens at a time. Calls come in the order of the
    backward pass; those of a target whose output does not reach the loss do not come.

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from.
        targets: linears of one or more layers.
        prefix: see ``capture_prefix``; it must have the lowest of those layers.
        visit: called during the backward pass; what it does to the tensors it is given is its own affair.
        dtype: ``"bfloat16"`` to run the model in it, ``None`` as it is.
        start: how many batches to pass over.
        after: called after each batch with the number of batches done.

    Raises:
        NonFiniteError: if the loss is NaN or infinite.
        UnsupportedModelError: if there is padding and a target does not see every token.
    """
    modules = decoder(model).layers
    first = min(target.layer for target in targets)
    below = list(modules)[:first]
    with (
        evaluating(model),
        casting(model, dtype),
        fetching_again(model),
        passing_through(below, prefix.returns_tuple),
    ):
        for index, batch in enumerate(batches[start:], start):
            with (
                entering_with(modules[first], prefix.hidden[first][index]),
                without_head(model) as body,
                showing(targets, batch, visit),
            ):
                model(**batch_inputs(model, batch), use_cache=False)
            loss, grad = loss_and_grad(model, body, batch)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of calibration batch {index} is {loss}; expected a finite one. Load the model in "
                    "bfloat16 or float32, or drop that text."
                )
            if body.hidden.requires_grad:
                torch.autograd.backward(body.hidden, grad)
            after(index + 1)


@contextmanager
def showing(targets: Collection[Target], batch: CalibrationBatch, visit: Callable[[Call], None]) -> Iterator[None]:
    """Start the graph at the first target, and hand over each call when the backward pass reaches it."""
    rows = Rows(batch)

    by_module: dict[nn.Module, Target] = {target.module: target for target in targets}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        target, x = by_module[module], rows.of_input(args[0])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda grad_y: visit(Call(target, x, rows.of(grad_y), rows.cu_seqlens)))
        return output

    try:
        with hooked(*by_module, after=note):
            yield
    finally:
        rows.forget()


class Rows:
    """(B, L, features) → (T, features) without padding; an input that several linears take is made one tensor."""

    def __init__(self, batch: CalibrationBatch) -> None:
        mask = batch.attention_mask
        shape = batch.input_ids.shape
        counts = torch.full((shape[0],), shape[1]) if mask is None else mask.long().sum(1)
        self.cu_seqlens = F.pad(counts.cumsum(0), (1, 0))
        self._mask = None if mask is None or mask.all() else mask.bool().flatten()
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The tokens one after the other, without padding."""
        rows = tensor.detach().flatten(0, -2)
        if self._mask is None:
            return rows
        if len(rows) != len(self._mask):
            raise UnsupportedModelError(
                f"a linear sees {len(rows)} of the {len(self._mask)} tokens of a padded batch: padding cannot be "
                "told from text. Give sequences of one length, without attention_mask"
            )
        return rows[self._mask.to(rows.device)]

    def forget(self) -> None:
        """Let the inputs go: their graph leads to the hooks that hold this, a circle that nothing would free."""
        self._inputs.clear()

    def of_input(self, x: Tensor) -> Tensor:
        """The same tensor for the same input; the key stays valid because the input is kept with it."""
        known = self._inputs.get(id(x))
        if known is None:
            known = self._inputs[id(x)] = (x, self.of(x))
        return known[1]
