"""Tiles: which networks, and which of their rows, are computed together.

K networks have rows [S·B] each: of S slots B joint steps. Of S slots a network may have agents in the first few alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

Tile = tuple[slice, slice]
"""Which networks, which of their rows."""
ALL: Tile = slice(None), slice(None)


def slots_and_steps(rows: slice, of: int, steps: int) -> tuple[slice, slice]:
    """The slots, and of each the joint steps, that some rows are of: all steps of some slots, or some of one.

    of: how many rows there are, S·B.   steps: B.
    """
    start, stop, _ = rows.indices(of)
    first, offset = divmod(start, steps) if steps else (0, 0)
    if stop - start < steps:
        return slice(first, first + 1), slice(offset, offset + stop - start)
    return slice(first, max(1, stop // steps) if steps else 1), slice(0, steps)


def together(agents: Sequence[int], most: int, wasted: int) -> list[tuple[slice, int]]:
    """Runs of networks that are computed in one pass, and the largest number of agents among each.

    agents: of each network; all are computed as many times as the largest number of their run.   most: agents of a run
    so counted, but for a run of one network.   wasted: of these, the most that are not there.
    """
    runs: list[tuple[slice, int]] = []
    first, largest, there = 0, 0, 0
    for k, count in enumerate(agents):
        size = (k + 1 - first) * max(largest, count)
        if k > first and (size > most or size - there - count > wasted):
            runs.append((slice(first, k), largest))
            first, largest, there = k, 0, 0
        largest, there = max(largest, count), there + count
    return [*runs, (slice(first, len(agents)), largest)]


@lru_cache(maxsize=256)
def tiles(agents: tuple[int, ...], steps: int, wanted: int, wasted: int) -> list[list[Tile]]:
    """All rows that have agents, cut into tiles of about `wanted` rows: one list for each run of networks.

    wasted: rows without agents that are computed for the sake of fewer tiles, at most in each of them.
    """
    per_agent = max(1, steps)
    return [
        [(networks, rows) for rows in _rows(count, steps, wanted if networks.stop - networks.start == 1 else 0)]
        for networks, count in together(agents, wanted // per_agent, wasted // per_agent)
    ]


def _rows(slots: int, steps: int, wanted: int) -> Iterator[slice]:
    """The rows of some slots in tiles of about `wanted`, or in one if that is 0."""
    total = slots * steps
    parts = max(1, round(total / wanted)) if wanted else 1
    if parts <= slots:
        height = max(1, steps * math.ceil(slots / parts))
        starts = range(0, max(1, total), height)  # of no rows one empty tile, whose gradients are zero
        yield from (slice(row, min(row + height, total)) for row in starts)
        return
    height = math.ceil(steps / max(1, round(steps / wanted)))
    for first in range(0, total, steps):
        yield from (slice(first + row, first + min(row + height, steps)) for row in range(0, steps, height))
