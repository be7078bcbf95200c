"""The one off-by-one of the data path, with an environment that counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import returns, rollout
from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

ENDS = np.array([2, 4, 6, 3])
TERMINATES = np.array([True, False, False, True])


class Counting:
    """Observation: 10·environment + step. Only the action step mod 4 is allowed. Reward: 100·step + action."""

    def __init__(self, ends: np.ndarray, terminates: np.ndarray) -> None:
        self.spec = EnvironmentSpec("counting", (TypeSpec("a", 2, 1, 4), TypeSpec("b", 1, 3, 4)), 6)
        self.num_envs, self._ends, self._terminates = len(ends), ends, terminates
        self.stepped = 0

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        self.seed, self.starts = seed, starts
        self._step = np.zeros(self.num_envs, np.int64)
        return self._view([np.zeros((self.num_envs, t.count), np.float32) for t in self.spec.types])

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        self.stepped += 1
        running = self._step < self._ends
        self._step = self._step + running
        gain = [np.where(running[:, None], 100 * self._step[:, None] + a, 0) for a in actions]
        return self._view([g.astype(np.float32) for g in gain])

    def _view(self, rewards: list[np.ndarray]) -> TimeStep:
        ended = self._step == self._ends
        number = (10 * np.arange(self.num_envs) + self._step).astype(np.float32)
        return TimeStep(
            [
                np.broadcast_to(number[:, None, None], (self.num_envs, t.count, t.observation_dim))
                for t in self.spec.types
            ],
            [
                np.broadcast_to((np.arange(4) == self._step[:, None] % 4)[:, None], (self.num_envs, t.count, 4))
                for t in self.spec.types
            ],
            [np.ones((self.num_envs, t.count), bool) for t in self.spec.types],
            rewards,
            ended & self._terminates,
            ended & ~self._terminates,
        )


class FirstAllowed:
    """Takes the first allowed action and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        self.seen.append(now.observations[0][:, 0, 0].copy())
        self.greedy = greedy
        return [mask.argmax(-1) for mask in now.action_masks]


def test_action_t_is_chosen_on_view_t_and_reward_t_comes_with_view_t_plus_1() -> None:
    environment: Environment = Counting(ENDS, TERMINATES)
    policy = FirstAllowed()
    played = rollout(environment, policy, seed=7)
    assert played.lengths.tolist() == ENDS.tolist()
    assert played.num_steps == ENDS.sum()
    for e, end in enumerate(ENDS):
        for t in range(end):
            assert policy.seen[t][e] == 10 * e + t
            for m in range(2):
                assert (played.observations[m][t, e] == 10 * e + t).all()
                assert (played.observations[m][t + 1, e] == 10 * e + t + 1).all()
                assert (played.actions[m][t, e] == t % 4).all()
                assert np.take_along_axis(played.action_masks[m][t, e], played.actions[m][t, e][:, None], -1).all()
                assert (played.rewards[m][t, e] == 100 * (t + 1) + t % 4).all()
            assert played.terminated[t, e] == (TERMINATES[e] and t == end - 1)
            assert played.truncated[t, e] == (not TERMINATES[e] and t == end - 1)


def test_returns_count_the_steps_of_the_episode_only() -> None:
    played = rollout(Counting(ENDS, TERMINATES), FirstAllowed(), seed=7)
    for e, end in enumerate(ENDS):
        assert (played.returns()[e] == sum(100 * (t + 1) + t % 4 for t in range(end))).all()


def test_returns_alone_are_those_of_the_rollout() -> None:
    kept = rollout(Counting(ENDS, TERMINATES), FirstAllowed(), seed=7).returns()
    alone = returns(Counting(ENDS, TERMINATES), FirstAllowed(), seed=7)
    assert alone.dtype == np.float32
    assert np.array_equal(alone, kept)
    environments = (make_environment("berlin?types=5&agents=10&slip=0.1", 3) for _ in range(2))
    one, other = (play(e, UniformPolicy(e.spec), 2) for e, play in zip(environments, (returns, rollout), strict=True))
    assert np.array_equal(one, other.returns())


def test_nobody_plays_on_when_all_episodes_have_ended() -> None:
    environment = Counting(np.array([2, 3]), np.array([True, True]))
    played = rollout(environment, FirstAllowed(), seed=7)
    assert environment.stepped == 3
    assert played.terminated.shape == (6, 2)
    assert (played.observations[0][4:] == 0).all()


def test_an_episode_that_no_flag_ends_has_full_length() -> None:
    played = rollout(Counting(np.array([99]), np.array([True])), FirstAllowed(), seed=7)
    assert played.lengths.tolist() == [6]


def test_seed_starts_and_greediness_are_passed_on() -> None:
    environment, policy = Counting(ENDS, TERMINATES), FirstAllowed()
    starts = {"position": np.zeros((4, 2))}
    rollout(environment, policy, seed=11, greedy=True, starts=starts)
    assert (environment.seed, environment.starts, policy.greedy) == (11, starts, True)


def test_an_environment_may_reuse_its_arrays() -> None:
    class Reusing(Counting):
        def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
            fresh = super().step(actions)
            if not hasattr(self, "_kept"):
                self._kept = [array.copy() for array in fresh.observations]
            for kept, array in zip(self._kept, fresh.observations, strict=True):
                kept[:] = array
            fresh.observations = self._kept
            return fresh

    plain, reusing = (rollout(kind(ENDS, TERMINATES), FirstAllowed(), seed=7) for kind in (Counting, Reusing))
    for one, other in zip(plain.observations, reusing.observations, strict=True):
        assert np.array_equal(one, other)


def test_log_probabilities_are_recorded_where_the_policy_tells_them() -> None:
    class Certain(FirstAllowed):
        def decide(
            self, now: TimeStep, generator: torch.Generator, greedy: bool = False
        ) -> tuple[list[np.ndarray], list[np.ndarray]]:
            actions = self.act(now, generator, greedy)
            return actions, [-(1.0 + action) for action in actions]

    told = rollout(Counting(ENDS, TERMINATES), Certain(), seed=0)
    for actions, chances in zip(told.actions, told.log_probabilities, strict=True):
        assert chances.dtype == np.float32
        np.testing.assert_array_equal(chances, -(1.0 + actions))
    silent = rollout(Counting(ENDS, TERMINATES), FirstAllowed(), seed=0)
    assert not any(chances.any() for chances in silent.log_probabilities)
