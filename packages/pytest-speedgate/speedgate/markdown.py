"""Results as tables of markdown, for the summary of a workflow and for a comment on a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from speedgate.selftest import SelfTest
from speedgate.verdicts import Change, Comparison, microseconds

GOOD = ("better", "same", "new", "caught")
SIGNS = {**dict.fromkeys(GOOD, "✅"), "unclear": "❔"}


def comparison_text(result: Comparison, baseline: str) -> str:
    """The comparison with ``baseline`` as a table, the worst change first."""
    rows = [
        (
            change.verdict,
            change.label,
            change.what,
            change.show(change.before),
            change.show(change.now) + _times(change),
            f"{change.change:+.0%}",
            change.range,
        )
        for change in result.worst_first
    ]
    rows += [("lost", label, "", "", "not measured", "", "") for label in result.lost]
    rows += [("new", label, "", "not measured", "", "", "") for label in result.new]
    headings = ("verdict", "benchmark", "measure", "before", "now", "change", "99 % interval")
    title = "slower" if result.failed else "not slower"
    return f"### Speed: {title}\n\n{_table(headings, rows)}\n{result.tally}. Compared with {baseline}.\n\n"


def selftest_text(result: SelfTest) -> str:
    """The trials of a self-test as a table."""
    rows = [
        (
            trial.verdict,
            trial.label,
            f"{trial.slowed.change:+.0%} ({trial.slowed.range})",
            f"{trial.unchanged.change:+.0%} ({trial.unchanged.range})",
        )
        for trial in result.trials
    ]
    return f"### Sensitivity\n\n{_table(('verdict', 'benchmark', 'slowed', 'unchanged'), rows)}\n{result.tally}.\n\n"


def _times(change: Change) -> str:
    """The median times of which a ratio is made."""
    times = " / ".join(map(microseconds, change.times))
    return f" ({times})" if change.measure == "ratio" else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marked = [(f"{SIGNS.get(verdict, '❌')} {verdict}", *cells) for verdict, *cells in rows]
    lines = [headings, ["---"] * len(headings), *marked]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)
