"""Which singular groups of a linear are retained, and the low-rank linear that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport, spectrum_indices
from grasp.config import GraspConfig
from grasp.method.knapsack import DENSE
from grasp.method.ranks import rank_for_threshold, retained_indices
from grasp.method.svd import SVD
from grasp.model.dense import dense_shape
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target
from grasp.statistics.scores import Scores

NO_LOSS = "its output does not reach the loss"
STAYS_DENSE = "stays dense: the budget does more elsewhere"
LAYER_REMOVED = "its layer is removed"


@dataclass(frozen=True)
class Selection:
    """The singular groups that a linear retains, or the reason why it is skipped; then all tensors are empty."""

    U: Tensor  # (N, R), of the retained groups
    S: Tensor  # (R,)
    Vh: Tensor  # (R, K)
    indices: Tensor  # (R,) int64, ascending, 0 being the group with the largest singular value
    importance: Tensor  # (groups,), of all groups
    spectrum: Tensor  # the singular values of all groups at ``spectrum_indices``
    skipped: str | None = None

    @classmethod
    def skip(cls, reason: str) -> Selection:
        """The selection of a linear that is left as it is."""
        empty = torch.empty(0)
        return cls(empty, empty, empty, empty, empty, empty, reason)

    @property
    def svd(self) -> SVD:
        """The retained groups."""
        return SVD(self.U, self.S, self.Vh)

    def truncated(self, rank: int) -> Selection:
        """Retain the ``rank`` most important of the retained groups; with ``DENSE``, skip the linear."""
        if rank == DENSE:
            return Selection.skip(STAYS_DENSE)
        best = retained_indices(self.importance[self.indices], rank)
        return Selection(
            self.U[:, best], self.S[best], self.Vh[best], self.indices[best], self.importance, self.spectrum
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, as processes exchange them; the reason as UTF-8 bytes."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "skipped"}
        reason = (self.skipped or "").encode()
        return tensors | ({"skipped": torch.tensor(list(reason), dtype=torch.uint8)} if reason else {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Selection:
        """The inverse of ``to_tensors``."""
        reason = bytes(tensors["skipped"].tolist()).decode() if "skipped" in tensors else None
        return cls(**{name: tensor for name, tensor in tensors.items() if name != "skipped"}, skipped=reason)


Selections = Mapping[Target, Selection]


def select_groups(target: Target, scores: Scores, ranks: Mapping[Target, int], config: GraspConfig) -> Selection:
    """Retain the most important groups of one linear, at most ``ranks[target]``."""
    if target not in scores:
        return Selection.skip(NO_LOSS)
    svd, importance = scores[target]()
    rank = min(ranks[target], len(svd.S))
    if config.threshold_ratio is not None:
        rank = rank_for_threshold(importance, config.threshold_ratio, dense_shape(target.module))
    indices = retained_indices(importance, rank)
    spectrum = svd.S[spectrum_indices(len(svd.S))]
    return Selection(svd.U[:, indices], svd.S[indices], svd.Vh[indices], indices, importance, spectrum)


def replace_(model: PreTrainedModel, target: Target, selection: Selection) -> ModuleReport:
    """Put the low-rank form of a linear in its place, unless it is skipped; the report of both cases."""
    if selection.skipped is not None:
        return ModuleReport(target.name, target.layer, "", selection.skipped)
    module = LowRankLinear.from_dense(target.module, torch.arange(len(selection.S)), selection.svd)
    model.set_submodule(target.name, module)
    n, k = dense_shape(target.module)
    before, after = list(target.module.parameters()), list(module.parameters())
    total = float(selection.importance.double().sum())
    return ModuleReport(
        name=target.name,
        layer=target.layer,
        block=target.block,
        reason="",
        out_features=n,
        in_features=k,
        rank=module.rank,
        parameters_before=sum(p.numel() for p in before),
        parameters_after=sum(p.numel() for p in after),
        bytes_before=sum(p.nbytes for p in before),
        bytes_after=sum(p.nbytes for p in after),
        importance_kept=float(selection.importance[selection.indices].double().sum()) / total if total > 0 else 1.0,
        indices=tuple(selection.indices.tolist()),
        spectrum=tuple(float(f"{value:.4g}") for value in selection.spectrum.tolist()),
    )
