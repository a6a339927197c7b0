"""One decoder layer, run alone on stored hidden states: the inputs of its linears before and after they change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from grasp.method.least_squares import Moments
from grasp.statistics.hidden_states import HiddenStates
from grasp.statistics.sweep import Prefix, alone, recording, run_layers
from grasp_kernels.products import accumulate_gram_, add_product_, exact_bf16, mirror_, widen


class OneLayer:
    """One decoder layer, run alone on stored hidden states.

    Args:
        prefix: its model and batches.
        layer: index of the layer.
    """

    def __init__(self, prefix: Prefix, layer: int) -> None:
        self._prefix, self._layers = prefix, range(layer, layer + 1)

    def inputs_and_outputs(
        self, hidden: Sequence[Tensor], linears: Collection[nn.Module]
    ) -> tuple[dict[nn.Module, HiddenStates], HiddenStates]:
        """For every batch the inputs of the linears, without padding and of all calls, and the outputs of the layer."""
        outputs, inputs = HiddenStates(self._prefix.scratch), dict[nn.Module, HiddenStates]()
        with alone(self._prefix, self._layers):
            for index, batch in enumerate(self._prefix.batches):
                with recording(batch, linears) as recorded:
                    outputs.append(run_layers(self._prefix, self._layers, index, hidden[index]))
                shared: dict[tuple[int, ...], HiddenStates] = {}  # what is kept of an input, by its parts
                for linear, parts in recorded.items():
                    key = tuple(map(id, parts))
                    if linear not in inputs:
                        inputs[linear] = shared.get(key) or HiddenStates(self._prefix.scratch)
                    if key not in shared:
                        shared[key] = inputs[linear]
                        inputs[linear].append(_joined(parts))
        return inputs, outputs

    def groups(self, linears: Collection[nn.Module], hidden: Tensor) -> list[tuple[list[nn.Module], int]]:
        """The linears that share an input, with the number of their calls, in order; without those that are not called.

        Args:
            linears: of the layer.
            hidden: of the first batch.
        """
        if not linears:
            return []
        with alone(self._prefix, self._layers), recording(self._prefix.batches[0], linears) as inputs:
            run_layers(self._prefix, self._layers, 0, hidden)
        groups: dict[tuple[int, ...], list[nn.Module]] = {}
        for linear, parts in inputs.items():
            groups.setdefault(tuple(map(id, parts)), []).append(linear)
        return [(members, len(key)) for key, members in groups.items()]

    def add_covariances_(
        self,
        sums: Moments,
        linear: nn.Module,
        calls: int,
        before: Sequence[Tensor],
        hidden: Sequence[Tensor],
        visit: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        """Add ``Σ x x̂ᵀ`` and ``Σ x̂ x̂ᵀ`` of the inputs of a linear.

        A linear that sees only some of the tokens, as routed experts do, may see others now: x̂ takes the place of x.

        Args:
            sums: fp32 or fp64.
            linear: of the layer as it is.
            calls: of it in a pass.
            before: x, from ``inputs_and_outputs`` before the layer changed.
            hidden: for each batch the hidden states that enter the layer now, (B, L, H).
            visit: called as ``visit(batch, x, x̂)`` with the index of a batch and its tokens, (T, K) of all calls; not
                where x̂ takes the place of x.
        """
        (cross, gram, _), batches = sums, self._prefix.batches
        with alone(self._prefix, self._layers):
            for index, batch in enumerate(batches):
                with recording(batch, [linear], calls) as inputs:
                    run_layers(self._prefix, self._layers, index, hidden[index])
                if not inputs[linear]:
                    continue
                seen = _joined(inputs[linear]).to(gram.device)
                x = before[index].to(gram.device) if len(before) == len(batches) else seen
                is_known = len(before) == len(batches) and len(x) == len(seen) == calls * batch.num_tokens
                x = x if is_known else seen
                accumulate_gram_(gram, seen)
                with exact_bf16(x, seen):
                    add_product_(cross, widen(x, cross.dtype).mT, widen(seen, cross.dtype))
                if visit is not None and is_known:
                    visit(index, x, seen)
        mirror_(gram)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
