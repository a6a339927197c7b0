"""Which singular groups of a linear are retained, and the low-rank linear that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport, spectrum_indices
from grasp.checkpoint.run_state import NoState
from grasp.config import GraspConfig
from grasp.method.blocks import fp64_device, to_double
from grasp.method.knapsack import DENSE, ROUNDED
from grasp.method.ranks import rank_for_threshold, retained_indices
from grasp.method.rounding import round_to_outputs
from grasp.method.storage import Storage
from grasp.method.svd import SVD, shrinkage
from grasp.model.dense import dense_shape
from grasp.model.lowrank_linear import LowRankLinear, Pivotable
from grasp.model.quantized_linear import QuantizedLinear
from grasp.model.size import parameter_count
from grasp.model.targets import Target
from grasp.statistics.covariance import Covariance
from grasp.statistics.scores import Score

NO_LOSS = "its output does not reach the loss"
STAYS_DENSE = "stays dense: the budget does more elsewhere"
LAYER_REMOVED = "its layer is removed"
NOT_PIVOTED = "stays dense: rounding errors would grow too much in its pivoted form"
EXPANDED = "is dense again: in 4 bits its factors would save little and lose much"
_FACTORS = ("U", "S", "Vh")


@dataclass(frozen=True)
class Selection:
    """The singular groups that a linear can retain, or the reason why it is skipped.

    The factors are in a file of the run, since those of all linears are as large as the model.
    """

    file: str  # its name
    # (R,) int64, ascending; the groups that the file has, 0 being the one with the largest singular value
    indices: Tensor
    importance: Tensor  # (groups,), of all groups; empty if the linear is skipped
    spectrum: Tensor  # the singular values of all groups at ``spectrum_indices``
    rounding: Tensor  # (1,), the score of giving the dense linear fewer bits; empty if that is no choice
    skipped: str  # the reason, or ""

    def best(self, rank: int) -> Tensor:
        """(rank,) int64, ascending: the positions in ``indices`` of the most important groups."""
        return retained_indices(self.importance[self.indices], rank)


Selections = Mapping[Target, Selection]
Extra = Callable[[Target, Tensor, Covariance], Mapping[str, Tensor]]  # of a linear, its weight and its covariances


class Replacement(NamedTuple):
    """A low-rank linear to take the place of a dense one, with its report; only the report if it is skipped.

    ``as_stored`` adds the sizes of the low-rank linear.
    """

    module: LowRankLinear | None
    report: ModuleReport


def write_groups(
    state: NoState,
    stem: str,
    target: Target,
    weight: Tensor,
    score: Score | None,
    rank: int,
    config: GraspConfig,
    extra: Extra | None = None,
) -> str:
    """Decompose one linear, and write its most important groups, at most ``rank``; the name of the file.

    Without a score, the output of the linear does not reach the loss. The file has the tensors of ``extra`` too.
    """
    if score is None:
        return state.write(stem, {}, {"skipped": NO_LOSS})
    svd, importance, covariance = score(weight, None if config.threshold_ratio is not None else rank)
    rank = min(rank, len(svd.S))
    if config.threshold_ratio is not None:
        rank = rank_for_threshold(importance, config.threshold_ratio, dense_shape(target.module), config.form)
    indices = retained_indices(importance, rank)
    U, S, Vh = svd
    if len(indices) < len(Vh):  # otherwise no copy: they are as large as the weight in fp32
        U, Vh = U[:, indices], Vh[indices]
    tensors = {
        "U": U,
        "S": S[indices],
        "Vh": Vh,
        "indices": indices,
        "importance": importance,
        "spectrum": svd.S[spectrum_indices(len(svd.S))],
    }
    if config.fewest_bits is not None:
        assert covariance is not None
        tensors["rounding"] = rounding_score(weight, covariance, config.fewest_bits, target.name)
    if extra is not None:
        assert covariance is not None
        tensors |= extra(target, weight, covariance)
    return state.write(stem, tensors, {"skipped": ""})


def rounding_score(weight: Tensor, covariance: Covariance, storage: Storage, name: str) -> Tensor:
    """The score of rounding a dense linear, in the units of those of groups: ``‖B^½ (W − Ŵ) A^½‖²``, one number."""
    A, B, tokens = covariance
    assert isinstance(B, Tensor)
    device = fp64_device(weight.device)
    (more_A, total_A), (more_B, total_B) = (shrinkage(each.diagonal(), tokens, device, name) for each in (A, B))
    error = weight.float() - round_to_outputs(weight, A, storage).matrix
    left, right = B.float() @ error + more_B * error, error @ A.float() + more_A * error
    return to_double(left * right, device).sum().reshape(1) / (total_A * total_B)


def read_selection(state: NoState, file: str) -> Selection:
    """What a file of ``write_groups`` has, without the factors."""
    keys, empty = ("indices", "importance", "spectrum", "rounding"), torch.empty(0)
    tensors, notes = state.read(file, *keys)
    indices, importance, spectrum, rounding = (tensors.get(key, empty) for key in keys)
    return Selection(file, indices, importance, spectrum, rounding, notes["skipped"])


def low_rank(state: NoState, target: Target, selection: Selection, rank: int) -> LowRankLinear:
    """The low-rank linear of the ``rank`` most important groups."""
    best, factors = selection.best(rank), state.read(selection.file, *_FACTORS)[0]
    svd = SVD(factors["U"][:, best], factors["S"][best], factors["Vh"][best])
    return LowRankLinear.from_dense(target.module, torch.arange(rank), svd)


def replacement(state: NoState, target: Target, selection: Selection, rank: int) -> Replacement:
    """What takes the place of a linear if it is given a rank, or stays ``DENSE`` or ``ROUNDED``."""
    reason = selection.skipped or (STAYS_DENSE if rank in (DENSE, ROUNDED) else "")
    if reason:
        return skip(target, reason)
    module = low_rank(state, target, selection, rank)
    n, k = dense_shape(target.module)
    bias = 0 if module.bias is None else module.bias.numel()
    before = n * k + bias
    total = float(selection.importance.double().sum())
    indices = selection.indices[selection.best(rank)]
    kept = float(selection.importance[indices].double().sum()) / total if total > 0 else 1.0
    report = ModuleReport(
        name=target.name,
        layer=target.layer,
        block=target.block,
        reason="",
        out_features=n,
        in_features=k,
        rank=rank,
        parameters_before=before,
        bytes_before=before * target.module.weight.element_size(),
        importance_kept=kept,
        indices=tuple(indices.tolist()),
        spectrum=tuple(float(f"{value:.4g}") for value in selection.spectrum.tolist()),
    )
    return Replacement(module, report)


def write_replacement(state: NoState, target: Target, chosen: Replacement) -> str:
    """Write what takes the place of a linear; the name of the file."""
    tensors = {} if chosen.module is None else chosen.module.state_dict()
    return state.write(f"module-{target.name}", tensors, {"report": asdict(chosen.report)})


def read_replacement(state: NoState, target: Target, file: str) -> Replacement:
    """What ``write_replacement`` has written."""
    tensors, notes = state.read(file)
    module = LowRankLinear.from_factors(target.module, tensors) if tensors else None
    return Replacement(module, ModuleReport.from_dict(notes["report"]))


def stored_replacements(state: NoState, members: Sequence[Target]) -> dict[Target, Replacement] | None:
    """What takes the place of some linears, if it is stored for all of them."""
    files = {target: state.files.get(f"module-{target.name}") for target in members}
    read = {target: read_replacement(state, target, file) for target, file in files.items() if file is not None}
    return read if read and len(read) == len(files) else None


def as_stored(report: ModuleReport, module: nn.Module) -> ModuleReport:
    """The report with the form and sizes of a linear's replacement, or with the reason why it has none."""
    if report.reason == STAYS_DENSE and isinstance(module, QuantizedLinear):
        return replace(report, reason=f"stays dense, in {module.storage}")
    if report.reason:
        return report
    if not isinstance(module, Pivotable):
        reason = EXPANDED if isinstance(module, QuantizedLinear) else NOT_PIVOTED
        return ModuleReport(report.name, report.layer, "", reason)
    return replace(
        report,
        form=module.form,
        parameters_after=parameter_count(module),
        bytes_after=sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())),
    )


def stored_reports(
    reports: Sequence[ModuleReport], model: PreTrainedModel, depth: int, removed: Sequence[int]
) -> tuple[ModuleReport, ...]:
    """``as_stored`` for the modules of a model that had ``depth`` layers, whose numbers the reports have."""
    remaining = [layer for layer in range(depth) if layer not in removed]
    numbers = {f".{old}.": f".{new}." for new, old in enumerate(remaining)}
    modules = dict(model.named_modules())
    result = []
    for report in reports:
        number = f".{report.layer}."
        module = modules.get(report.name.replace(number, numbers.get(number, number), 1))
        result.append(report if module is None else as_stored(report, module))
    return tuple(result)


def skip(target: Target, reason: str) -> Replacement:
    """Leave a linear as it is."""
    return Replacement(None, ModuleReport(target.name, target.layer, "", reason))
