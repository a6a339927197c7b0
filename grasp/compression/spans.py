"""Score linears span by span, and write the singular groups that each of them can retain to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from grasp.compression.run import Run
from grasp.compression.selection import Extra, Selections, read_selection, write_groups
from grasp.compression.span_plan import PlannedSpan
from grasp.environment import return_freed_memory
from grasp.model.dense import dense_weight
from grasp.model.targets import Target
from grasp.progress import Progress
from grasp.statistics.scores import Score, Scores, gather_scores
from grasp.statistics.sweep import Prefix, propagate, sweep, sweep_name

StandIn = Callable[[range], AbstractContextManager[object]]  # puts modules in the place of linears of some layers


class Selector:
    """Selects the most important singular groups of linears.

    Args:
        run: its ``state`` gets the files.
        ranks: the largest rank of each linear.
        prefix: with the hidden states at the input of the lowest layer of any selection.
    """

    def __init__(self, run: Run, ranks: Mapping[Target, int], prefix: Prefix) -> None:
        self._run, self._ranks, self._prefix = run, ranks, prefix

    def select(
        self,
        members: Sequence[Target],
        stem: str,
        *,
        ranks: Mapping[str, int] | None = None,
        stand_in: StandIn | None = None,
        extra: Extra | None = None,
    ) -> Selections:
        """Score the groups of some linears on the model in its present state; write the most important ones of each.

        The spans are swept from the deepest to the lowest. The sums of a span are freed before the next is swept. What
        an interrupted run has written is not computed again.

        Args:
            members: linears of one or more layers.
            stem: of the names of the files.
            ranks: ranks of the modules that stand in for dense linears, by path.
            stand_in: puts these modules in the place of some layers' linears while these layers run.
            extra: tensors that the file of a linear has beside its groups.
        """
        state = self._run.state
        rest = [target for target in members if f"{stem}-{target.name}" not in state.files]
        if rest:
            entry = min(target.layer for target in members)
            self._write_all(rest, entry, len(members), stem, ranks, stand_in, extra)
        return {target: read_selection(state, state.files[f"{stem}-{target.name}"]) for target in members}

    def _write_all(
        self,
        rest: Sequence[Target],
        entry: int,
        total: int,
        stem: str,
        ranks: Mapping[str, int] | None,
        stand_in: StandIn | None,
        extra: Extra | None,
    ) -> None:
        run, done = self._run, total - len(rest)
        spans = run.spans(rest, ranks)
        prefix = replace(self._prefix, hidden={entry: self._prefix.hidden[entry]}, grads={})
        running = nullcontext if stand_in is None else stand_in
        # A study's substitute knows the dense model only, and no covariances.
        gather = run.gather if stand_in is None and extra is None and not run.narrowed else gather_scores
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
                scores = self._score(prefix, span, part, gather, self._progress(sweep_name(rest), index, len(parts)))
            run.clock.enter("svd and selection")
            for target, name in run.processes.map_divided(
                part, partial(self._write, stem, scores, extra), fetch=lambda target: dense_weight(target.module)
            ):
                done += 1
                return_freed_memory()
                run.state.record({f"{stem}-{target.name}": name}, soon=done < total)
                run.progress("decompositions", done, total)
            if part is span.parts[-1]:
                prefix.grads.pop(span.layers.stop, None)
                del prefix.hidden[span.layers.start]

    def _score(
        self,
        prefix: Prefix,
        span: PlannedSpan,
        part: Sequence[Target],
        gather: Callable[..., Scores],
        progress: Progress | None,
    ) -> dict[Target, Score]:
        """Sweep a span; the scores of the linears that this process decomposes."""
        run = self._run
        if not part:
            if span.layers.start > min(prefix.hidden):
                with run.processes.fail_together():
                    sweep(prefix, (), lambda call: None, layers=span.layers)
            return {}
        scores = gather(
            *(prefix, part),
            layers=span.layers,
            basis=run.config.basis,
            metric=run.config.metric,
            progress=run.progress if progress is None else progress,
            state=run.state if progress is None else None,  # the sums of a part of a sweep are not stored
            processes=run.processes,
        )
        own = [target for index, target in enumerate(part) if run.processes.owner(index) == run.processes.rank]
        return {target: scores[target] for target in own if target in scores}

    def _progress(self, sweep: str, index: int, parts: int) -> Progress | None:
        """Counts the batches of all parts of a sweep as one step; ``None`` if there is one part."""
        if parts == 1:
            return None

        def progress(step: str, done: int, total: int) -> None:
            kind, comma, _ = step.partition(", ")
            self._run.progress(f"{kind}, {sweep}" if comma else sweep, index * total + done, parts * total)

        return progress

    def _write(
        self, stem: str, scores: dict[Target, Score], extra: Extra | None, target: Target, weight: Tensor
    ) -> str:
        run, rank = self._run, self._ranks[target]
        score = scores.pop(target, None)  # its sums are freed here
        return write_groups(run.state, f"{stem}-{target.name}", target, weight, score, rank, run.config, extra)
