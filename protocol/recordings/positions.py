"""From where agents were to what they saw and did, by an environment that can tell (`environment.TellsActions`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bm3il.protocol.environment import AMBIGUOUS, IMPOSSIBLE, Environment, TellsActions
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.trajectories import Trajectories, columns_of


@dataclass(frozen=True)
class Retraced:
    """What an environment made of positions.

    impossible, ambiguous: transitions that none or several of its actions could have made; their agents are inactive
        in these steps.
    """

    trajectories: Trajectories
    impossible: int
    ambiguous: int

    @property
    def left_out(self) -> list[str]:
        """In words, if anything is."""
        found = (self.impossible, "no action makes"), (self.ambiguous, "several actions could have made")
        return [f"transitions that {what}, left out: {count}" for count, what in found if count]


def teller(environment: Environment) -> TellsActions | None:
    """The environment itself, without what shakes its actions, if it can tell them; else None."""
    inner = unperturbed(environment)
    return inner if isinstance(inner, TellsActions) else None


def retraced(environment: Environment, episodes: Sequence[Sequence[np.ndarray]]) -> Retraced:
    """Trajectories from the positions of all agents.

    environment: of one copy.   episodes: per episode and type, positions [T+1, X_m, D_m] at the beginning and after
    each of its T steps, NaN where the agent is not there.
    Raises InputError if the environment cannot tell, or for a place where nobody can be.
    """
    spec, tells = environment.spec, teller(environment)
    if tells is None:
        raise InputError(f"'{spec.name}' does not tell which action leads from one place to the next: record actions")
    played = Trajectories.zeros(spec, len(episodes))
    counts = np.zeros(2, np.int64)
    for e, positions in enumerate(episodes):
        played.lengths[e] = len(positions[0]) - 1
        played.truncated[played.lengths[e] - 1, e] = True
        environment.reset(0)
        counts += _retrace(tells, positions, played, e)
    return Retraced(Trajectories.from_arrays(played.arrays, spec), *counts.tolist())


def _retrace(tells: TellsActions, positions: Sequence[np.ndarray], played: Trajectories, e: int) -> np.ndarray:
    """Write episode number e; how many of its transitions are impossible, and ambiguous."""
    spec, last = played.spec, int(played.lengths[e])
    there = [~np.isnan(places).any(axis=2) for places in positions]
    counts = np.zeros(2, np.int64)
    for t in range(last + 1):
        now = tells.show_at([places[t][None] for places in positions], t)
        for b, seen in enumerate(now.seen(spec)):
            for name, column in columns_of(played.arrays, b).items():
                column[t, e] = seen.columns[name][0]
        if t:
            for m, rewards in enumerate(now.rewards):
                played.rewards[m][t - 1, e] = rewards[0]
        if t == last:
            break
        for m, actions in enumerate(tells.actions_to([places[t + 1][None] for places in positions])):
            known = there[m][t] & there[m][t + 1]
            played.active[m][t, e] = known & (actions[0] >= 0)
            played.actions[m][t, e] = np.where(played.active[m][t, e], actions[0], 0)
            counts += [int((known & (actions[0] == what)).sum()) for what in (IMPOSSIBLE, AMBIGUOUS)]
    for m, present in enumerate(there):
        played.active[m][last, e] = present[last]
    return counts
