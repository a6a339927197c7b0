"""The candidates that keep to a budget, and the one that loses least on the held-out batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from grasp.checkpoint.compression_report import COMPRESSED, DENSE
from grasp.checkpoint.run_state import Decision
from grasp.compression.budget import Plan, predicted_bytes, predicted_seconds, required_saving
from grasp.compression.candidates import (
    MEASURED_SEQUENCES,
    MEASURED_TOKENS,
    Candidate,
    candidates,
    fitted_layers,
    has_low_rank,
    only_removed,
)
from grasp.compression.linear_replacement import linear_replacement, with_map
from grasp.compression.measured_blocks import corrected, corrections
from grasp.compression.refit import Refit
from grasp.compression.run import Run
from grasp.compression.selection import (
    Replacement,
    Selections,
    replacement,
    stored_replacements,
    write_replacement,
)
from grasp.environment import return_freed_memory
from grasp.errors import NonFiniteError
from grasp.method import knapsack
from grasp.method.metrics import nats_per_score
from grasp.model.batch import excerpt
from grasp.model.layer_removal import can_remove
from grasp.model.targets import Target, decoder
from grasp.statistics.divergence import Reference, removal_divergences
from grasp.statistics.loss import mean_loss
from grasp.statistics.sweep import Prefix, capture_prefix, propagate, sum_nll_after

# After each removal so many layers, those that lost least before, are measured again. The losses of single layers
# nearly add up (docs/latency.md), so the next layer to go is among them; it takes 5 forward passes, not one per layer.
RETRIED = 4


def decide(run: Run, plan: Plan, selections: Selections) -> Decision:
    """Decide between all candidates of a global budget; without held-out batches, or where bits suffice, there is one.

    Low-rank linears are measured as decomposed, and the best of them also as fitted. Where layers are removed, a fit
    may lose more. What is measured is stored in the run as it comes, and what is fitted layer by layer.
    """
    run.clock.enter("candidates")
    tokens = sum(batch.num_tokens for batch in run.batches)
    nats = nats_per_score(run.config.metric, tokens)
    dense, losses = Candidate(DENSE, (), {}), dict[str, float]()
    if not run.held_out or plan.bits_suffice:
        (only,) = candidates(selections, plan, run.prices, {}, nats).values()
        if run.held_out:
            losses[DENSE] = mean_loss(run.model, run.held_out, processes=run.processes)
        return decision(run, only._replace(fitted=run.config.refit and not plan.bits_suffice), (dense,), losses)
    start = _start(run)
    reference = _reference(run)
    once, decomposed = run.state.once, selections
    factors = once("corrections", lambda: corrections(run, plan, decomposed, reference, nats))
    selections = corrected(decomposed, factors)
    removal = removal_losses(run, plan, reference)
    allocations = {
        name: candidate
        for name, candidate in candidates(selections, plan, run.prices, removal, nats).items()
        if can_remove(run.model, candidate.removed)
    }
    if run.narrowed:
        allocations = {(name := f"narrowed, {key}"): each._replace(name=name) for key, each in allocations.items()}
        others = whole_candidates(run)
    else:
        others = [*_layers_removed(run, plan, removal), *linear_replacement(run, plan)]
    options = [*allocations.values(), *(other for other in others if other.name not in allocations)]
    if not options:
        raise ValueError("no candidate keeps to the budget: ranks do not suffice, and too few layers can be removed")

    def measure(option: Candidate) -> None:
        value = once(f"loss, {option.name}", partial(_measured, run, start, selections, option))
        if math.isfinite(value):  # others are no candidates
            losses[option.name] = value

    def least(options: Sequence[Candidate]) -> Candidate | None:
        return min((option for option in options if option.name in losses), key=lambda o: losses[o.name], default=None)

    for done, option in enumerate((dense, *options), start=1):
        measure(option)
        run.progress("candidates, compared", done, len(options) + 1)
    best = least([option for option in options if has_low_rank(option.ranks.values())])
    if run.config.refit and best is not None:
        options.append(best._replace(name=f"{best.name}, fitted", fitted=True))
        measure(options[-1])
    if (chosen := least(options)) is None or DENSE not in losses:
        what = "the dense model" if chosen is not None else "every candidate"
        raise NonFiniteError(f"the held-out loss of {what} is NaN or infinite; load the model in bfloat16 or float32")
    return decision(run, chosen, (dense, *options), losses)


def compare_with_removal(run: Run, plan: Plan, scores: Sequence[float]) -> Decision:
    """What a uniform budget is compared with: the dense model, and the least influential layers removed instead."""
    dense = Candidate(DENSE, (), {})
    if not run.held_out:
        return decision(run, dense, (), {})
    options = [dense, *_layers_removed(run, plan, removed_in_order(run, plan, dict(enumerate(scores))))]
    start = _start(run)
    measure = partial(_measured, run, start, {})
    losses = {each.name: run.state.once(f"loss, {each.name}", partial(measure, each)) for each in options}
    return decision(run, dense, options, {name: loss for name, loss in losses.items() if math.isfinite(loss)})


def measure_whole(run: Run, plan: Plan, scores: Sequence[float]) -> None:
    """Measure the dense model, and it without layers, before MLPs lose channels; nothing if no batches are held out."""
    if not run.held_out or "whole" in run.state.measured:
        return
    start = _start(run)
    removed = removed_in_order(run, plan, {layer: scores[layer] for layer in plan.layers})
    others = [*_layers_removed(run, plan, removed), *linear_replacement(run, plan)]
    options = [Candidate(DENSE, (), {}), *others]
    for option in options:
        run.state.once(f"loss, {option.name}", partial(_measured, run, start, {}, option))
    run.state.record({"map": next((option.map for option in options if option.map), None)})
    run.state.once("whole", lambda: [[o.name, o.removed, o.map, *_costs(run, o)] for o in others])


def whole_candidates(run: Run) -> list[Candidate]:
    """The candidates of ``measure_whole`` but the dense model."""
    whole = run.state.measured.get("whole", ())
    return [Candidate(name, tuple(removed), {}, file, False, *known) for name, removed, file, *known in whole]


def result_loss(run: Run) -> dict[str, float]:
    """The loss of the compressed model, by its name.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    if not run.held_out:
        return {}
    loss = mean_loss(run.model, run.held_out, processes=run.processes)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss of the compressed model is {loss}; load the model in bfloat16 or float32"
        )
    return {COMPRESSED: loss}


def decision(run: Run, chosen: Candidate, options: Iterable[Candidate], losses: Mapping[str, float]) -> Decision:
    """The decision for one of some candidates, with the losses, the bytes and the predicted time of those measured."""
    costs = {option.name: _costs(run, option) for option in options if option.name in losses}
    return Decision(
        chosen.removed,
        {target.name: rank for target, rank in chosen.ranks.items()},
        losses,
        {name: size for name, (size, _) in costs.items()},
        {name: seconds for name, (_, seconds) in costs.items() if seconds is not None},
        chosen.map,
        chosen.fitted,
        whole=bool(chosen.size),
    )


def _costs(run: Run, option: Candidate) -> tuple[int, float | None]:
    """The bytes of all weights, and the predicted time to decode a token; ``None`` without costs."""
    if option.name == DENSE:
        return run.before.bytes, None if run.costs is None else run.dense_seconds
    if option.size:
        return option.size, option.seconds
    of = run.targets, {target.name: rank for target, rank in option.ranks.items()}, option.removed
    seconds = None if run.costs is None else predicted_seconds(run.config, run.costs, *of)
    return predicted_bytes(run.config, run.model, *of), seconds


def removal_losses(run: Run, plan: Plan, reference: Reference | None = None) -> dict[int, float]:
    """``removed_in_order`` by the divergence without each layer from the model as it is: whole, or narrowed.

    It is measured once, beside the ``reference``, which is computed if it is not given; {} if no batches are held out.
    """

    def measure() -> list[tuple[int, float]]:
        beside = _reference(run) if reference is None else reference
        alone = removal_divergences(beside, plan.layers, progress=run.progress)
        return list(removed_in_order(run, plan, alone, beside).items())

    name = "removal, narrowed" if run.narrowed else "removal"
    return dict(run.state.once(name, measure)) if run.held_out else {}


def _reference(run: Run) -> Reference:
    """The model as it is, on a few of the held-out tokens."""
    few = excerpt(run.held_out, sequences=MEASURED_SEQUENCES, tokens=MEASURED_TOKENS, parts=run.processes.size)
    return Reference.of(run.model, few, scratch=run.scratch, processes=run.processes)


def removed_in_order(
    run: Run, plan: Plan, losses: Mapping[int, float], reference: Reference | None = None
) -> dict[int, float]:
    """The layers that go one after the other until the budget is met or no other can go, and what each loses then.

    Args:
        losses: for each layer that may go, what removing it alone loses, or another score to go by.
        reference: after each removal ``RETRIED`` of the next layers are measured again beside it; ``None`` for none.
            After as many forward passes as there are ``losses`` the rest goes by what is known.
    """
    saving, left, passes = required_saving(run.prices, plan), dict(losses), len(losses)
    removed: dict[int, float] = {}
    while _saved(run, removed) < saving:
        order = sorted(left, key=left.__getitem__)
        if reference is not None and removed and passes > 0:
            passes -= len(order[:RETRIED]) + 1
            left |= removal_divergences(reference, order[:RETRIED], [*removed])
            order[:RETRIED] = sorted(order[:RETRIED], key=left.__getitem__)
        layer = next((layer for layer in order if can_remove(run.model, [*removed, layer])), None)
        if layer is None:
            break
        removed[layer] = left.pop(layer)
        if reference is not None:
            run.progress(
                "candidates, without several layers", min(100, round(100 * _saved(run, removed) / saving)), 100
            )
    return removed


def _saved(run: Run, removed: Iterable[int]) -> float:
    return sum(map(run.prices.layer, removed))


def _layers_removed(run: Run, plan: Plan, removed: Collection[int]) -> list[Candidate]:
    """Everything but these layers stays dense; no candidate if that does not meet the budget."""
    meets = removed and _saved(run, removed) >= required_saving(run.prices, plan)
    return [only_removed(removed)] if meets else []


def _start(run: Run) -> Prefix:
    """The held-out batches of this process, at layer 0."""
    with run.processes.fail_together():
        return capture_prefix(run.model, run.processes.local_batches(run.held_out), {0}, scratch=run.scratch)


def _measured(run: Run, start: Prefix, selections: Selections, candidate: Candidate) -> float:
    """The mean loss on the held-out batches, in nats per token; the model is left as it was.

    The batches pass one layer after the other, so the factors of one layer are in memory at a time.

    Args:
        start: the held-out batches of this process, at layer 0.
        candidate: what is measured; if it is fitted, that is done first, and stored.
    """
    model, hidden, removed = run.model, start.hidden[0], candidate.removed
    ranks = [(target.layer, rank) for target, rank in candidate.ranks.items()]
    fitted = fitted_layers(ranks, removed) if candidate.fitted else range(0)
    refit = Refit(model, run.batches, fitted, run.config.sweep_dtype, run.scratch, run.processes)
    for layer in range(len(decoder(model).layers)):
        present = [target for target in selections if target.layer == layer]
        stored = stored_replacements(run.state, present) if candidate.fitted else None
        chosen = stored or {
            target: replacement(run.state, target, selections[target], candidate.ranks.get(target, knapsack.DENSE))
            for target in present
        }
        modules = {target: module for target, (module, _) in chosen.items() if module is not None}
        mapped = bool(candidate.map) and layer == removed[0] - 1
        try:
            refit.replace_(layer, modules, is_fitted=stored is not None, is_removed=layer in removed)
            if candidate.fitted and layer not in removed and stored is None:
                store(run, chosen)
            with run.processes.fail_together(), with_map(run, candidate.map, layer) if mapped else nullcontext():
                hidden = hidden if layer in removed else propagate(start, range(layer, layer + 1), hidden)
        finally:
            for target in modules:
                model.set_submodule(target.name, target.module)
            return_freed_memory()
    total = torch.zeros(1, dtype=torch.float64)
    with run.processes.fail_together():
        total += sum_nll_after(start, hidden)
    run.processes.sum_([total])
    return float(total) / sum(batch.num_targets for batch in run.held_out)


def store(run: Run, chosen: Mapping[Target, Replacement], instead_of: str | None = None) -> None:
    """Store what takes the place of some linears, of which processes have equal copies.

    Args:
        run: the run.
        chosen: by linear.
        instead_of: the first part of the names of the files that it was made from. They are removed.
    """
    files: dict[str, str | None] = {f"{instead_of}-{target.name}": None for target in chosen if instead_of}
    written = run.processes.map_divided(list(chosen), lambda t: write_replacement(run.state, t, chosen[t]))
    files |= {f"module-{target.name}": name for target, name in written}
    run.processes.wait_for_all()  # they may still read the files that are removed
    run.state.record(files)
