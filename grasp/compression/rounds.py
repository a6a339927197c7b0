"""The two strategies: decide sweep by sweep, each on the model so far, or decide on all linears together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from grasp.checkpoint.compression_report import ModuleReport
from grasp.checkpoint.run_state import Decision
from grasp.compression.budget import Plan, ceilings
from grasp.compression.candidates import FIRST_SHARE, fitted_layers, low_ranks
from grasp.compression.held_out import decide, store
from grasp.compression.refit import Refit
from grasp.compression.run import Run
from grasp.compression.selection import (
    LAYER_REMOVED,
    Replacement,
    low_rank,
    read_replacement,
    read_selection,
    replacement,
    skip,
    stored_replacements,
)
from grasp.compression.spans import select
from grasp.environment import return_freed_memory
from grasp.method.knapsack import DENSE
from grasp.method.metrics import samples_labels
from grasp.method.ranks import break_even_rank
from grasp.method.schedules import plan_sweeps
from grasp.model.dense import dense_shape
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import place_like, release_
from grasp.model.targets import Target, decoder
from grasp.statistics.processes import Processes
from grasp.statistics.sweep import Prefix, capture_prefix


class Work(NamedTuple):
    """The part of a plan that is still to be done."""

    reports: list[ModuleReport]  # of the linears that are done; grows
    sweeps: Sequence[Sequence[Target]]  # the linears to be done, by sweep
    prefix: Prefix  # where they start


def prepare_(run: Run, plan: Plan) -> Work:
    """Restore what an interrupted run has done, and compute the hidden states that the remaining sweeps start from."""
    run.clock.enter("prefix")
    sweeps = plan_sweeps(ceilings(run.config, plan), run.config.schedule)
    with run.processes.fail_together():
        restored = _restore_(run, sweeps, is_cut=_is_cut(run, plan))
    sweeps = [members for members in sweeps if not all(target in restored for target in members)]
    entries = {min(target.layer for target in members) for members in sweeps}
    if run.state.decision:
        entries = set()
    batches = run.processes.local_batches(run.batches)
    with run.processes.fail_together():
        prefix = capture_prefix(
            *(run.model, batches, entries),
            dtype=run.config.sweep_dtype,
            scratch=run.scratch,
            samples_labels=samples_labels(run.config.basis, run.config.metric),
            progress=run.progress,
        )
    return Work(list(restored.values()), sweeps, prefix)


def _is_cut(run: Run, plan: Plan) -> bool:
    """Whether a part of the budget is spent on ranks, and the others are chosen on the model as it is then."""
    return run.config.schedule == "progressive" and not plan.bits_suffice and not run.narrowed


def _restore_(run: Run, sweeps: Sequence[Sequence[Target]], *, is_cut: bool) -> dict[Target, ModuleReport]:
    """Put the low-rank linears of finished sweeps into the model; the report of each of their linears."""
    state, restored = run.state, dict[Target, ModuleReport]()
    for target in (target for members in sweeps for target in members):
        if run.config.decides_together or (file := state.files.get(f"module-{target.name}")) is None:
            continue  # a global decision is carried out layer by layer, after the sweeps
        module, restored[target] = read_replacement(run.state, target, file)
        if module is not None:
            run.model.set_submodule(target.name, module)
    if not run.config.refit:
        settle_(run, restored)
    finished = [state.decision is not None or all(target in restored for target in members) for members in sweeps]
    if is_cut:  # the first cut has a sweep of its own
        finished.append(state.decision is not None or state.cut is not None or bool(state.widths))
    state.note_progress(f"resuming: {sum(finished)} of {len(finished)} sweeps done")
    return restored


def settle_(run: Run, targets: Iterable[Target]) -> None:
    """Give low-rank linears, which are fitted, their final form and place, and free the weights of the dense ones.

    A linear that has no pivoted form returns to its dense weight, if that has fewer parameters than the factors.
    """
    present = {target: run.model.get_submodule(target.name) for target in targets}
    low = {target: module for target, module in present.items() if isinstance(module, LowRankLinear)}
    if run.config.form == "pivoted":
        pivot_all_(list(low.values()), run.processes)
    for target, module in low.items():
        is_refused = run.config.form == "pivoted" and module.order is None
        if is_refused and module.rank > break_even_rank(dense_shape(target.module), "factored"):
            run.model.set_submodule(target.name, target.module)
        else:
            place_like(module, target.module)
            release_(target.module)


def pivot_all_(modules: Sequence[LowRankLinear], processes: Processes) -> None:
    """Pivot low-rank linears, of which processes have equal copies; each pivots some, and all get the same pivots."""

    def pivoted(module: LowRankLinear) -> dict[str, Tensor]:
        module.pivot_()
        factors = {"U": module.U.detach(), "Vh": module.Vh.detach()}
        return factors if module.order is None else {**factors, "order": module.order}

    for module, factors in processes.map_divided(modules, pivoted):
        module.set_factors_(**factors)


def decide_in_order_(run: Run, plan: Plan, work: Work) -> None:
    """Replace the linears of one sweep after the other; each sweep runs on the model so far (arXiv 2501.00339)."""
    for members in work.sweeps:
        selections = select(run, plan, work.prefix, members, "only")
        chosen = {target: replacement(run.state, target, s, len(s.indices)) for target, s in selections.items()}
        store(run, chosen, "only")
        for target, (module, report) in chosen.items():
            work.reports.append(report)
            if module is not None:
                run.model.set_submodule(target.name, module)
        if not run.config.refit:
            settle_(run, members)


def decide_globally(run: Run, plan: Plan, work: Work) -> Decision:
    """Score all linears, and spend one budget over all of them. The model is left as it is."""
    if run.state.decision is not None:
        return run.state.decision
    if not work.sweeps:
        return Decision((), {}, {}, {}, {})
    [members] = work.sweeps
    if _is_cut(run, plan):
        _cut(run, plan, work.prefix, members)
    selections = select(run, plan, work.prefix, members, "second")
    decision = decide(run, plan, selections)
    run.processes.wait_for_all()
    files: dict[str, str | None] = {f"cut-{target.name}": None for target in members}
    for target in members:
        if f"module-{target.name}" in run.state.files:  # it was fitted to be compared
            files[f"second-{target.name}" if decision.fitted else f"module-{target.name}"] = None
    run.state.record(files | {"map": decision.map or None}, decision=decision)
    return decision


def carry_out_decision_(run: Run, plan: Plan, work: Work, decision: Decision) -> None:
    """Replace the linears as it was decided, layer by layer; left factors that were not fitted yet are, if they should.

    The weight of a replaced linear is freed, so that the model never grows by more than a layer.
    """
    members: dict[int, list[Target]] = {layer: [] for layer in range(len(decoder(run.model).layers))}
    for target in plan.ranks:
        members[target.layer].append(target)
    ranks = [(target.layer, decision.ranks.get(target.name, DENSE)) for target in plan.ranks]
    all_stored = all(f"module-{name}" in run.state.files for name in decision.ranks)
    fitted = fitted_layers(ranks, decision.removed) if decision.fitted and not all_stored else range(0)
    refit = Refit(run.model, run.batches, fitted, run.config.sweep_dtype, run.scratch, run.processes)
    reports: dict[Target, ModuleReport] = {}
    for layer, linears in members.items():
        stored = stored_replacements(run.state, linears)
        chosen = stored or {target: _decided(run, target, decision) for target in linears}
        modules = {target: module for target, (module, _) in chosen.items() if module is not None}
        run.clock.enter("refit")
        refit.replace_(layer, modules, is_fitted=stored is not None, is_removed=layer in decision.removed)
        if stored is None:
            store(run, chosen, "second")
        settle_(run, modules)
        return_freed_memory()
        reports |= {target: report for target, (_, report) in chosen.items()}
        run.progress("refit", layer + 1, len(members))
    work.reports.extend(reports[target] for target in plan.ranks)


def _decided(run: Run, target: Target, decision: Decision) -> Replacement:
    """What the decision puts in the place of a linear."""
    if target.layer in decision.removed:
        return skip(target, LAYER_REMOVED)
    selection = read_selection(run.state, run.state.files[f"second-{target.name}"])
    return replacement(run.state, target, selection, decision.ranks.get(target.name, DENSE))


def _cut(run: Run, plan: Plan, prefix: Prefix, members: Sequence[Target]) -> None:
    """Spend the first share of the budget: write the low-rank linears of the model that is swept next."""
    if run.state.cut is not None:
        return
    selections = select(run, plan, prefix, members, "first")
    ranks = low_ranks(selections, plan, run.prices, FIRST_SHARE)

    def write(target: Target) -> str:
        module = low_rank(run.state, target, selections[target], ranks[target])
        if run.config.form == "pivoted":  # then it is no larger than the weight
            module.pivot_()
        return run.state.write(f"cut-{target.name}", module.state_dict())

    files: dict[str, str | None] = {f"first-{target.name}": None for target in members}
    for target, name in run.processes.map_divided(list(ranks), write):
        files[f"cut-{target.name}"] = name
    run.processes.wait_for_all()  # they may still read the files that are removed
    run.state.record(files, cut={target.name: rank for target, rank in ranks.items()})
