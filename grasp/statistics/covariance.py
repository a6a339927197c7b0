"""Covariances of the inputs and of the output gradients of linears, over the calibration tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.method.ranks import Shape
from grasp.method.svd import Projected
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.families import family_of
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, Prefix, sweep, sweep_name
from grasp_kernels.products import accumulate_gram_, mirror_, project
from grasp_kernels.reference import accumulation_dtype


class Covariance(NamedTuple):
    """Sums over the tokens of a linear, without padding. Divided by ``tokens`` they are A and B of the method.

    d is the gradient of the summed negative log-likelihood.
    """

    A: Tensor  # Σ x xᵀ, (K, K): one tensor for all linears that share an input
    B: Tensor | Projected | None  # Σ d dᵀ, (N, N), or what a decomposition reads of it
    tokens: int


class CovarianceSums:
    """Σ x xᵀ and Σ d dᵀ of many linears. An input that several linears share is counted once.

    Args:
        outputs: gather Σ d dᵀ too.
        weights: (N, K) of the linears W whose Σ d dᵀ is ``Projected``: it is summed as Σ (Wᵀ d) (Wᵀ d)ᵀ.
    """

    def __init__(self, *, outputs: bool = True, weights: Mapping[Target, Tensor] | None = None) -> None:
        self._sums_outputs, self._weights = outputs, weights or {}
        self._inputs: dict[Target, Tensor] = {}
        self._outputs: dict[Target, Tensor] = {}
        self._squares: dict[Target, Tensor] = {}  # of the outputs of ``weights``
        self._tokens: Counter[Target] = Counter()
        self._batch_inputs: defaultdict[Target, list[Tensor]] = defaultdict(list)

    def add(self, call: Call) -> None:
        """Count the tokens of one call. Its input is counted at the end of the batch."""
        target, x, grad_y = call
        self._tokens[target] += len(x)
        self._batch_inputs[target].append(x)
        if not self._sums_outputs:
            return
        if target in self._weights:
            dtype = accumulation_dtype(grad_y.dtype)
            squares = torch.linalg.vector_norm(grad_y, dim=0, dtype=dtype).square_()
            self._squares[target] = self._squares.get(target, 0) + squares
            grad_y = project(grad_y, self._weights[target], dtype)
        if target not in self._outputs:
            self._outputs[target] = _zeros(grad_y)
        accumulate_gram_(self._outputs[target], grad_y)

    def end_batch(self) -> None:
        """Count the inputs of the batch. Linears with the same inputs in their first batch share one sum.

        Raises:
            UnsupportedModelError: if they have different inputs in a later batch.
        """
        input_ids = {target: [id(x) for x in inputs] for target, inputs in self._batch_inputs.items()}
        new: dict[tuple[int, ...], Tensor] = {}
        for target in [target for target in input_ids if target not in self._inputs]:
            key = tuple(input_ids[target])
            if key not in new:
                new[key] = _zeros(self._batch_inputs[target][0])
            self._inputs[target] = new[key]
        counted: dict[int, list[int]] = {}
        for target, gram in self._inputs.items():
            ids = input_ids.get(target, [])
            if id(gram) not in counted:
                counted[id(gram)] = ids
                for x in self._batch_inputs[target]:
                    accumulate_gram_(gram, x)
            elif counted[id(gram)] != ids:
                raise UnsupportedModelError(
                    f"{target.name} shared its inputs with another linear in one batch and not in a later one; "
                    "expected a model that computes every batch in the same way"
                )
        self._batch_inputs.clear()

    def reduce(self, processes: Processes, readers: Mapping[Target, Collection[int]]) -> None:
        """Add up the sums of all processes; the sums of a target only in its readers, the others may not use them.

        Args:
            processes: all that hold sums.
            readers: the ranks of the processes that need the sums of each target.
        """
        grams, ranks = dict[int, Tensor](), defaultdict[int, set[int]](set)
        for sums in (self._inputs, self._outputs, self._squares):
            for target, gram in sums.items():
                grams[id(gram)] = gram
                ranks[id(gram)].update(readers[target])
        tokens = torch.tensor(list(self._tokens.values()), dtype=torch.int64)
        processes.reduce_([(gram, sorted(ranks[key])) for key, gram in grams.items()])
        processes.sum_([tokens])
        counts = zip(self._tokens, tokens.tolist(), strict=True)
        self._tokens = Counter({target: n for target, n in counts if processes.rank in readers[target]})
        self._inputs = {target: self._inputs[target] for target in self._tokens}
        self._outputs = {target: gram for target, gram in self._outputs.items() if target in self._tokens}

    def result(self) -> dict[Target, Covariance]:
        """The sums of each linear that was called, unless A or B is 0. Nothing may be added afterwards.

        Raises:
            NonFiniteError: if a sum is NaN or infinite.
        """
        for gram in {id(gram): gram for gram in (*self._inputs.values(), *self._outputs.values())}.values():
            mirror_(gram)
        for target in self._tokens:
            require_finite(target, "covariance", self._inputs[target], self._outputs.get(target))
        covariances = {t: Covariance(self._inputs[t], self._output(t), n) for t, n in self._tokens.items()}
        return {t: sums for t, sums in covariances.items() if all(g is None or g.diagonal().any() for g in sums[:2])}

    def _output(self, target: Target) -> Tensor | Projected | None:
        gram, squares = self._outputs.get(target), self._squares.get(target)
        return gram if gram is None or squares is None else Projected(gram, squares)


def gather_covariances(
    prefix: Prefix,
    targets: Collection[Target],
    *,
    layers: range | None = None,
    outputs: bool = True,
    projected: Collection[Target] = (),
    progress: Progress = no_progress,
    processes: Processes = ALONE,
    owned: bool = False,
) -> dict[Target, Covariance]:
    """Sum x xᵀ of each distinct input and d dᵀ of each linear, in one sweep.

    Args:
        prefix: as ``targets``, ``layers``, ``progress`` and ``processes`` for ``gather_scores``.
        outputs: gather B too.
        projected: the targets whose B is ``Projected``.
        owned: each process gets the sums of the targets that it will decompose, by their position
            (``Processes.owner``), instead of all.

    Returns:
        Symmetric sums in fp32 (fp64 for fp64), on the device of the linear. A target whose output does not reach the
        loss is left out.

    Raises:
        NonFiniteError: if the loss or a sum is NaN or infinite.
        UnsupportedModelError: if linears share inputs in one batch and not in another.
    """
    with processes.fail_together():
        weights = {target: dense_weight(target.module) for target in targets if target in projected}
    sums = CovarianceSums(outputs=outputs, weights=weights)
    step = f"covariances, {sweep_name(targets)}"

    def after(done: int) -> None:
        sums.end_batch()
        progress(step, done, len(prefix.batches))

    with processes.fail_together():
        sweep(prefix, targets, sums.add, layers=layers, after=after)
    everyone = range(processes.size)
    readers = {target: [processes.owner(index)] if owned else everyone for index, target in enumerate(targets)}
    sums.reduce(processes, readers)
    with processes.fail_together():
        return sums.result()


def is_projected_cheaper(shape: Shape) -> bool:
    """Whether ``Projected`` takes less time than all of B for an (N, K) weight in fp32: from N = 3.44 K on.

    A product with the weight and half of a symmetric one take the place of half of a larger one. Where 16-bit products
    are faster, only the one with a 16-bit weight is, and the sums may take longer; the memory and the decomposition
    are a fraction at any dtype.
    """
    n, k = shape
    return n * k + k * k <= 3 * n * n // 8


def covariance_bytes(
    targets: Collection[Target],
    *,
    outputs: bool = True,
    projected: Collection[Target] = (),
    fetched: bool = False,
) -> int:
    """The memory for the sums of ``gather_covariances``, in bytes.

    Linears that share an input by their names (``Family.shared_inputs``) count one A. If other linears share an input,
    the result is an upper bound. If weights are ``fetched`` from elsewhere, those of ``projected`` are counted.
    """
    taken = sum(item_bytes(target) * dense_shape(target.module)[1] ** 2 for target in distinct_inputs(targets))
    for target in targets if outputs else ():
        n, k = dense_shape(target.module)
        if target in projected:
            taken += item_bytes(target) * (k * k + n) + fetched * target.module.weight.itemsize * n * k
        else:
            taken += item_bytes(target) * n * n
    return taken


def _zeros(rows: Tensor) -> Tensor:
    return rows.new_zeros(rows.shape[1], rows.shape[1], dtype=accumulation_dtype(rows.dtype))


def item_bytes(target: Target) -> int:
    """The bytes of a number of a linear's sums."""
    return accumulation_dtype(target.module.weight.dtype).itemsize


def distinct_inputs(targets: Iterable[Target]) -> list[Target]:
    """One linear of each group that shares an input by the names of its members."""
    return [group[-1] for group in input_groups(targets)]


def input_groups(targets: Iterable[Target]) -> list[tuple[Target, ...]]:
    """The linears that share an input by their names (``Family.shared_inputs``), in the order of ``targets``."""
    groups: defaultdict[str, list[Target]] = defaultdict(list)
    for target in targets:
        groups[_input_name(target)].append(target)
    return list(map(tuple, groups.values()))


def _input_name(target: Target) -> str:
    """A name that is the same for all linears that share an input."""
    parent, _, child = target.name.rpartition(".")
    row = next((names for names in family_of(target.name).shared_inputs if child in names), (child,))
    return f"{parent}.{row[0]}"


def require_finite(target: Target, statistic: str, *sums: Tensor | None) -> None:
    """Raise ``NonFiniteError`` if a sum of a target's statistic is NaN or infinite."""
    # torch.isfinite would copy the sum; the extremes are NaN if an entry is.
    if not all(torch.stack(torch.aminmax(total)).isfinite().all() for total in sums if total is not None):
        raise NonFiniteError(
            f"the {statistic} of {target.name} is NaN or infinite; expected a finite one. Load the model in "
            "bfloat16 or float32."
        )
