"""Rover Tower against recordings of the original, and its contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bm3il.actors.environments.rover_tower import EPISODE_LENGTH, RoverTower
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.errors import InputError

AGENTS = (8, 4)


def random_returns(pairs: int, episodes: int) -> np.ndarray:
    """Mean return over agents of each episode under uniformly random actions."""
    environment, random = RoverTower(episodes, pairs), np.random.default_rng(1)
    environment.reset(0)
    total = np.zeros(episodes)
    for _ in range(EPISODE_LENGTH):
        now = environment.step([random.integers(5, size=(episodes, pairs)) for _ in range(2)])
        total += np.concatenate(now.rewards, axis=1).mean(axis=1)
    return total


def copied(now: TimeStep) -> list[np.ndarray]:
    """All arrays of a time step, copied."""
    return [
        array.copy()
        for array in [*now.observations, *now.action_masks, *now.active, *now.rewards, now.terminated, now.truncated]
    ]


@pytest.mark.parametrize("agents", AGENTS)
def test_original_is_reproduced(shared: Path, agents: int) -> None:
    reference = np.load(shared / f"data/reference/rover_tower_{agents}.npz", allow_pickle=False)
    pairs, episodes = agents // 2, len(reference["pos0"])
    environment = RoverTower(episodes, pairs)
    starts = {
        "rover_positions": reference["pos0"][:, :pairs],
        "goal_positions": np.take_along_axis(reference["land"], reference["goal"][..., None], axis=1),
        "rover_of_tower": reference["listen_ind"],
    }
    now = environment.reset(0, starts)

    def check_observations(t: int) -> None:
        np.testing.assert_allclose(now.observations[0], reference["obs_rover"][:, t], rtol=0, atol=1e-6)
        np.testing.assert_allclose(now.observations[1], reference["obs_tower"][:, t], rtol=0, atol=1e-6)

    check_observations(0)
    for t in range(EPISODE_LENGTH):
        actions = reference["actions"][:, t].astype(np.int64)
        now = environment.step([actions[:, :pairs], actions[:, pairs:]])
        check_observations(t + 1)
        np.testing.assert_allclose(np.concatenate(now.rewards, 1), reference["rewards"][:, t], rtol=0, atol=1e-6)
        np.testing.assert_allclose(environment.positions, reference["pos"][:, t, :pairs], rtol=0, atol=1e-6)
        np.testing.assert_allclose(environment.velocities, reference["vel"][:, t, :pairs], rtol=0, atol=1e-6)


@pytest.mark.parametrize("agents", AGENTS)
def test_experts_replay_from_their_starts(shared: Path, agents: int) -> None:
    """The proof of the paired evaluation: start states of the demonstrations lead to the demonstrations."""
    expert = np.load(shared / f"data/rover_tower/expert_{agents}_train.npz", allow_pickle=False)
    environment = RoverTower(len(expert["goal_pos"]), agents // 2)
    starts = {
        "rover_positions": expert["rover_obs"][:, 0, :, -4:-2],
        "goal_positions": expert["goal_pos"],
        "rover_of_tower": expert["tower_listener"],
    }
    now = environment.reset(0, starts)
    for t in range(EPISODE_LENGTH):
        np.testing.assert_allclose(now.observations[0], expert["rover_obs"][:, t], rtol=0, atol=1e-5)
        np.testing.assert_allclose(now.observations[1], expert["tower_obs"][:, t], rtol=0, atol=1e-5)
        now = environment.step([expert["rover_act"][:, t].astype(int), expert["tower_act"][:, t].astype(int)])
        np.testing.assert_allclose(now.rewards[0], expert["rover_reward"][:, t], rtol=0, atol=1e-5)
        np.testing.assert_allclose(now.rewards[1], expert["tower_reward"][:, t], rtol=0, atol=1e-5)


def test_random_policy_has_the_documented_return() -> None:
    """A pair does not feel the others, so both sizes have one expectation.

    The documented −7.6 (8 agents) and −8.6 (4) are estimates with standard errors of about 1 and 1.4.
    """
    eight, four = random_returns(4, 100_000).mean(), random_returns(2, 200_000).mean()  # standard errors 0.14
    assert eight == pytest.approx(-7.6, abs=0.7)
    assert four == pytest.approx(eight, abs=0.8)


def test_contract() -> None:
    environment = RoverTower(3, pairs=2)
    assert isinstance(environment, Environment)
    assert [(t.name, t.count, t.observation_dim, t.action_dim) for t in environment.spec.types] == [
        ("rover", 2, 11, 5),
        ("tower", 2, 6, 5),
    ]
    now = environment.reset(5)
    assert [array.dtype for array in now.observations] == [np.float32] * 2
    still = [np.zeros((3, 2), int)] * 2
    for t in range(EPISODE_LENGTH):
        assert not now.truncated.any(), t
        assert not now.terminated.any(), t
        assert all(active.all() for active in now.active)
        now = environment.step(still)
    assert now.truncated.all()
    assert not now.terminated.any()
    assert all(active.all() for active in now.active), "a truncated episode is bootstrapped from its last observation"
    assert all(rewards.any() for rewards in now.rewards)


def test_ended_episode_stays_ended_until_reset() -> None:
    environment, moving = RoverTower(2, pairs=2), [np.ones((2, 2), int)] * 2
    environment.reset(0)
    for _ in range(EPISODE_LENGTH):
        now = environment.step(moving)
    last = copied(now)[:2]
    for _ in range(2):
        now = environment.step(moving)
        assert now.truncated.all()
        assert not any(active.any() for active in now.active)
        assert not any(rewards.any() for rewards in now.rewards)
        assert all(np.array_equal(a, b) for a, b in zip(last, now.observations, strict=True))
    now = environment.reset(1)
    assert not now.truncated.any()
    assert all(active.all() for active in now.active)


def test_seed_determines_the_episode() -> None:
    first, second = RoverTower(4), RoverTower(4)
    second.reset(9)
    second.step([np.full((4, 4), 2)] * 2)  # nothing may be left over from an episode before
    starts = copied(first.reset(3))
    assert all(np.array_equal(a, b) for a, b in zip(starts, copied(second.reset(3)), strict=True))
    assert not np.array_equal(starts[0], copied(first.reset(4))[0])
    drawn = first.draw_starts(3)
    assert all(np.array_equal(a, b) for a, b in zip(starts, copied(first.reset(8, drawn)), strict=True))


def test_towers_symbol_reaches_its_own_rover() -> None:
    environment = RoverTower(50, pairs=3)
    now = environment.reset(0)
    guide = now.observations[0][..., :3].argmax(-1)
    assert not now.observations[0][..., 3:8].any(), "no symbol before the first step"
    symbols = np.random.default_rng(0).integers(5, size=(50, 3))
    now = environment.step([np.zeros((50, 3), int), symbols])
    heard = now.observations[0][..., 3:8]
    assert (heard.sum(-1) == 1).all()
    assert np.array_equal(heard.argmax(-1), np.take_along_axis(symbols, guide, axis=1))


@pytest.mark.parametrize("bad", [-1, 5])
def test_action_out_of_range(bad: int) -> None:
    environment = RoverTower(2)
    environment.reset(0)
    for kind in range(2):
        actions = [np.zeros((2, 4), int), np.zeros((2, 4), int)]
        actions[kind][1, 3] = bad
        with pytest.raises(ValueError, match=r"0\.\.4"):
            environment.step(actions)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rover_positions", np.zeros((2, 4, 2)), "expected rover_positions"),
        ("goal_positions", np.full((3, 4, 2), np.nan), "within"),
        ("rover_of_tower", np.zeros((3, 4), int), "permutation"),
        ("rover_of_tower", None, "expected start states"),
    ],
)
def test_bad_start_states(name: str, value: np.ndarray | None, text: str) -> None:
    environment = RoverTower(3)
    starts = environment.draw_starts(0)
    if value is None:
        del starts[name]
    else:
        starts[name] = value
    with pytest.raises(InputError, match=text):
        environment.reset(0, starts)
