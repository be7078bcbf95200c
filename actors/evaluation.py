"""How good a policy is: true returns on fixed seeds, or from given start states."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from bm3il.actors import rollout
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import Acts
from bm3il.actors.settings import EvaluationSettings
from bm3il.actors.simulator import Simulator
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Starts
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_whole
from bm3il.protocol.job import Job
from bm3il.protocol.registry import copies_at_once
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import EnvironmentSpec

EPISODES_AT_ONCE = 250
NUMBERS_AT_ONCE = 1 << 27
"""Of one moment's observations: half a gigabyte. Fewer episodes are played at once where they are more."""
GROWTH, MEASURED_STEPS = 8, 5
"""Of the copies of an environment, from one measurement of its pace to the next; how many steps of them one takes."""
BASELINE = "baseline.json"
"""In the run's folder: what every agent returns under the uniform policy, and in how many episodes."""

AtWork = Callable[[int, int], None]


@dataclass(frozen=True)
class ReturnEstimate:
    """True return per agent and episode: mean, and standard error over episodes (or over groups of them); None of one,
    which says nothing of how others would differ."""

    mean: float
    stderr: float | None
    episodes: int

    @classmethod
    def of(cls, returns: np.ndarray, groups: np.ndarray | None = None) -> ReturnEstimate:
        """returns: [episodes, N]. groups: [episodes], the unit of independence; the mean is over episodes."""
        values = returns.mean(axis=1).astype(np.float64)
        if groups is None:
            groups = np.arange(len(values))
        _, index = np.unique(groups, return_inverse=True)
        # Summed by group: episodes of one start vary together, so they count as one draw.
        residuals = np.bincount(index, weights=values - values.mean())
        count = len(residuals)
        if count < 2:
            return cls(float(values.mean()), None, len(values))
        variance = (residuals**2).sum() * count / (count - 1)
        return cls(float(values.mean()), float(np.sqrt(variance) / len(values)), len(values))


@dataclass(frozen=True)
class Scale:
    """What true returns are held against: 0 is the uniform policy, 1 the expert. Of each agent its mean return, [N];
    None if it is unknown."""

    spec: EnvironmentSpec
    random: np.ndarray | None = None
    expert: np.ndarray | None = None

    @property
    def random_return(self) -> float | None:
        """Per agent and episode."""
        return _mean(self.random, slice(None))

    @property
    def expert_return(self) -> float | None:
        """Per agent and episode."""
        return _mean(self.expert, slice(None))

    def normalized(self, mean: float, agents: slice = slice(None)) -> float | None:
        """Of a mean over some agents; None where the two ends are unknown, or are not apart."""
        zero, one = _mean(self.random, agents), _mean(self.expert, agents)
        return None if zero is None or one is None or zero == one else (mean - zero) / (one - zero)

    def of_types(self, returns: np.ndarray, groups: np.ndarray | None = None) -> dict[str, dict[str, float | None]]:
        """The figures of the agents of each type by its name, from returns [episodes, N] (and their unit of
        independence, [episodes]); {} if there is one type only, of which those of all agents say everything.

        A mean over predators and prey may be the expert's when neither acts as he does.
        """
        found: dict[str, dict[str, float | None]] = {}
        for m, kind in enumerate(self.spec.types if self.spec.num_types > 1 else ()):
            agents = self.spec.agents(m)
            estimate = ReturnEstimate.of(returns[:, agents], groups)
            found[kind.name] = {
                "return_mean": estimate.mean,
                "return_stderr": estimate.stderr,
                "random_return": _mean(self.random, agents),
                "expert_return": _mean(self.expert, agents),
                "normalized_return": self.normalized(estimate.mean, agents),
            }
        return found


def _mean(per_agent: np.ndarray | None, agents: slice) -> float | None:
    return None if per_agent is None else float(per_agent[agents].mean(dtype=np.float64))


class Evaluator:
    """Plays the episodes on which the policies of a run are compared: the same start states every time.

    With `settings.starts == "demonstrations"` these are the start states of all the demonstrations, from which the
    expert's return is known; otherwise seeded ones. Raises InputError if the demonstrations hold no start states.

    expert: mean true returns of each agent in all the demonstrations, [N], also if the run learns from few of them;
        None if unknown.
    """

    def __init__(self, job: Job, settings: EvaluationSettings, at_work: AtWork = lambda *_: None) -> None:
        self._job, self._settings, self._at_work = job, settings, at_work
        self._starts: Starts | None = None
        self._groups: np.ndarray | None = None
        self._pace: Pace | None = None
        self.expert: np.ndarray | None = None
        if not job.demonstrations:
            return
        demonstrations = Demonstrations.load(job.demonstrations)
        self.expert = _per_agent(demonstrations, job.spec)
        if settings.starts == "demonstrations":
            if not demonstrations.starts:
                raise InputError("these demonstrations hold no start states: choose --evaluation.starts fresh")
            self._starts, self._groups = demonstrations.starts, demonstrations.groups

    def returns(self, policy: Acts, episodes: int) -> np.ndarray:
        """True returns [episodes, N]; from given start states, as many episodes as there are of these.

        If these take longer than `settings.seconds`, the first of them: whoever is compared is so on the same ones.
        Raises SimulatorError if the environment fails.
        """
        job, settings = self._job, self._settings
        # Measured once, so that all policies begin with the same batches: which episodes a batch holds depends on
        # where it begins, and on how many it holds.
        if self._pace is None:
            most = max(settings.episodes, settings.final_episodes) if self._groups is None else len(self._groups)
            at_once = min(episodes_at_once(job.spec), most)
            first = _affordable(job.environment, at_once, settings.seconds, partial(self._at_work, 0, episodes))
            self._pace = Pace(settings.seconds, first, at_once)
        episodes = episodes if self._groups is None else len(self._groups)
        return evaluate(
            job.environment, policy, episodes, job.seed, settings.greedy, self._starts, self._pace, self._at_work
        )

    def estimate(self, returns: np.ndarray) -> ReturnEstimate:
        """Mean and standard error of what `returns` gave."""
        return ReturnEstimate.of(returns, self.groups(returns))

    def groups(self, returns: np.ndarray) -> np.ndarray | None:
        """The unit of independence of each episode of what `returns` gave; None if each is its own."""
        return None if self._groups is None else self._groups[: len(returns)]

    def random_returns(self) -> np.ndarray:
        """Mean true returns of each agent under the uniform policy, [N] float32, to compare with: played once in a run,
        and kept in its folder.

        Raises SimulatorError if the environment fails, OSError if the folder cannot be written.
        """
        if (known := remembered_random_returns(self._job)) is not None:
            return known
        returns = self.returns(UniformPolicy(self._job.spec), self._settings.final_episodes)
        means = returns.mean(axis=0)
        text = json.dumps({"random_returns": means.tolist(), "episodes": len(returns)})
        write_whole(self._job.run_folder / BASELINE, text + "\n")
        return means


def remembered_random_returns(job: Job) -> np.ndarray | None:
    """The uniform policy's returns [N], if an evaluator of this run has played it."""
    try:
        told = json.loads((job.run_folder / BASELINE).read_text(encoding="utf-8"))["random_returns"]
        values = np.array(told, np.float32)
    except (OSError, ValueError, LookupError, TypeError):
        # Absent, damaged or of another release: it is played again, and written over.
        return None
    return values if values.shape == (job.spec.num_agents,) else None


def _per_agent(demonstrations: Demonstrations, spec: EnvironmentSpec) -> np.ndarray | None:
    """What the expert's agents return, for as many agents as there are: of another crowd, the mean of each type."""
    known, recorded = demonstrations.returns_of_agents, demonstrations.spec
    # Of each type as many, not only in all: else those of one type would be held against another's.
    if known is None or [t.count for t in recorded.types] == [t.count for t in spec.types]:
        return known
    return np.concatenate([np.full(t.count, known[recorded.agents(m)].mean()) for m, t in enumerate(spec.types)])


@dataclass(frozen=True)
class Pace:
    """How long an evaluation may take, how many episodes are played at once at first, and later at most."""

    seconds: float
    first: int
    most: int


def evaluate(
    environment: str,
    policy: Acts,
    episodes: int,
    seed: int,
    greedy: bool = False,
    starts: Starts | None = None,
    pace: Pace | None = None,
    at_work: AtWork = lambda *_: None,
) -> np.ndarray:
    """True returns [episodes, N] of the policy, the same start states for every policy.

    starts: start states [episodes, …] by name instead of seeded ones.
    pace: if all would take longer, fewer episodes are played, the first ones; None: as long as it takes.
    at_work: called after each step with the episodes that are played, and those that are asked for.
    Raises SimulatorError if the environment fails.
    """
    if pace is None:
        at_once = episodes_at_once(_spec(environment))
        pace = Pace(math.inf, at_once, at_once)
    returns: list[np.ndarray] = []
    first, size, began = 0, pace.first, time.monotonic()
    while first < episodes and size:
        count, start = min(size, episodes - first), time.monotonic()
        part = None if starts is None else {name: array[first : first + count] for name, array in starts.items()}
        batch_seed = derive_seed(seed, "evaluation", first)
        with closing(Simulator(environment, count, partial(at_work, first, episodes))) as played:
            returns.append(rollout.returns(played, policy, batch_seed, greedy, part))
        first += count
        now = time.monotonic()
        left, each = max(0.0, pace.seconds - (now - began)), max(now - start, 1e-9) / count
        size = int(min(pace.most, left / each))
    return np.concatenate(returns)


def episodes_at_once(spec: EnvironmentSpec) -> int:
    """How many are played together, at most: as many as have observations of one moment that memory holds easily, and
    no more than the environment is made for."""
    seen = sum(t.count * t.observation_dim for t in spec.types)
    return copies_at_once(spec.name, min(EPISODES_AT_ONCE, max(1, NUMBERS_AT_ONCE // seen)))


def _affordable(environment: str, most: int, seconds: float, after_step: Callable[[], None]) -> int:
    """How many episodes, at most, are played at once in that time, as far as a few steps can tell; at least one.

    Found with ever more copies: a slow simulator's step shall not be hundreds of slow steps, nor its start hundreds of
    starts, before anybody knows that it is slow.
    """
    count = 1
    while True:
        took = _expected_seconds(environment, count, after_step)
        if count == most or GROWTH * took > seconds:
            return max(1, int(min(most, count * seconds / took)))
        count = min(GROWTH * count, most)


def _expected_seconds(environment: str, count: int, after_step: Callable[[], None]) -> float:
    """How long it takes to start so many copies, and to play an episode in each."""
    began = time.monotonic()
    with closing(Simulator(environment, count, after_step)) as played:
        _, moments = rollout.play(played, UniformPolicy(played.spec), 0)
        started = last = time.monotonic()
        steps: list[float] = []
        for _ in islice(moments, MEASURED_STEPS):
            now = time.monotonic()
            steps.append(now - last)
            last = now
        return started - began + min(steps) * played.spec.episode_length


def _spec(environment: str) -> EnvironmentSpec:
    with closing(Simulator(environment, 1)) as one:
        return one.spec
