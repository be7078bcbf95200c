"""How good a policy is: true returns on fixed seeds, or from given start states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.rollout import Acts, rollout
from protocol.environment import Starts
from protocol.registry import make_environment
from protocol.seeds import derive_seed

EPISODES_AT_ONCE = 250


@dataclass(frozen=True)
class ReturnEstimate:
    """True return per agent and episode: mean, and standard error over episodes (or over groups of them)."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, returns: np.ndarray, groups: np.ndarray | None = None) -> ReturnEstimate:
        """returns: [episodes, N]. groups: [episodes], the unit of independence; the mean is over episodes."""
        values = returns.mean(axis=1).astype(np.float64)
        if groups is None:
            groups = np.arange(len(values))
        _, index = np.unique(groups, return_inverse=True)
        residuals = np.bincount(index, weights=values - values.mean())
        count = len(residuals)
        variance = (residuals**2).sum() * count / max(count - 1, 1)
        return cls(float(values.mean()), float(np.sqrt(variance) / len(values)))


def evaluate(
    environment: str, policy: Acts, episodes: int, seed: int, greedy: bool = False, starts: Starts | None = None
) -> np.ndarray:
    """True returns [episodes, N] of the policy, the same start states for every policy.

    starts: start states [episodes, …] by name instead of seeded ones.
    """
    returns = []
    for first in range(0, episodes, EPISODES_AT_ONCE):
        count = min(EPISODES_AT_ONCE, episodes - first)
        part = None if starts is None else {name: array[first : first + count] for name, array in starts.items()}
        batch_seed = derive_seed(seed, "evaluation", first)
        returns.append(rollout(make_environment(environment, count), policy, batch_seed, greedy, part).returns())
    return np.concatenate(returns)
