"""The two strategies: decide sweep by sweep, each on the model so far, or decide on all linears together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from grasp.checkpoint.compression_report import ModuleReport
from grasp.checkpoint.run_state import Decision
from grasp.compression.budget import Plan, ceilings
from grasp.compression.candidates import Candidate, candidates, first_cut, held_out_losses, truncate
from grasp.compression.run import Run
from grasp.compression.selection import Selection, Selections, replace_, select_groups
from grasp.method.metrics import nats_per_score
from grasp.method.schedules import plan_sweeps
from grasp.model.dense import temporary_low_rank
from grasp.model.targets import Target
from grasp.statistics.layer_losses import removal_losses
from grasp.statistics.scores import Scores, gather_scores
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
        restored = run.state.restore_(run.model, sweeps)
    sweeps = [rest for sweep in sweeps if (rest := [target for target in sweep if target not in restored])]
    if run.state.decision:  # it decided on all linears; the ones that were not restored stay dense
        sweeps = []
    entries = {min(target.layer for target in sweep) for sweep in sweeps}
    batches = run.processes.local_batches(run.calibration)
    with run.processes.fail_together():
        prefix = capture_prefix(run.model, batches, entries, dtype=run.config.sweep_dtype, progress=run.progress)
    return Work(list(restored.values()), sweeps, prefix)


def decide_in_order_(run: Run, plan: Plan, work: Work) -> Decision:
    """Replace the linears of one sweep after the other; each sweep runs on the model so far (arXiv 2501.00339)."""
    for members in work.sweeps:
        for target, selection in _select(run, plan, work, members, run.gather, state=run.state):
            work.reports.append(replace_(run.model, target, selection))
            with run.processes.fail_together():  # nobody replaces the sums of this sweep before all linears are stored
                run.state.store_module(run.model, work.reports[-1])
    return Decision((), {})


def decide_globally_(run: Run, plan: Plan, work: Work) -> Decision:
    """Score all linears, spend one budget over all of them, then replace them."""
    decision = run.state.decision or Decision((), {})
    for members in work.sweeps:  # one; none if nothing is left to decide
        select = _select_progressively if run.config.schedule == "progressive" else _select_at_once
        selections = select(run, plan, work, members)
        candidate, losses = _choose_candidate(run, plan, selections)
        for target, selection in truncate(selections, candidate).items():
            work.reports.append(replace_(run.model, target, selection))
        decision = Decision(candidate.removed, losses)
        run.state.store_decision(run.model, decision, work.reports)
    return decision


def _select_at_once(run: Run, plan: Plan, work: Work, members: Sequence[Target]) -> Selections:
    """Select the groups on the dense model."""
    return dict(_select(run, plan, work, members, run.gather, state=run.state))


def _select_progressively(run: Run, plan: Plan, work: Work, members: Sequence[Target]) -> Selections:
    """Select the groups on the model as it is with the first share of the budget spent."""
    with run.processes.fail_together():
        cut = run.state.restore_cut(members)
    if cut is None:
        cut = first_cut(_select_at_once(run, plan, work, members), plan, run.prices)
        run.state.store_cut(cut)
    running = partial(temporary_low_rank, [(target.module, svd) for target, svd in cut.items()])
    return dict(_select(run, plan, work, members, gather_scores, running=running))


def _select(
    run: Run,
    plan: Plan,
    work: Work,
    members: Sequence[Target],
    gather: Callable[..., Scores],
    **options: object,
) -> Iterator[tuple[Target, Selection]]:
    """Score the groups of some linears in one sweep or two, and retain the most important ones of each."""
    run.clock.enter("attribution")
    scores = gather(
        *(work.prefix, members),
        basis=run.config.basis,
        metric=run.config.metric,
        progress=run.progress,
        processes=run.processes,
        **options,
    )
    run.clock.enter("svd and selection")
    select = partial(select_groups, scores=scores, ranks=ceilings(run.config, plan), config=run.config)
    return run.processes.map_divided(members, select, Selection)


def _choose_candidate(run: Run, plan: Plan, selections: Selections) -> tuple[Candidate, dict[str, float]]:
    """The candidate with the lowest loss on the held-out batches, and all their losses; the only one without any."""
    removal: dict[int, float] = {}
    if run.removable:
        removal = removal_losses(
            *(run.model, run.removable, run.held_out), progress=run.progress, processes=run.processes
        )
        del removal[max(removal, key=removal.__getitem__)]  # one layer has to stay
    tokens = sum(batch.num_tokens for batch in run.calibration)
    nats = nats_per_score(run.config.basis, run.config.metric, tokens)
    options = candidates(selections, plan, run.config.scope, run.prices, removal, nats)
    losses: dict[str, float] = {}
    if run.held_out:
        losses = held_out_losses(run.model, selections, options, run.held_out, run.processes)
    return options[min(losses, key=losses.__getitem__, default=next(iter(options)))], losses
