"""How little a decoder layer, its attention, its MLP or a run of layers changes the hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError
from grasp.method.distances import angular_distance, cosine_distance
from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.hooks import hooked
from grasp.model.running import backbone, batch_inputs, evaluating, hidden_input, hidden_output
from grasp.model.targets import decoder, layer_targets
from grasp.progress import Progress, no_progress
from grasp.statistics.processes import ALONE, Processes


class Redundancy(NamedTuple):
    """Distances over the calibration tokens; the smaller, the more redundant.

    Attributes:
        layers: block influence of each decoder layer, in [0, 2].
        attention: of its attention alone, from the layer's input to what enters the MLP's half; NaN if there is none.
        mlp: of its MLP alone, from there to the layer's output.
        runs: (L + 1) × (L + 1), ``runs[i][j]`` the angular distance of what enters layer i from what enters layer j,
            at the last token of each sequence, L standing for what leaves the last layer; in [0, 1].
    """

    layers: list[float]
    attention: list[float]
    mlp: list[float]
    runs: list[list[float]]


def block_influence(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> list[float]:
    """Block Influence of each decoder layer: ``mean_t(1 − cos(h_in[t], h_out[t]))`` over the calibration tokens.

    Source: arXiv 2501.00339 §3, after ShortGPT. Arguments and errors are those of ``measure_redundancy``.

    Returns:
        One score per layer, in [0, 2]; the smaller, the more redundant.
    """
    return measure_redundancy(model, batches, progress=progress, processes=processes).layers


@torch.no_grad()
def measure_redundancy(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch | Tensor],
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> Redundancy:
    """All redundancy scores, from one forward pass over the calibration tokens.

    The hidden states are those that the layer itself takes and returns, so that the last layer is measured before the
    final norm. Padding counts nothing.

    Args:
        model: a decoder-only causal language model.
        batches: token batches.
        progress: called after each batch.
        processes: those that share the batches, all of which are given all of them.

    Raises:
        NonFiniteError: if a hidden state is NaN or infinite.
        DistributedError: if another process fails.
    """
    batches = as_batches(batches)
    own = processes.local_batches(batches)
    sums = _Sums(len(decoder(model).layers))
    with ExitStack() as stack:
        for index, layer in enumerate(decoder(model).layers):
            stack.enter_context(_watched(layer, _attention_of(model, index), partial(sums.add, index)))
        with processes.fail_together(), evaluating(model):
            for done, batch in enumerate(own, start=1):
                sums.mask = batch.attention_mask
                backbone(model)(**batch_inputs(model, batch), use_cache=False)
                sums.end_batch()
                progress("block influence", done, len(own))
    processes.sum_([sums.distances, sums.runs])
    if not torch.isfinite(sums.distances[0]).all():
        bad = (~torch.isfinite(sums.distances[0])).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"the hidden states of layers {bad} are NaN or infinite; expected finite ones. "
            "Load the model in bfloat16 or float32, or repair the checkpoint."
        )
    layers, attention, mlp = (sums.distances / sum(batch.num_tokens for batch in batches)).tolist()
    runs = (sums.runs / sum(len(batch.input_ids) for batch in batches)).tolist()
    return Redundancy(layers, attention, mlp, runs)


class _Sums:
    """Distances summed over tokens, (layer, attention, MLP) by layers, and between all layers over sequences."""

    def __init__(self, depth: int) -> None:
        self.distances = torch.zeros(3, depth, dtype=torch.float64)
        self.runs = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
        self.mask: Tensor | None = None
        self._last: list[Tensor] = []  # of this batch: what enters each layer so far at the last token, (B, H)

    def add(self, layer: int, before: Tensor, middle: Tensor | None, after: Tensor) -> None:
        """Count what entered one layer, its MLP's half, and what left it, (B, L, H) each."""
        pairs = ((before, after), (before, middle), (middle, after))
        for row, (start, end) in enumerate(pairs):
            if start is None or end is None:
                self.distances[row, layer] = math.nan
                continue
            distance = cosine_distance(start, end).double()
            if self.mask is not None:
                distance = distance[self.mask.bool().to(distance.device)]
            self.distances[row, layer] += distance.sum().cpu()
        self._last += [self._last_token(before)] * (layer == 0) + [self._last_token(after)]

    def _last_token(self, hidden: Tensor) -> Tensor:
        if self.mask is None:
            return hidden[:, -1].cpu()
        places = torch.arange(self.mask.shape[1])
        last = (self.mask.cpu().bool() * places).argmax(-1)
        return hidden.cpu()[torch.arange(len(last)), last]

    def end_batch(self) -> None:
        """Count the batch's last tokens."""
        states = torch.stack(self._last)  # (L + 1, B, H)
        self.runs += angular_distance(states[:, None], states[None]).double().sum(-1)
        self._last.clear()


def _attention_of(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The child of a decoder layer that is its attention: the one that holds the linears of that block."""
    path = f"{decoder(model).path}.{layer}."
    names = [t.name for t in layer_targets(model, layer)[0] if t.block == "attention"]
    return None if not names else model.get_submodule(path + names[0].removeprefix(path).split(".")[0])


@contextmanager
def _watched(
    layer: nn.Module, attention: nn.Module | None, tell: Callable[[Tensor, Tensor | None, Tensor], None]
) -> Iterator[None]:
    """Call ``tell`` with what enters a decoder layer, what its attention makes of that, and what leaves the layer.

    The second is what enters the first child called after the attention that is given something else than its output.
    Where that is the attention's or the layer's own input, attention and MLP are computed side by side: then it is the
    layer's input plus the attention's output.
    """
    seen: dict[str, Tensor] = {}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen["before"] = hidden_input(args, kwargs)

    def attended(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["asked"], seen["attended"] = _first_tensor(args, kwargs), hidden_output(output)

    def next_child(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _first_tensor(args, kwargs)
        if "attended" not in seen or "middle" in seen or given is seen["attended"]:
            return
        side_by_side = given is seen["before"] or given is seen["asked"]
        seen["middle"] = seen["before"] + seen["attended"] if side_by_side else given.view_as(seen["before"])

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tell(seen["before"], seen.get("middle"), hidden_output(output))
        seen.clear()

    attentions = [] if attention is None else [attention]
    others = [child for child in layer.children() if child is not attention]
    with (
        hooked(layer, before=enter, after=leave),
        hooked(*attentions, after=attended),
        hooked(*others, before=next_child),
    ):
        yield


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
