"""How good a policy is: true returns on fixed seeds, or from given start states."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from actors import rollout
from actors.rollout import Acts
from actors.settings import EvaluationSettings
from actors.simulator import Simulator
from protocol.demonstrations import Demonstrations, resolve
from protocol.environment import Starts
from protocol.errors import InputError
from protocol.job import Job
from protocol.seeds import derive_seed
from protocol.specs import EnvironmentSpec

EPISODES_AT_ONCE = 250
NUMBERS_AT_ONCE = 1 << 27
"""Of one moment's observations: half a gigabyte. Fewer episodes are played at once where they are more."""


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


class Evaluator:
    """Plays the episodes on which the policies of a run are compared: the same start states every time.

    With `settings.starts == "demonstrations"` these are the start states of all the demonstrations, from which the
    expert's return is known; otherwise seeded ones. Raises InputError if the demonstrations hold no start states.

    expert_return: mean true return of all the demonstrations, also if the run learns from few of them; None if unknown.
    """

    def __init__(self, job: Job, settings: EvaluationSettings) -> None:
        self._job, self._greedy = job, settings.greedy
        self._starts: Starts | None = None
        self._groups: np.ndarray | None = None
        self.expert_return: float | None = None
        if not job.demonstrations:
            return
        demonstrations = Demonstrations.load(resolve(job.demonstrations))
        self.expert_return = demonstrations.return_mean
        if settings.starts == "demonstrations":
            if not demonstrations.starts:
                raise InputError("these demonstrations hold no start states: choose --evaluation.starts fresh")
            self._starts, self._groups = demonstrations.starts, demonstrations.groups

    def returns(self, policy: Acts, episodes: int) -> np.ndarray:
        """True returns [episodes, N]; from given start states, as many episodes as there are of these."""
        if self._groups is not None:
            episodes = len(self._groups)
        return evaluate(self._job.environment, policy, episodes, self._job.seed, self._greedy, self._starts)

    def estimate(self, returns: np.ndarray) -> ReturnEstimate:
        """Mean and standard error of what `returns` gave."""
        return ReturnEstimate.of(returns, self._groups)


def evaluate(
    environment: str, policy: Acts, episodes: int, seed: int, greedy: bool = False, starts: Starts | None = None
) -> np.ndarray:
    """True returns [episodes, N] of the policy, the same start states for every policy.

    starts: start states [episodes, …] by name instead of seeded ones.   Raises SimulatorError if the environment fails.
    """
    returns = []
    with closing(Simulator(environment, 1)) as one:
        at_once = episodes_at_once(one.spec)
    for first in range(0, episodes, at_once):
        count = min(at_once, episodes - first)
        part = None if starts is None else {name: array[first : first + count] for name, array in starts.items()}
        batch_seed = derive_seed(seed, "evaluation", first)
        with closing(Simulator(environment, count)) as played:
            returns.append(rollout.returns(played, policy, batch_seed, greedy, part))
    return np.concatenate(returns)


def episodes_at_once(spec: EnvironmentSpec) -> int:
    """How many are played together, at most: as many as have observations of one moment that memory holds easily."""
    seen = sum(t.count * t.observation_dim for t in spec.types)
    return min(EPISODES_AT_ONCE, max(1, NUMBERS_AT_ONCE // seen))
