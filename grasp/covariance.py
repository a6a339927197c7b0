"""What the tokens look like to each linear: covariances of its inputs and output gradients, moments in any basis."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.architecture import BLOCKS, Target
from grasp.attribution import sweep_name
from grasp.calibration import CalibrationBatch
from grasp.distributed import ALONE, Processes
from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.modules import SHARED_INPUTS, SVD, dense_shape
from grasp.progress import Progress, silent
from grasp.sweep import Call, Prefix, sweep
from grasp_kernels import SingularValueGrad, singular_value_grad
from grasp_kernels.products import accumulate_gram_, mirror_
from grasp_kernels.reference import accumulation_dtype


class Covariance(NamedTuple):
    """Sums over the tokens that a linear saw, padding left out; divided by ``tokens`` they are the method's A and B."""

    A: Tensor | None  # Σ x xᵀ, (K, K): one tensor for all linears that are given the same input
    B: Tensor | None  # Σ d dᵀ, (N, N), d being the gradient of the summed negative log-likelihood
    tokens: int


class CovarianceSums:
    """Σ x xᵀ and Σ d dᵀ of many linears; an input that several are given is counted once.

    Args:
        inputs: gather Σ x xᵀ.
        outputs: gather Σ d dᵀ.
    """

    def __init__(self, *, inputs: bool = True, outputs: bool = True) -> None:
        self._wants_inputs, self._wants_outputs = inputs, outputs
        self._inputs: dict[Target, Tensor] = {}
        self._outputs: dict[Target, Tensor] = {}
        self._tokens: Counter[Target] = Counter()
        self._given: defaultdict[Target, list[Tensor]] = defaultdict(list)  # inputs of this batch

    def add(self, call: Call) -> None:
        """Count one call's tokens; its input waits for the end of the batch."""
        target, x, grad_y = call.target, call.x, call.grad_y
        self._tokens[target] += len(x)
        if self._wants_inputs:
            self._given[target].append(x)
        if self._wants_outputs:
            if target not in self._outputs:
                self._outputs[target] = _zeros(grad_y)
            accumulate_gram_(self._outputs[target], grad_y)

    def end_batch(self) -> None:
        """Count the batch's inputs. Linears that were given the same ones in their first batch share the sum.

        Raises:
            UnsupportedModelError: if they are given others later.
        """
        given = {target: [id(x) for x in inputs] for target, inputs in self._given.items()}
        new: dict[tuple[int, ...], Tensor] = {}
        for target in [target for target in given if target not in self._inputs]:
            key = tuple(given[target])
            if key not in new:
                new[key] = _zeros(self._given[target][0])
            self._inputs[target] = new[key]
        counted: dict[int, list[int]] = {}
        for target, gram in self._inputs.items():
            ids = given.get(target, [])
            if id(gram) not in counted:
                counted[id(gram)] = ids
                for x in self._given[target]:
                    accumulate_gram_(gram, x)
            elif counted[id(gram)] != ids:
                raise UnsupportedModelError(
                    f"{target.name} shared its inputs with another linear in one batch and not in a later one; "
                    "expected a model that computes every batch in the same way"
                )
        self._given.clear()

    def share(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        inputs = {id(gram): gram for gram in self._inputs.values()}
        tokens = torch.tensor(list(self._tokens.values()), dtype=torch.int64)
        processes.sum_([*inputs.values(), *self._outputs.values(), tokens])
        self._tokens = Counter(dict(zip(self._tokens, tokens.tolist(), strict=True)))

    def result(self) -> dict[Target, Covariance]:
        """The sums of each linear that was called. Nothing may be added afterwards.

        Raises:
            NonFiniteError: if a sum is NaN or infinite.
        """
        for gram in {id(gram): gram for gram in (*self._inputs.values(), *self._outputs.values())}.values():
            mirror_(gram)
        found = {t: Covariance(self._inputs.get(t), self._outputs.get(t), n) for t, n in self._tokens.items()}
        for target, covariance in found.items():
            _require_finite(target, "covariance", covariance.A, covariance.B)
        return found


class MomentSum:
    """First and second moment of the gradient in each group's singular value, for one linear in any basis.

    Args:
        svd: the groups: U (N, R) and Vh (R, K), orthogonal or not, fp32 (fp64 for fp64).
        second: square the gradient of each ``"token"`` or each ``"sample"``; ``None`` for no second moment.
    """

    def __init__(self, svd: SVD, second: Literal["token", "sample"] | None) -> None:
        self._svd, self._unit = svd, second
        self._first, self._second = torch.zeros_like(svd.S), torch.zeros_like(svd.S)
        self._samples: Tensor | None = None  # (B, R), of this batch: a linear may be called twice for a sample
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count one call's tokens."""
        self.calls += 1
        U, S, Vh = self._svd
        x, grad_y, by_sample = call.x.to(S.dtype), call.grad_y.to(S.dtype), self._unit == "sample"
        first, second = singular_value_grad(
            *(x, grad_y, U, Vh),
            cu_seqlens=call.cu_seqlens.to(x.device),
            per_sample=by_sample,
            second_moment="token" if self._unit == "token" else None,
        )
        if by_sample:
            self._samples = first if self._samples is None else self._samples + first
            return
        self._first += first
        if second is not None:
            self._second += second

    def end_batch(self) -> None:
        """Square what the batch's samples add up to."""
        if self._samples is not None:
            self._first += self._samples.sum(0)
            self._second += self._samples.square().sum(0)
            self._samples = None

    def share(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        calls = torch.tensor(self.calls)
        processes.sum_([self._first, self._second, calls])
        self.calls = int(calls)

    def result(self) -> SingularValueGrad:
        """The moments, (R,) each."""
        return SingularValueGrad(self._first, None if self._unit is None else self._second)


def gather_covariances(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Collection[Target],
    prefix: Prefix,
    *,
    inputs: bool = True,
    outputs: bool = True,
    dtype: str | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> dict[Target, Covariance]:
    """Sum x xᵀ of each distinct input and d dᵀ of each linear, in one sweep; ``split_by_memory`` makes several.

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from.
        targets: linears of one or more layers.
        prefix: see ``capture_prefix``.
        inputs: gather A.
        outputs: gather B.
        dtype: run the model in it, see ``sweep``.
        progress: called after each batch.
        processes: those whose sums are added up.

    Returns:
        Symmetric sums in fp32 (fp64 for fp64), on the device of the linear; none for a target whose output does not
        reach the loss.

    Raises:
        NonFiniteError: if the loss or a sum is NaN or infinite.
        UnsupportedModelError: if linears share inputs in one batch and not in another.
    """
    sums = CovarianceSums(inputs=inputs, outputs=outputs)
    step = f"covariances, {sweep_name(targets)}"

    def after(done: int) -> None:
        sums.end_batch()
        progress(step, done, len(batches))

    with processes.together():
        sweep(model, batches, targets, prefix, sums.add, dtype=dtype, after=after)
    sums.share(processes)
    return sums.result()


def basis_moments(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    decompositions: Mapping[Target, SVD],
    prefix: Prefix,
    *,
    second: Literal["token", "sample"] | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> dict[Target, SingularValueGrad]:
    """Moments of the gradient in the singular values of any decomposition, ``Σ (uₖᵀ d)(xᵀ vₖ)``, in one sweep.

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from.
        decompositions: of each linear's weight, in whatever basis: U (N, R) and Vh (R, K).
        prefix: see ``capture_prefix``.
        second: also sum the squared gradient of each ``"token"`` or each ``"sample"``, which is one sequence.
        dtype: run the model in it, see ``sweep``.
        progress: called after each batch.
        processes: those whose sums are added up.

    Returns:
        ``first`` and ``second`` (``None`` unless asked for), (R,) in the dtype of the decomposition; none for a target
        whose output does not reach the loss.

    Raises:
        NonFiniteError: if the loss or a moment is NaN or infinite.
    """
    sums = {target: MomentSum(svd, second) for target, svd in decompositions.items()}
    step = f"moments, {sweep_name(decompositions)}"

    def after(done: int) -> None:
        for each in sums.values():
            each.end_batch()
        progress(step, done, len(batches))

    with processes.together():
        sweep(model, batches, sums, prefix, lambda call: sums[call.target].add(call), dtype=dtype, after=after)
    for total in sums.values():
        total.share(processes)
    moments = {target: each.result() for target, each in sums.items() if each.calls}
    for target, each in moments.items():
        _require_finite(target, "gradient", *each)
    return moments


def covariance_bytes(targets: Collection[Target], *, inputs: bool = True, outputs: bool = True) -> int:
    """Memory that the sums of ``gather_covariances`` take, in bytes.

    Linears that by their names share an input (``SHARED_INPUTS``) count one A; if others do, this is an upper bound.
    """
    distinct = distinct_inputs(targets) if inputs else []
    taken = sum(_item_bytes(target) * dense_shape(target.module)[1] ** 2 for target in distinct)
    return taken + sum(_item_bytes(target) * dense_shape(target.module)[0] ** 2 for target in targets if outputs)


def split_by_memory(
    targets: Collection[Target], budget: int, *, inputs: bool = True, outputs: bool = True
) -> list[list[Target]]:
    """Groups of linears whose covariances fit in memory, each a sweep of its own; the deepest layers come first.

    Attention and MLP of a layer stay whole, since their linears share inputs.

    Args:
        targets: linears of one or more layers.
        budget: bytes that the sums of one group may take.
        inputs: A will be gathered.
        outputs: B will be gathered.

    Raises:
        ValueError: if the sums of one block alone take more than the budget.
    """

    def place(target: Target) -> tuple[int, int]:
        return -target.layer, BLOCKS.index(target.block)

    groups: list[list[Target]] = []
    for _, members in groupby(sorted(targets, key=place), key=place):
        block = list(members)
        needed = covariance_bytes(block, inputs=inputs, outputs=outputs)
        if needed > budget:
            raise ValueError(
                f"the covariances of layer {block[0].layer}'s {block[0].block} take {needed} bytes, the budget is "
                f"{budget}; give at least that much, or compress fewer of its linears"
            )
        if groups and covariance_bytes(groups[-1] + block, inputs=inputs, outputs=outputs) <= budget:
            groups[-1] += block
        else:
            groups.append(block)
    return groups


def _zeros(rows: Tensor) -> Tensor:
    return rows.new_zeros(rows.shape[1], rows.shape[1], dtype=accumulation_dtype(rows.dtype))


def _item_bytes(target: Target) -> int:
    return accumulation_dtype(target.module.weight.dtype).itemsize


def distinct_inputs(targets: Iterable[Target]) -> list[Target]:
    """One linear of each group that by its names shares an input."""
    return list({_input_name(target): target for target in targets}.values())


def _input_name(target: Target) -> str:
    """The same for linears that families give one input."""
    parent, _, child = target.name.rpartition(".")
    row = next((names for names in SHARED_INPUTS if child in names), (child,))
    return f"{parent}.{row[0]}"


def _require_finite(target: Target, what: str, *sums: Tensor | None) -> None:
    if not all(torch.isfinite(each).all() for each in sums if each is not None):
        raise NonFiniteError(
            f"the {what} of {target.name} is NaN or infinite; expected a finite one. Load the model in bfloat16 or "
            "float32."
        )
