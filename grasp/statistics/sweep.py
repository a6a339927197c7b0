"""A sweep: a forward and a backward pass over the calibration tokens, with the inputs and gradients of linears."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.environment import return_freed_memory
from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import hooked
from grasp.model.offload import fetching_again
from grasp.model.running import (
    casting,
    entering_with,
    evaluating,
    hidden_input,
    hidden_output,
    passing_through,
    run_backbone,
    tuple_length,
)
from grasp.model.targets import Target, decoder
from grasp.progress import Progress, no_progress
from grasp.statistics.hidden_states import HiddenStates, Scratch
from grasp.statistics.loss import Body, body_of, loss_alone, loss_and_grad


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
    """What crosses the borders between decoder layers; sweeps over some of the layers start from it."""

    model: PreTrainedModel  # the model; sweeps run it in its present state
    batches: Sequence[CalibrationBatch]
    dtype: str | None  # ``"bfloat16"`` if the model runs in it, ``None`` for the dtype of the model
    hidden: dict[int, HiddenStates]  # layer → for each batch the hidden states at its input, (B, L, H), on the CPU
    tuple_length: int  # how many values the decoder layers return; 0 if they return a tensor, no tuple
    scratch: Scratch  # where hidden states and gradients are kept
    # whether gradients are those of tokens drawn from the model's predictions, see ``loss_and_grad``
    samples_labels: bool = False
    # layer → for each batch the gradient of the summed loss in ``hidden``
    grads: dict[int, HiddenStates] = field(default_factory=dict)


@torch.no_grad()
def capture_prefix(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    layers: Collection[int],
    *,
    dtype: str | None = None,
    scratch: Scratch | None = None,
    samples_labels: bool = False,
    progress: Progress = no_progress,
) -> Prefix:
    """Compute the hidden states at the input of each of ``layers``, for sweeps that start there."""
    scratch = Scratch() if scratch is None else scratch
    hidden = {layer: HiddenStates(scratch) for layer in layers}
    if not layers or not batches:
        return Prefix(model, batches, dtype, hidden, tuple_length=0, scratch=scratch)
    modules = decoder(model).layers
    prefix = Prefix(model, batches, dtype, hidden, tuple_length(model, batches[0]), scratch, samples_labels)
    indices = {modules[layer]: layer for layer in layers}

    def store(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[indices[module]].append(hidden_input(args, kwargs))

    with alone(prefix, range(max(layers))), hooked(*indices, before=store):
        for done, batch in enumerate(batches, start=1):
            run_backbone(model, batch)
            progress("prefix", done, len(batches))
    return prefix


@contextmanager
def alone(prefix: Prefix, layers: Collection[int]) -> Iterator[None]:
    """Let the model compute only some of its decoder layers until the block ends; the others return their input."""
    model = prefix.model
    others = [module for index, module in enumerate(decoder(model).layers) if index not in layers]
    with (
        evaluating(model),
        casting(model, prefix.dtype, without=others),
        fetching_again(model),
        passing_through(others, prefix.tuple_length),
    ):
        yield


def run_layers(prefix: Prefix, layers: range, index: int, hidden: Tensor) -> Tensor:
    """The output of the last of some layers for the hidden states that enter the first; use it under ``alone``.

    Args:
        prefix: its model and batches.
        layers: contiguous, at least one.
        index: of the batch, for its mask and positions.
        hidden: (B, L, H).
    """
    outputs: list[Tensor] = []
    modules = decoder(prefix.model).layers

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outputs.append(hidden_output(output))
        rest = outputs[0].detach()  # what follows is not needed
        return (rest, *output[1:]) if isinstance(output, tuple) else rest

    with entering_with(modules[layers.start], hidden), hooked(modules[layers.stop - 1], after=keep):
        run_backbone(prefix.model, prefix.batches[index])
    return outputs[0]


class _Reached(Exception):  # noqa: N818 -- no error
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def recording(
    batch: CalibrationBatch, linears: Iterable[nn.Module], calls: float = math.inf
) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Record the inputs (T, features) of linears, of all calls and without padding, in the order of the first calls.

    Linears that share an input have the same tensor.

    Args:
        batch: the batch that the model runs on inside the block.
        linears: of any class.
        calls: the block ends after so many.
    """
    recorded, rows = defaultdict[nn.Module, list[Tensor]](list), Rows(batch)

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        recorded[module].append(rows.of_input(args[0]))
        if sum(map(len, recorded.values())) == calls:
            raise _Reached

    with hooked(*linears, before=record):
        try:
            yield recorded
        except _Reached as reached:
            reached.__traceback__ = None  # its frames may be kept, and with them the model, until garbage is collected


@torch.no_grad()
def propagate(
    prefix: Prefix, layers: range, hidden: Sequence[Tensor], *, without: Collection[int] = ()
) -> HiddenStates:
    """The hidden states of every batch after some layers, from those before them; ``without`` some of the layers."""
    result = HiddenStates(prefix.scratch)
    with alone(prefix, [layer for layer in layers if layer not in without]):
        for index in range(len(prefix.batches)):
            result.append(run_layers(prefix, layers, index, hidden[index]))
    return result


@torch.no_grad()
def sum_nll_after(prefix: Prefix, hidden: Sequence[Tensor]) -> float:
    """The summed negative log-likelihood of all batches, in nats, from the hidden states that leave the last layer.

    Args:
        prefix: its model and batches.
        hidden: for each batch the hidden states, (B, L, H).
    """
    total = 0.0
    with alone(prefix, ()):
        for index, batch in enumerate(prefix.batches):
            total += loss_alone(prefix.model, body_after(prefix, index, hidden[index]), batch)
    return total


def body_after(prefix: Prefix, index: int, hidden: Tensor, layer: int = 0) -> Body:
    """The output of the backbone for a batch whose hidden states, (B, L, H), enter a layer."""
    with entering_with(decoder(prefix.model).layers[layer], hidden):
        return body_of(prefix.model, prefix.batches[index])


def sweep(
    prefix: Prefix,
    targets: Collection[Target],
    visit: Callable[[Call], None],
    *,
    layers: range | None = None,
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Run a forward and a backward pass over every batch, and call ``visit`` for each call of each target.

    The forward pass starts from the hidden states in ``prefix``. If it ends before the last layer, the backward pass
    starts from the gradient in ``prefix``, otherwise from the loss. No weight gets a gradient. Logits are computed for
    a slice of the tokens at a time. ``visit`` is called in the order of the backward pass, and not for targets that do
    not affect the loss.

    Args:
        prefix: from ``capture_prefix``; its model is not changed.
        targets: linears of one or more layers.
        visit: called during the backward pass with detached tensors; it may modify them in place.
        layers: the layers to run; ``None``: from the lowest layer of the targets to the last layer. Unless ``prefix``
            has no hidden states of lower layers, the gradient at the input of the first layer is stored in it.
        start: number of batches to skip.
        after: called after each batch with the number of batches done.

    Raises:
        NonFiniteError: if the loss is NaN or infinite.
        UnsupportedModelError: if a batch has padding and a target does not process every token.
    """
    model, depth = prefix.model, len(decoder(prefix.model).layers)
    span = range(min(target.layer for target in targets), depth) if layers is None else layers
    keeps_grads, grads = span.start > min(prefix.hidden), HiddenStates(prefix.scratch)
    watched = {model.get_submodule(target.name): target for target in targets}  # or what stands in for the linear
    with alone(prefix, span):
        for index, batch in enumerate(prefix.batches[start:], start):
            hidden = prefix.hidden[span.start][index].detach().requires_grad_(keeps_grads)
            with visiting(watched, batch, visit):
                if span.stop < depth:
                    output = run_layers(prefix, span, index, hidden)
                    grad = prefix.grads[span.stop][index].to(output.device)
                else:
                    output, grad = _loss_gradient(prefix, span, index, hidden)
            if output.requires_grad:
                torch.autograd.backward(output, grad)
            if keeps_grads:
                grads.append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)
            del output, grad, hidden
            return_freed_memory()  # before the next batch
            after(index + 1)
    if keeps_grads:
        prefix.grads[span.start] = grads


def _loss_gradient(prefix: Prefix, layers: range, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the model's backbone for one batch, and the gradient of the summed loss in it."""
    body = body_after(prefix, index, hidden, layers.start)
    loss, grad = loss_and_grad(prefix.model, body, prefix.batches[index], samples_labels=prefix.samples_labels)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss of calibration batch {index} is {loss}; expected a finite number. Load the model in bfloat16 or "
            "float32, or remove the text of this batch."
        )
    return body.hidden, grad


@contextmanager
def visiting(
    targets: Mapping[nn.Module, Target], batch: CalibrationBatch, visit: Callable[[Call], None]
) -> Iterator[None]:
    """Start the autograd graph at the first target, and call ``visit`` when the backward pass reaches a target.

    Args:
        targets: by the module that is called: the linear, or what stands in for it.
        batch: its padding is left out.
        visit: called with detached tensors.
    """
    rows = Rows(batch)

    def register(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        target, x = targets[module], rows.of_input(args[0])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda grad_y: visit(Call(target, x, rows.of(grad_y))))
        return output

    try:
        with hooked(*targets, after=register):
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
