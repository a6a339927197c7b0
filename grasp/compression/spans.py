"""Score linears span by span, and write the singular groups that each of them can retain to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from grasp.compression.budget import Plan, ceilings
from grasp.compression.memory import projected_outputs
from grasp.compression.run import Run
from grasp.compression.selection import Extra, Selections, read_selection, write_groups
from grasp.compression.span_plan import PlannedSpan
from grasp.environment import return_freed_memory
from grasp.method.basis import BASES
from grasp.method.metrics import METRICS
from grasp.model.dense import dense_weight
from grasp.model.hooks import replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target, decoder
from grasp.progress import Progress
from grasp.statistics.scores import Score, Scores, gather_scores
from grasp.statistics.sweep import Prefix, propagate, sweep, sweep_name


def select(
    run: Run, plan: Plan, prefix: Prefix, members: Sequence[Target], stem: str, *, extra: Extra | None = None
) -> Selections:
    """Score the groups of some linears, and write the most important ones of each.

    They are scored on the model in its present state, once a first cut is stored with its low-rank linears. The spans
    are swept from the deepest to the lowest. The sums of a span are freed before the next is swept. What an interrupted
    run has written is not computed again.

    Args:
        run: its ``state`` gets the files.
        plan: with the largest rank of each linear.
        prefix: with the hidden states at the input of the lowest layer of ``members``.
        members: linears of one or more layers.
        stem: of the names of the files.
        extra: tensors that the file of a linear has beside its groups.

    Raises:
        OutOfMemoryError: if the memory does not suffice; the message has the least that does.
    """
    if any(f"{stem}-{target.name}" not in run.state.files for target in members):
        _write_all(run, ceilings(run.config, plan), prefix, members, stem, extra)
    return {target: read_selection(run.state, run.state.files[f"{stem}-{target.name}"]) for target in members}


def _write_all(
    run: Run,
    ranks: Mapping[Target, int],
    prefix: Prefix,
    members: Sequence[Target],
    stem: str,
    extra: Extra | None,
) -> None:
    rest = [target for target in members if f"{stem}-{target.name}" not in run.state.files]
    entry, done = min(target.layer for target in members), len(members) - len(rest)
    layers = range(min(target.layer for target in rest), len(decoder(run.model).layers))
    spans = run.memory.spans(rest, layers, run.state.cut)
    prefix = replace(prefix, hidden={entry: prefix.hidden[entry]}, grads={})

    def running(layers: range) -> AbstractContextManager[None]:
        return replaced(run.model, _first_cut(run, layers))

    def write(scores: dict[Target, Score], target: Target, weight: Tensor) -> str:
        score = scores.pop(target, None)  # its sums are freed here
        names = run.state, f"{stem}-{target.name}", target
        return write_groups(*names, weight, score, ranks[target], run.config, extra)

    # A study's substitute knows the dense model only, and no covariances.
    gather = run.gather if run.state.cut is None and extra is None and not run.narrowed else gather_scores
    run.clock.enter("prefix")
    for lower, upper in pairwise(sorted({entry, *(span.layers.start for span in spans)})):
        with run.processes.fail_together(), running(range(lower, upper)):
            prefix.hidden[upper] = propagate(prefix, range(lower, upper), prefix.hidden[lower])
        run.progress("hidden states", upper - entry, spans[0].layers.start - entry)
    parts = [(span, part) for span in spans for part in span.parts]
    for index, (span, part) in enumerate(parts):
        run.clock.enter("attribution")
        return_freed_memory()
        with running(span.layers):
            progress = _progress(run, sweep_name(rest), index, len(parts))
            scores = _score(run, prefix, span, part, gather, progress)
        run.clock.enter("svd and selection")
        for target, name in run.processes.map_divided(
            part, partial(write, scores), fetch=lambda target: dense_weight(target.module)
        ):
            done += 1
            return_freed_memory()
            run.state.record({f"{stem}-{target.name}": name}, soon=done < len(members))
            run.progress("decompositions", done, len(members))
        if part is span.parts[-1]:
            prefix.grads.pop(span.layers.stop, None)
            del prefix.hidden[span.layers.start]


def _score(
    run: Run,
    prefix: Prefix,
    span: PlannedSpan,
    part: Sequence[Target],
    gather: Callable[..., Scores],
    progress: Progress | None,
) -> dict[Target, Score]:
    """Sweep a span; the scores of the linears that this process decomposes."""
    if not part:
        takes_gradients = BASES[run.config.basis].inputs or METRICS[run.config.metric].moment != "none"
        if span.layers.start > min(prefix.hidden) and takes_gradients:
            with run.processes.fail_together():
                sweep(prefix, (), lambda call: None, layers=span.layers)
        return {}
    scores = gather(
        *(prefix, part),
        layers=span.layers,
        basis=run.config.basis,
        metric=run.config.metric,
        projected=projected_outputs(part, run.config),
        progress=run.progress if progress is None else progress,
        state=run.state if progress is None else None,  # the sums of a part of a sweep are not stored
        processes=run.processes,
    )
    own = [target for index, target in enumerate(part) if run.processes.owner(index) == run.processes.rank]
    return {target: scores[target] for target in own if target in scores}


def _progress(run: Run, sweep: str, index: int, parts: int) -> Progress | None:
    """Counts the batches of all parts of a sweep as one step; ``None`` if there is one part."""
    if parts == 1:
        return None

    def progress(step: str, done: int, total: int) -> None:
        kind, comma, _ = step.partition(", ")
        run.progress(f"{kind}, {sweep}" if comma else sweep, index * total + done, parts * total)

    return progress


def _first_cut(run: Run, layers: range) -> dict[str, LowRankLinear]:
    """The stored low-rank linears of a first cut in some layers, by path."""
    files = {target: run.state.files.get(f"cut-{target.name}") for layer in layers for target in run.targets[layer]}
    return {
        target.name: LowRankLinear.from_factors(target.module, run.state.read(file)[0])
        for target, file in files.items()
        if file is not None
    }
