"""What `benchmarks/adapters_learning.py` calls wrong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from adapters_learning import CLONE, MOST_SECONDS, RANDOM, Ended, faults

GOOD = {
    RANDOM: [Ended(9.0, 100, {"prey": ((0.0, 0.05), (0.3, 0.05)), "hunter": ((-0.1, 0.05), (0.8, 0.05))})] * 3,
    CLONE: [Ended(9.0, 100, {"prey": ((0.9, 0.05), (0.9, 0.05)), "hunter": ((0.7, 0.05), (0.8, 0.05))})] * 3,
}


def test_all_is_well_where_all_types_learn() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("start", "returns", "text"),
    [
        (RANDOM, ((0.0, 0.05), (0.1, 0.05)), "prey: .* is not clearly better"),
        (CLONE, ((0.1, 0.05), (0.06, 0.05)), "prey: .* is no better than random"),
        (CLONE, ((1.1, 0.05), (0.8, 0.05)), "prey: .* worse than the clone"),
    ],
)
def test_one_seed_and_one_type_that_do_not_learn_are_told(
    start: str, returns: tuple[tuple[float, float], tuple[float, float]], text: str
) -> None:
    run = GOOD[start][0]
    worse = replace(run, types=run.types | {"prey": returns})
    found = faults(GOOD | {start: [worse, run, run]})
    assert len(found) == 1
    assert re.search(text, found[0])


def test_a_run_that_takes_too_long_is_told() -> None:
    (told,) = faults(GOOD | {CLONE: [*GOOD[CLONE], replace(GOOD[CLONE][0], seconds=MOST_SECONDS + 1)]})
    assert "seconds of processors" in told
