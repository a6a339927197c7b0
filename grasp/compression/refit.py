"""Least squares of the left factors on the dense outputs, given the inputs that the compressed model produces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.method.least_squares import Moments, Products, least_squares, sampled_rows
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.hooks import replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import execution_device
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import require_finite
from grasp.statistics.hidden_states import HiddenStates, Scratch
from grasp.statistics.one_layer import OneLayer
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import capture_prefix, propagate
from grasp_kernels.products import accumulate_gram_, mirror_
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
        numbers = accumulate((len(batch.input_ids) for batch in batches), initial=0)
        odd = [_odd_sequences(batch, number) for batch, number in zip(batches, numbers, strict=False)]
        self._odd, self._odd_tokens = odd[processes.rank :: processes.size], sum(int(each.sum()) for each in odd)
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
        run, unfitted = OneLayer(self._prefix, layer), {} if is_fitted else modules
        with self._processes.fail_together():
            inputs, dense = run.inputs_and_outputs(self._dense, [target.module for target in unfitted])
            for target, module in modules.items():
                self._model.set_submodule(target.name, module)
            groups = run.groups(unfitted.values(), self._low[0])
        targets: dict[nn.Module, Target] = {module: target for target, module in unfitted.items()}
        for linears, calls in groups:
            members = [targets[linear] for linear in linears]
            self._fit_(run, members, calls, unfitted, inputs[members[0].module])
        self._dense = dense
        if not is_removed:
            with self._processes.fail_together():
                self._low = propagate(self._prefix, range(layer, layer + 1), self._low)

    def _fit_(
        self,
        run: OneLayer,
        group: Sequence[Target],
        calls: int,
        modules: Mapping[Target, LowRankLinear],
        inputs: HiddenStates,
    ) -> None:
        """Fit the linears that share an input."""
        linear, width = group[0].module, modules[group[0]].in_features
        with self._processes.fail_together():
            device, dtype = execution_device(linear), accumulation_dtype(linear.weight.dtype)
            sums = Moments.zeros(width, device, dtype, calls * self._tokens)
            odd = {t: _OddProducts(modules[t], dense_weight(t.module), dtype, calls * self._odd_tokens) for t in group}

            def visit(batch: int, x: Tensor, seen: Tensor) -> None:
                if batch < len(self._odd):  # else it is padding
                    own = self._odd[batch].repeat(calls).to(x.device)
                    for products in odd.values():
                        products.add_(x[own], seen[own])

            run.add_covariances_(sums, modules[group[0]], calls, inputs, self._low, visit)
        owners = {target: {self._processes.owner(index)} for index, target in enumerate(group)}
        totals = [(total, owners[target]) for target in group for total in odd[target].totals]
        every = set().union(*owners.values())
        self._processes.reduce_([(sums.cross, every), (sums.inputs, every), *totals])

        def solve(target: Target, weight: Tensor) -> dict[str, Tensor]:
            module = modules[target]
            require_finite(target, "input covariance", sums.cross, sums.inputs)
            return {"U": least_squares(module.U, module.Vh, weight, sums, odd[target].products)}

        for target, left in self._processes.map_divided(group, solve, fetch=lambda t: dense_weight(t.module)):
            modules[target].U.copy_(left["U"])


class _OddProducts:
    """The ``Products`` of every other sequence, for one linear."""

    def __init__(self, module: LowRankLinear, weight: Tensor, dtype: torch.dtype, tokens: int) -> None:
        device, rank = module.Vh.device, module.rank
        self._left = weight[sampled_rows(len(weight))].to(device, dtype)
        self._right = module.Vh.detach()
        self.totals = tuple(torch.zeros(rows, rank, device=device, dtype=dtype) for rows in (rank, len(self._left)))
        self._tokens = tokens

    @property
    def products(self) -> Products:
        """The sums."""
        gram, wanted = self.totals
        return Products(mirror_(gram), wanted, self._tokens)

    def add_(self, x: Tensor, seen: Tensor) -> None:
        """Add tokens, (T, K)."""
        gram, wanted = self.totals
        outputs, projected = x.to(gram.dtype) @ self._left.mT, seen.to(gram.dtype) @ self._right.to(gram.dtype).mT
        accumulate_gram_(gram, projected)
        wanted.addmm_(outputs.mT, projected)


def _odd_sequences(batch: CalibrationBatch, first: int) -> Tensor:
    """Whether the number of a token's sequence, counted from ``first``, is odd: (T,), without padding."""
    ids, mask, _ = batch
    odd = ((first + torch.arange(len(ids), device=ids.device)) % 2 == 1)[:, None].expand_as(ids)
    return odd.flatten() if mask is None else odd[mask.bool()]


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
