"""From `env.step` to a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from protocol.environment import Environment, Starts, TimeStep
from protocol.trajectories import Trajectories


class Acts(Protocol):
    """Whoever chooses actions: a policy, the uniform policy, a scripted expert."""

    def act(
        self,
        observations: Sequence[np.ndarray],
        action_masks: Sequence[np.ndarray],
        generator: torch.Generator,
        greedy: bool = False,
    ) -> list[np.ndarray]: ...


@runtime_checkable
class KnowsItsChances(Acts, Protocol):
    """Who also tells how likely each chosen action was, as `Policy.decide` does."""

    def decide(
        self,
        observations: Sequence[np.ndarray],
        action_masks: Sequence[np.ndarray],
        generator: torch.Generator,
        greedy: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]: ...


def rollout(
    environment: Environment, policy: Acts, seed: int, greedy: bool = False, starts: Starts | None = None
) -> Trajectories:
    """Play one whole episode in each of the E environments.

    A pure function of (policy, seed, starts): the environment and the action noise take their seeds from `seed`.
    The log-probabilities of actions are recorded if the policy tells them, else they stay 0.
    """
    trajectories = Trajectories.zeros(environment.spec, environment.num_envs)
    generator = torch.Generator().manual_seed(seed)
    now = environment.reset(seed, starts)
    _write_view(trajectories, 0, now)
    ended = now.terminated | now.truncated
    # Asked once: looking a protocol's methods up costs as much as a small network's step.
    decide = policy.decide if isinstance(policy, KnowsItsChances) else None
    for t in range(environment.spec.episode_length):
        seen = [array[t] for array in trajectories.observations], [array[t] for array in trajectories.action_masks]
        if decide is not None:
            actions, chances = decide(*seen, generator, greedy)
            for m, chance in enumerate(chances):
                trajectories.log_probabilities[m][t] = chance
        else:
            actions = policy.act(*seen, generator, greedy)
        now = environment.step(actions)
        for m, action in enumerate(actions):
            trajectories.actions[m][t] = action
            trajectories.rewards[m][t] = now.rewards[m]
        trajectories.terminated[t], trajectories.truncated[t] = now.terminated, now.truncated
        _write_view(trajectories, t + 1, now)
        ends_now = (now.terminated | now.truncated) & ~ended
        trajectories.lengths[ends_now] = t + 1
        ended |= ends_now
        if ended.all():
            break
    return trajectories


def _write_view(trajectories: Trajectories, t: int, now: TimeStep) -> None:
    for m in range(len(now.observations)):
        trajectories.observations[m][t] = now.observations[m]
        trajectories.action_masks[m][t] = now.action_masks[m]
        trajectories.active[m][t] = now.active[m]
