"""Our environments behind PettingZoo's parallel API, by its own tests."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test, parallel_seed_test

import bm3il
from bm3il.protocol.adapters.as_pettingzoo import NOT_DONE, AsParallel
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

BERLIN = "berlin?types=5&agents=10"
SPREAD = "pettingzoo:mpe2.simple_spread_v3?arguments=continuous_actions:true"


@pytest.fixture(autouse=True)
def odd_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


@pytest.mark.parametrize(
    "name",
    [
        "rover_tower?pairs=2",
        f"{BERLIN}&sight=near&slip=0.1",
        BERLIN,
        SPREAD,
        "pettingzoo:odd_world?arguments=quirk:relay",
    ],
)
def test_they_pass_pettingzoo_s_own_tests(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "mpe2" in name:
        pytest.importorskip("mpe2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=NOT_DONE)  # its seed test looks at no mask
        warnings.filterwarnings("ignore", message="No agents present but not all")  # nobody left has come to an end
        parallel_api_test(bm3il.as_parallel_env(name), num_cycles=60)
        parallel_seed_test(partial(bm3il.as_parallel_env, name), num_cycles=60)
    assert "Passed Parallel API test" in capsys.readouterr().out


def test_they_show_what_ours_show() -> None:
    theirs, ours = bm3il.as_parallel_env(BERLIN), make_environment(BERLIN, 1)
    assert isinstance(theirs, ParallelEnv)
    observations, _ = theirs.reset(seed=3)
    now, random = ours.reset(3), np.random.default_rng(0)
    while theirs.agents:
        joint = [(random.random(mask.shape) * mask).argmax(axis=-1) for mask in now.action_masks]
        actions: dict[str, int] = {}
        for m, t in enumerate(ours.spec.types):
            for x in range(t.count):
                seen = observations[f"{t.name}_{x}"]
                np.testing.assert_array_equal(seen["observation"], now.observations[m][0, x])
                np.testing.assert_array_equal(seen["action_mask"], now.action_masks[m][0, x])
                assert theirs.observation_space(f"{t.name}_{x}").contains(seen)
                actions[f"{t.name}_{x}"] = int(joint[m][0, x])
        observations, rewards, terminated, truncated, _ = theirs.step(actions)
        now = ours.step(joint)
        assert list(rewards.values()) == [r for part in now.rewards for r in part[0].tolist()]
    assert not any(terminated.values())
    assert all(truncated.values())
    assert len(truncated) == ours.spec.num_agents


def test_an_action_that_the_mask_forbids_does_the_first_that_is_allowed() -> None:
    first, other = bm3il.as_parallel_env(BERLIN), bm3il.as_parallel_env(BERLIN)
    seen = first.reset(seed=1)[0]
    assert seen.keys() == other.reset(seed=1)[0].keys()
    allowed = {name: int(seen[name]["action_mask"].argmax()) for name in first.agents}
    forbidden = {name: int(seen[name]["action_mask"].argmin()) for name in first.agents}
    with pytest.warns(UserWarning, match=NOT_DONE):
        shown = other.step(forbidden)
    expected = first.step(allowed)
    for name in first.agents:
        np.testing.assert_array_equal(shown[0][name]["observation"], expected[0][name]["observation"])


def test_agents_without_masks_see_boxes_and_actions_are_boxes_where_they_are_continuous() -> None:
    rovers = bm3il.as_parallel_env("rover_tower?pairs=2")
    assert rovers.possible_agents == ["rover_0", "rover_1", "tower_0", "tower_1"]
    assert rovers.observation_space("rover_0").shape == (11,)
    assert rovers.action_space("tower_1") == spaces.Discrete(5)
    pytest.importorskip("mpe2")
    assert bm3il.as_parallel_env(SPREAD).action_space("agent_0") == spaces.Box(-1, 1, (5,), np.float32)


def test_agents_that_die_terminate_and_those_that_appear_observe() -> None:
    world = bm3il.as_parallel_env("pettingzoo:odd_world?arguments=quirk:relay")
    world.reset(seed=0)
    assert world.agents == ["ant_0", "ant_1"]
    last: tuple[Any, ...] = ()
    for _ in range(3):
        last = world.step(dict.fromkeys(world.agents, 1))
    assert world.agents == ["bee_0"]
    assert last[2] == {"ant_0": True, "ant_1": True, "bee_0": False}
    assert not last[0]["ant_0"]["observation"].any()
    assert last[0]["bee_0"]["observation"].any()


class Coming:
    """Two agents, of whom `there` tells in which steps who is active; each step gives 1 to both."""

    def __init__(self, there: list[list[int]], ends: bool = True) -> None:
        self.there, self.num_envs, self.ends = there, 1, ends
        self.spec = EnvironmentSpec("coming", (TypeSpec("ant", 2, 1, 3),), len(there) - 1)
        self.rewards = [np.ones((1, 2), np.float32)]  # the same array in every step
        self.done: list[list[int]] = []

    def reset(self, seed: int, starts: object = None) -> TimeStep:
        self.steps = 0
        return self.shown()

    def step(self, actions: Any) -> TimeStep:
        self.steps += 1
        self.done.append(actions[0][0].tolist())
        return self.shown()

    def shown(self) -> TimeStep:
        masks = np.array([[[False, True, True]] * 2])
        active = np.array([self.there[min(self.steps, len(self.there) - 1)]], bool)
        over = np.full(1, self.ends and self.steps >= self.spec.episode_length)
        return TimeStep([np.ones((1, 2, 1), np.float32)], [masks], [active], self.rewards, np.zeros(1, bool), over)


def played(there: list[list[int]], ends: bool = True) -> tuple[list[dict[str, float]], Coming]:
    """The rewards of each step of a loop of PettingZoo."""
    inner = Coming(there, ends)
    world, rewards = AsParallel(inner), []
    world.reset(seed=0)
    while world.agents:
        rewards.append(world.step(dict.fromkeys(world.agents, 2))[1])
    return rewards, inner


def test_steps_in_which_nobody_is_there_are_passed_over() -> None:
    rewards, inner = played([[1, 0], [0, 0], [0, 0], [0, 1], [0, 1]])
    assert rewards == [{"ant_0": 3, "ant_1": 3}, {"ant_1": 1}]
    assert inner.done == [[2, 1], [1, 1], [1, 1], [1, 2]], "of those who are not there what is allowed"
    rewards, inner = played([[0, 0], [0, 0], [1, 1], [1, 1]])
    assert (rewards, inner.steps) == ([{"ant_0": 1, "ant_1": 1}], 3), "nor at the start"
    rewards, inner = played([[1, 1], [1, 1], [0, 0], [0, 0]])
    assert (len(rewards), inner.steps) == (2, 3)
    assert len(played([[1, 1], [0, 0], [0, 0]], ends=False)[0]) == 1, "nor for ever"


@pytest.mark.parametrize("action", [-1, 3])
def test_what_is_no_action_is_refused(action: int) -> None:
    world = AsParallel(Coming([[1, 1]] * 3))
    world.reset(seed=0)
    with pytest.raises(InputError, match=rf"ant_1: expected an action in 0\.\.2, got {action}"):
        world.step({"ant_1": action})


def test_episodes_without_a_seed_follow_from_the_last_one() -> None:
    def starts(world: Any) -> list[np.ndarray]:
        return [world.reset(seed=seed)[0]["rover_0"] for seed in (5, None, None)]

    first, second = starts(bm3il.as_parallel_env("rover_tower")), starts(bm3il.as_parallel_env("rover_tower"))
    np.testing.assert_array_equal(first, second)
    assert (first[1] != first[2]).any()


def test_without_pettingzoo_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bm3il.protocol.adapters.as_pettingzoo")
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(InputError, match=r"needs 'pettingzoo': pip install 'bm3il\[pettingzoo\]'"):
        bm3il.as_parallel_env("rover_tower")
