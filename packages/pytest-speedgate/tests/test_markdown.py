from __future__ import annotations

from speedgate import markdown, verdicts
from speedgate.verdicts import Document, Entry, Where


def entry(ratio: float, label: str) -> Entry:
    return Entry(label, "a | b", (ratio * 1e-4,) * 20, (1e-4,) * 20)


def test_a_comparison_is_a_table_with_the_worst_first() -> None:
    here = Where("cpu", "AMD EPYC", 1)
    before = {name: entry(1, name) for name in "abc"}
    now = {"a": entry(1, "a"), "b": entry(1.3, "b"), "d": entry(1, "d")}
    text = markdown.comparison_text(verdicts.compare(Document(here, before), Document(here, now)), "yesterday")
    assert (
        text
        == """\
### Speed: slower

| verdict | benchmark | measure | before | now | change | 99 % interval |
| --- | --- | --- | --- | --- | --- | --- |
| ❌ regression | b | time over a \\| b | 1.000 | 1.300 (130.00 µs / 100.00 µs) | +30% | +30% to +30% |
| ✅ same | a | time over a \\| b | 1.000 | 1.000 (100.00 µs / 100.00 µs) | +0% | +0% to +0% |
| ❌ lost | c |  |  | not measured |  |  |
| ✅ new | d |  | not measured |  |  |  |

2 compared: 1 regression, 0 unclear, 0 better, 1 same; 1 lost, 1 new. Compared with yesterday.

"""
    )
