"""Tiles hold every row of every agent once, and few rows of nobody."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.protocol.networks.tiles import slots_and_steps, tiles, together

counts = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


@settings(max_examples=200, deadline=None)
@given(counts, st.integers(0, 7), st.integers(1, 60), st.integers(0, 30))
def test_every_agents_rows_are_in_one_tile(agents: tuple[int, ...], steps: int, wanted: int, wasted: int) -> None:
    slots = max(agents)
    seen = torch.zeros(len(agents), slots * steps, dtype=torch.int64)
    first = 0
    for run in tiles(agents, steps, wanted, wasted):
        networks = run[0][0]
        assert networks.start == first
        first = networks.stop
        for number, (same, rows) in enumerate(run):
            assert same == networks
            assert (rows.start == 0) == (number == 0)  # a network's first tile writes what the others add to
            assert rows.stop <= slots * steps
            seen[networks, rows] += 1
            of_slots, of_steps = slots_and_steps(rows, slots * steps, steps)
            height = (of_slots.stop - of_slots.start) * (of_steps.stop - of_steps.start)
            assert height == rows.stop - rows.start
            assert rows.start == of_slots.start * steps + of_steps.start
            if networks.stop - networks.start > 1:
                assert height * (networks.stop - networks.start) <= wanted
                nobody = height * (networks.stop - networks.start) - steps * sum(agents[networks])
                assert nobody <= wasted
            else:
                assert height <= max(2 * wanted, steps) or height <= 2 * steps
    assert first == len(agents)
    there = (torch.arange(slots) < torch.tensor(agents).unsqueeze(1)).repeat_interleave(steps, dim=1)
    assert (seen[there] == 1).all()
    assert (seen <= 1).all()


def test_networks_go_together_as_long_as_little_is_wasted() -> None:
    assert together((5, 5, 5, 5), 10, 0) == [(slice(0, 2), 5), (slice(2, 4), 5)]
    assert together((5, 4, 2, 2), 100, 1) == [(slice(0, 2), 5), (slice(2, 4), 2)]
    assert together((5, 4, 2, 2), 100, 7) == [(slice(0, 4), 5)]
    assert together((9, 9), 1, 0) == [(slice(0, 1), 9), (slice(1, 2), 9)]
