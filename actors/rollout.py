"""From `env.step` to a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.trajectories import Trajectories, columns_of


class Acts(Protocol):
    """Whoever chooses actions: a policy, the uniform policy, a scripted expert."""

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """On what the agents observe and may do now, and on nothing else: per type [E, X_m], or [E, X_m, A_m]."""
        ...


@runtime_checkable
class KnowsItsChances(Acts, Protocol):
    """Who also tells how likely each chosen action was, as `Policy.decide` does."""

    def decide(
        self, now: TimeStep, generator: torch.Generator, greedy: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]: ...


@dataclass
class Moment:
    """One joint step of E environments: what was done, by what chance (if the policy tells), and what it led to.

    before: whether the E episodes had ended already; what they show is padding then.
    """

    actions: list[np.ndarray]
    chances: list[np.ndarray] | None
    now: TimeStep
    before: np.ndarray


def play(
    environment: Environment, policy: Acts, seed: int, greedy: bool = False, starts: Starts | None = None
) -> tuple[TimeStep, Iterator[Moment]]:
    """One whole episode in each of the E environments: how they begin, and their steps until the last one has ended.

    A pure function of (policy, seed, starts): the environment and the action noise take their seeds from `seed`.
    The arrays of a time step are overwritten by the next one.
    """
    first = environment.reset(seed, starts)
    return first, _moments(environment, policy, torch.Generator().manual_seed(seed), greedy, first)


def _moments(
    environment: Environment, policy: Acts, generator: torch.Generator, greedy: bool, now: TimeStep
) -> Iterator[Moment]:
    ended = now.terminated | now.truncated
    # Asked once: looking a protocol's methods up costs as much as a small network's step.
    decide = policy.decide if isinstance(policy, KnowsItsChances) else None
    for _ in range(environment.spec.episode_length):
        chances = None
        if decide is not None:
            actions, chances = decide(now, generator, greedy)
        else:
            actions = policy.act(now, generator, greedy)
        now = environment.step(actions)
        yield Moment(actions, chances, now, ended)
        ended = ended | now.terminated | now.truncated
        if ended.all():
            return


def rollout(
    environment: Environment, policy: Acts, seed: int, greedy: bool = False, starts: Starts | None = None
) -> Trajectories:
    """The episodes of `play`, kept. The log-probabilities of actions are recorded if the policy tells them, else they
    stay 0.
    """
    trajectories = Trajectories.zeros(environment.spec, environment.num_envs)
    write = _Writer(trajectories)
    first, moments = play(environment, policy, seed, greedy, starts)
    write.view(0, first)
    for t, moment in enumerate(moments):
        now = moment.now
        write.per_type("log_probabilities", t, moment.chances or ())
        write.per_type("actions", t, moment.actions)
        write.per_type("rewards", t, now.rewards)
        trajectories.terminated[t], trajectories.truncated[t] = now.terminated, now.truncated
        write.view(t + 1, now)
        trajectories.lengths[(now.terminated | now.truncated) & ~moment.before] = t + 1
    return trajectories


def returns(
    environment: Environment, policy: Acts, seed: int, greedy: bool = False, starts: Starts | None = None
) -> np.ndarray:
    """True return of each episode of `play` and each agent, [E, N] float32; nothing else is kept of them."""
    _, moments = play(environment, policy, seed, greedy, starts)
    total = np.zeros((environment.num_envs, environment.spec.num_agents), np.float32)
    for moment in moments:
        # Also of episodes that have ended: their rewards are 0 by the contract of `step`.
        total += np.concatenate(moment.now.rewards, axis=1)
    return total


class _Writer:
    """Where the steps of trajectories are written to: views of their arrays, made once."""

    def __init__(self, trajectories: Trajectories) -> None:
        self._spec = trajectories.spec
        self._columns = [columns_of(trajectories.arrays, b) for b in range(len(self._spec.blocks))]
        names = ("active", "actions", "log_probabilities", "rewards")
        self._per_type: dict[str, list[np.ndarray]] = {name: getattr(trajectories, name) for name in names}

    def view(self, t: int, now: TimeStep) -> None:
        """What agents observe and may do at step t."""
        for columns, seen in zip(self._columns, now.seen(self._spec), strict=True):
            for name, column in columns.items():
                column[t] = seen.columns[name]
        self.per_type("active", t, now.active)

    def per_type(self, name: str, t: int, arrays: Sequence[np.ndarray]) -> None:
        # Not strict: of chances that nobody tells there are no arrays at all.
        for target, array in zip(self._per_type[name], arrays, strict=False):
            target[t] = array
