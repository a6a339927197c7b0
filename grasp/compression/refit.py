"""Least squares of the left factors on the dense outputs, given the inputs that the compressed model produces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.method.least_squares import least_squares
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.hooks import hooked, replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import execution_device
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.hidden_states import HiddenStates, Scratch
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Prefix, Rows, alone, capture_prefix, inputs_of, propagate, run_layers
from grasp_kernels.products import add_product_, exact_bf16, widen
from grasp_kernels.reference import accumulation_dtype


class Refit:
    """Fits U of low-rank linears to the outputs of the dense ones, layer by layer, in the order of the calls.

    Two streams of hidden states go through the layers: one with the dense linears, one with the low-rank linears fitted
    so far. So each linear compensates for the errors of the linears before it. A layer gets its low-rank linears when
    the streams reach it.

    Args:
        model: with the dense linears; changed in place.
        batches: calibration batches, of all processes.
        layers: where linears are fitted, contiguous.
        dtype: run both streams in this dtype, see ``casting``. Sums and solutions have the dtype of the model, at least
            fp32.
        scratch: where the streams are kept.
        processes: the processes whose sums are added up, and that divide the solutions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        layers: range,
        dtype: str | None,
        scratch: Scratch,
        processes: Processes = ALONE,
    ) -> None:
        self._model, self._layers, self._processes = model, layers, processes
        self._tokens = sum(batch.num_tokens for batch in batches)
        if layers:
            with processes.fail_together():
                self._prefix = capture_prefix(
                    *(model, processes.local_batches(batches), {layers.start}),
                    dtype=dtype,
                    scratch=scratch,
                )
            self._dense = self._low = self._prefix.hidden.pop(layers.start)

    @torch.no_grad()
    def replace_(
        self,
        layer: int,
        modules: Mapping[Target, LowRankLinear],
        *,
        is_fitted: bool = False,
        is_removed: bool = False,
    ) -> None:
        """Put low-rank linears in the place of the dense ones of the next layer, and fit them.

        Args:
            layer: its index.
            modules: the low-rank linears.
            is_fitted: whether they were fitted before.
            is_removed: whether the compressed model skips the layer; it has no ``modules`` then.
        """
        if layer not in self._layers:
            for target, module in modules.items():
                self._model.set_submodule(target.name, module)
            return
        run, unfitted = _OneLayer(self._prefix, layer), {} if is_fitted else modules
        with self._processes.fail_together():
            inputs, dense = run.inputs_and_outputs(self._dense, {target.module: target for target in unfitted})
            for target, module in modules.items():
                self._model.set_submodule(target.name, module)
            groups = run.groups({module: target for target, module in unfitted.items()}, self._low[0])
        for group in groups:
            self._fit_(run, group, unfitted, inputs[group[0]])
        self._dense = dense
        if not is_removed:
            with self._processes.fail_together():
                self._low = propagate(self._prefix, range(layer, layer + 1), self._low)

    def _fit_(
        self, run: _OneLayer, group: Sequence[Target], modules: Mapping[Target, LowRankLinear], inputs: HiddenStates
    ) -> None:
        """Fit the linears that share an input."""
        with self._processes.fail_together():
            cross, gram = run.covariances(group[0], modules[group[0]], inputs, self._low)
        owners = {self._processes.owner(index) for index in range(len(group))}
        self._processes.reduce_([(cross, owners), (gram, owners)])

        def solve(target: Target, weight: Tensor) -> _Left:
            module = modules[target]
            return _Left(least_squares(module.U, module.Vh, weight, cross, gram, self._tokens))

        for target, left in self._processes.map_divided(group, solve, _Left, fetch=lambda t: dense_weight(t.module)):
            modules[target].U.copy_(left.U)


def refit_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Iterable[Target],
    *,
    dtype: str | None = None,
    scratch: Scratch | None = None,
    processes: Processes = ALONE,
    progress: Progress = no_progress,
) -> None:
    """Fit U of the low-rank linears that are in a model, layer by layer, see ``Refit``.

    Args:
        model: with the low-rank linears in place; only their ``U`` changes.
        batches: calibration batches, of all processes.
        targets: the dense linears. A target that no low-rank linear replaces is skipped.
        dtype: see ``Refit``, as for ``scratch`` and ``processes``.
        scratch: where the streams are kept; by default in memory.
        processes: the processes that share the work.
        progress: called after each layer.
    """
    present = {target: model.get_submodule(target.name) for target in targets}
    low = {target: module for target, module in present.items() if isinstance(module, LowRankLinear)}
    if not low:
        return
    layers = range(min(target.layer for target in low), max(target.layer for target in low) + 1)
    with replaced(model, {target.name: target.module for target in low}):
        refit = Refit(model, batches, layers, dtype, Scratch() if scratch is None else scratch, processes)
        for layer in layers:
            refit.replace_(layer, {target: module for target, module in low.items() if target.layer == layer})
            progress("refit", layer - layers.start + 1, len(layers))


class _Left(NamedTuple):
    """The fitted factor of one linear, as processes exchange it."""

    U: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """The factor by its name."""
        return self._asdict()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> _Left:
        """The inverse of ``to_tensors``."""
        return cls(**tensors)


class _OneLayer:
    """One decoder layer, run alone on stored hidden states."""

    def __init__(self, prefix: Prefix, layer: int) -> None:
        self._prefix, self._layers = prefix, range(layer, layer + 1)

    def inputs_and_outputs(
        self, hidden: Sequence[Tensor], modules: Mapping[nn.Module, Target]
    ) -> tuple[dict[Target, HiddenStates], HiddenStates]:
        """For every batch the inputs of the linears, without padding, and the outputs of the layer."""
        outputs, inputs = HiddenStates(self._prefix.scratch), dict[Target, HiddenStates]()
        with alone(self._prefix, self._layers):
            for index in range(len(self._prefix.batches)):
                with self._recording(index, modules) as recorded:
                    outputs.append(run_layers(self._prefix, self._layers, index, hidden[index]))
                by_input: dict[int, HiddenStates] = {}  # linears that share an input share what is kept of it
                for target, x in recorded.items():
                    if target not in inputs:
                        inputs[target] = by_input.get(id(x)) or HiddenStates(self._prefix.scratch)
                    if id(x) not in by_input:
                        by_input[id(x)] = inputs[target]
                        inputs[target].append(x)
        return inputs, outputs

    def groups(self, modules: Mapping[nn.Module, Target], hidden: Tensor) -> list[list[Target]]:
        """The linears that share an input, in the order of the calls."""
        groups: dict[int, list[Target]] = {}
        if modules:
            with alone(self._prefix, self._layers):
                inputs = inputs_of(self._prefix, self._layers.start, 0, hidden, modules)
            for module, (x, *_) in inputs.items():
                groups.setdefault(id(x), []).append(modules[module])
        return list(groups.values())

    def covariances(
        self, target: Target, module: LowRankLinear, dense_inputs: Sequence[Tensor], low: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``Σ x x̂ᵀ`` and ``Σ x̂ x̂ᵀ`` of the inputs of a linear, in fp32 (fp64 for fp64)."""
        width, linear = module.in_features, target.module
        device, dtype = execution_device(linear), accumulation_dtype(linear.weight.dtype)
        cross, gram = (torch.zeros(width, width, device=device, dtype=dtype) for _ in range(2))
        with alone(self._prefix, self._layers):
            for index in range(len(self._prefix.batches)):
                inputs = inputs_of(self._prefix, self._layers.start, index, low[index], [module], calls=1)
                seen = inputs[module][0].to(device)
                x = dense_inputs[index].to(device)
                with exact_bf16(x, seen):
                    x, seen = widen(x, dtype), widen(seen, dtype)
                    add_product_(cross, x.mT, seen)
                    add_product_(gram, seen.mT, seen)
        return cross, gram

    @contextmanager
    def _recording(self, index: int, modules: Mapping[nn.Module, Target]) -> Iterator[dict[Target, Tensor]]:
        """Record the input of each linear, without padding, in the order of the calls."""
        rows, recorded = Rows(self._prefix.batches[index]), dict[Target, Tensor]()

        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            recorded.setdefault(modules[module], rows.of_input(args[0]))

        with hooked(*modules, before=record):
            yield recorded
