from __future__ import annotations

import itertools

from tests.pairwise import label, pairwise

AXES = {"rows": (33, 7, 1, 0), "rank": (1, 5, 8), "bias": (True, False), "layout": ("a", "b", "c")}


def test_every_pair_of_values_occurs() -> None:
    cases = pairwise(**AXES)
    for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2):
        occurring = {(case[a], case[b]) for case in cases}
        assert occurring == set(itertools.product(values_a, values_b))


def test_far_fewer_cases_than_the_product() -> None:
    assert 12 <= len(pairwise(**AXES)) <= 18  # of 72


def test_cases_are_always_the_same_and_have_every_axis() -> None:
    assert pairwise(**AXES) == pairwise(**AXES)
    assert all(tuple(case) == tuple(AXES) for case in pairwise(**AXES))


def test_labels_differ() -> None:
    cases = pairwise(**AXES)
    assert len({label(case) for case in cases}) == len(cases)
