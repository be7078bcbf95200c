"""What is to be seen of demonstrations before anybody learns from them, type by type."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from rich.table import Table
from rich.text import Text

from bm3il.launch.surroundings import screen
from bm3il.protocol.demonstrations import Demonstrations

LISTED = 6
"""Actions that are listed, the most frequent first."""


def print_types(demonstrations: Demonstrations) -> None:
    """Of each type: when its agents take part, what they do how often, and whose episodes are copies of others."""
    table = Table("type", "takes part", "steps", "from step", "to step", "actions", "copies")
    firsts = np.cumsum(demonstrations.episode_lengths)[:-1]
    for m, t in enumerate(demonstrations.spec.types):
        active, actions = demonstrations.active[m], demonstrations.actions[m]
        lives = np.array([life for episode in np.split(active, firsts) for life in _lives(episode)]).reshape(-1, 3)
        copies = demonstrations.num_episodes - len(_digests(demonstrations, m))
        table.add_row(
            Text(t.name),  # no markup: a type may be called [bus]
            f"{len(lives)} of {demonstrations.num_episodes * t.count}",
            *(_range(lives[:, column]) for column in (2, 0, 1)),
            _frequencies(actions[active]) if t.discrete else _spread(actions[active]),
            f"{copies} of {demonstrations.num_episodes} episodes" if copies else "none",
        )
    console = screen()
    console.print(table)
    console.print("Steps are counted from 0, of each agent in each episode: least, median and most.", soft_wrap=True)


def _lives(active: np.ndarray) -> list[tuple[int, int, int]]:
    """First and last active step, and the number of active ones, of each agent that there is in an episode."""
    there = np.flatnonzero(active.any(axis=0))
    last = len(active) - 1 - active[::-1].argmax(axis=0)
    return [(int(active[:, x].argmax()), int(last[x]), int(active[:, x].sum())) for x in there]


def _range(values: np.ndarray) -> str:
    if not values.size:
        return "–"
    least, most = values.min(), values.max()
    return f"{least}" if least == most else f"{least}–{np.median(values):g}–{most}"


def _frequencies(actions: np.ndarray) -> str:
    """Shares of the most frequent actions."""
    counts = Counter(actions.tolist())
    told = [f"{action}: {100 * count / len(actions):.0f}%" for action, count in counts.most_common(LISTED)]
    rest = len(counts) - LISTED
    return ", ".join(told) + (f", {rest} others" if rest > 0 else "")


def _spread(actions: np.ndarray) -> str:
    """Mean and standard deviation of each number of an action."""
    numbers = zip(actions.mean(axis=0), actions.std(axis=0), strict=True) if len(actions) else ()
    told = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in numbers]
    return ", ".join(told[:LISTED]) + (f", {len(told) - LISTED} others" if len(told) > LISTED else "")


def _digests(demonstrations: Demonstrations, m: int) -> set[bytes]:
    """One for each different episode, by what the agents of a type saw and did."""
    spec = demonstrations.spec
    b = next(b for b, types in enumerate(spec.blocks) if m in types)
    first = sum(spec.types[other].count for other in spec.blocks[b] if other < m)
    agents = slice(first, first + spec.types[m].count)
    ends = np.cumsum(demonstrations.episode_lengths).tolist()
    digests = [hashlib.blake2b() for _ in ends]
    for name, array in demonstrations.arrays.items():
        if name.startswith(f"{b}."):
            # What all agents see is stored once, without an axis of agents.
            mine = array if name == f"{b}.shared" else array[:, agents]
            for digest, rows in zip(digests, np.split(mine, ends[:-1]), strict=True):
                digest.update(rows.tobytes())
    return {digest.digest() for digest in digests}
