"""Anybody's loop of PettingZoo, recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpe2")
from gymnasium import spaces
from mpe2 import simple_spread_v3, simple_tag_v3

import bm3il
from bm3il.launch.cli import main
from bm3il.protocol.recordings.spaces import unit
from bm3il.protocol.registry import make_environment

TAG = "pettingzoo:mpe2.simple_tag_v3?arguments=max_cycles:6"


class Leaving:
    """Two agents: the first leaves after two steps. Masks stand in what it observes, or in the infos of the other."""

    possible_agents = ["one_0", "one_1"]  # noqa: RUF012
    max_cycles = 5

    def __init__(self) -> None:
        self.unwrapped = self

    def observation_space(self, name: str) -> Any:
        seen = spaces.Box(-9, 9, (1,))
        return spaces.Dict({"observation": seen, "action_mask": spaces.MultiBinary(3)}) if name == "one_0" else seen

    def action_space(self, name: str) -> Any:
        return spaces.Discrete(3, start=1)

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self.steps, self.buffer = list(self.possible_agents), 0, np.zeros(1, np.float32)
        return self.seen()

    def seen(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self.buffer[:] = self.steps  # the same array in every step
        masked = {"observation": self.buffer, "action_mask": np.array([1, 1, 0])}
        both = {"one_0": masked, "one_1": self.buffer}
        return {a: both[a] for a in self.agents}, {"one_1": {"action_mask": np.array([0, 1, 1])}}

    def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
        self.steps += 1
        over = {a: self.steps >= (2 if a == "one_0" else 3) for a in self.agents}
        rewards = {a: float(actions.get(a, 0)) for a in self.agents}
        seen, infos = self.seen()
        self.agents = [a for a in self.agents if not over[a]]
        return seen, rewards, over, dict.fromkeys(over, False), infos

    def close(self) -> None: ...


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("leaving")
    module.parallel_env = Leaving  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "leaving", module)
    return "pettingzoo:leaving"


def chased(cycles: int = 6) -> bm3il.Recorder:
    return bm3il.Recorder(simple_tag_v3.parallel_env(max_cycles=cycles), TAG)


def played(env: Any, episodes: int) -> Any:
    """The same environment, after random actions in so many episodes."""
    for episode in range(episodes):
        env.reset(seed=episode)
        random = np.random.default_rng(episode)
        while env.agents:
            env.step({agent: int(random.integers(5)) for agent in env.agents})
    return env


def test_what_was_played_is_what_the_adapter_would_have_seen() -> None:
    recorded = played(chased(), 3).demonstrations()
    world = make_environment(TAG, 1)
    recorded.check_against(world.spec)
    assert recorded.episode_lengths.tolist() == [6, 6, 6]
    assert [a.shape for a in recorded.actions] == [(18, 3), (18, 1)]
    env = simple_tag_v3.parallel_env(max_cycles=6)
    seen, _ = env.reset(seed=2)
    for x in range(3):
        np.testing.assert_array_equal(recorded.observations[0][12, x], seen[f"adversary_{x}"])
    random = np.random.default_rng(2)
    assert recorded.actions[0][12].tolist() == random.integers(5, size=3).tolist()
    assert recorded.return_mean is not None


def test_everything_else_is_the_environments_own(leaving: str) -> None:
    env = bm3il.Recorder(Leaving(), leaving)
    assert env.possible_agents == ["one_0", "one_1"]
    assert env.action_space("one_0").n == 3
    observations, _ = env.reset(seed=1)
    assert set(observations) == {"one_0", "one_1"}
    assert len(env.step({"one_0": 1, "one_1": 2})) == 5
    with pytest.raises(AttributeError, match="nothing_like_that"):
        env.nothing_like_that  # noqa: B018


def test_who_leaves_is_inactive_and_masks_are_kept(leaving: str) -> None:
    env = bm3il.Recorder(Leaving(), leaving)
    env.reset()
    while env.agents:
        env.step(dict.fromkeys(env.agents, 2))
    env.reset()
    env.step({"one_1": 3})  # and left after one step, in which the other did nothing
    found = env.demonstrations("mine")
    assert (found.episode_lengths.tolist(), found.origin) == ([3, 1], "mine")
    assert found.active[0].tolist() == [[True, True], [True, True], [False, True], [False, True]]
    assert found.observations[0][:3, 1, 0].tolist() == [0, 1, 2]
    assert found.actions[0][:, 1].tolist() == [1, 1, 1, 2]
    assert found.action_masks[0][1].tolist() == [[True, True, False], [False, True, True]]
    assert found.returns.tolist() == [[4, 6], [0, 3]]


def test_actions_of_a_box_are_scaled() -> None:
    name = "pettingzoo:mpe2.simple_spread_v3?arguments=N:2,max_cycles:3,continuous_actions:true"
    env = bm3il.Recorder(simple_spread_v3.parallel_env(N=2, max_cycles=3, continuous_actions=True), name)
    env.reset(seed=1)
    for value in (0, 0.25, 1):
        env.step({agent: np.full(5, value, np.float32) for agent in env.agents})
    assert env.demonstrations().actions[0][:, 0, 0].tolist() == [-1, -0.5, 1]
    box = spaces.Box(np.array([[0, -1]], np.float32), np.array([[2, -1]], np.float32))
    assert unit(box, np.array([[[1.5, -1]]])).tolist() == [[0.5, 0]]
    assert unit(box, np.array([[2.0000001, -1]])).tolist() == [1, 0]
    assert unit(box, np.array([[3, -1]])).tolist() == [2, 0], "which is refused, as no action of the box"


def test_what_is_wrong_is_named(leaving: str) -> None:
    with pytest.raises(bm3il.InputError, match="for environments of PettingZoo"):
        bm3il.Recorder(Leaving(), "rover_tower")
    with pytest.raises(bm3il.InputError, match=r"has the agents adversary_0, .*, and not one_0, one_1"):
        bm3il.Recorder(Leaving(), TAG)
    with pytest.raises(bm3il.InputError, match="nothing is recorded yet"):
        bm3il.Recorder(Leaving(), leaving).demonstrations()
    with pytest.raises(bm3il.InputError, match=r"episode 0, step 6, .*: expected episodes of at most 6 steps"):
        played(chased(8), 1).demonstrations()
    more = bm3il.Recorder(simple_tag_v3.parallel_env(num_obstacles=3), TAG)
    more.reset(seed=1)
    with pytest.raises(bm3il.InputError, match=r"adversary_0 observes 18 numbers .* 16 and 5: name what is recorded"):
        more.step(dict.fromkeys(more.agents, 0))
    forbidden = bm3il.Recorder(Leaving(), leaving)
    forbidden.reset()
    forbidden.step({"one_0": 3, "one_1": 2})
    with pytest.raises(bm3il.InputError, match=r"episode 0, step 0, one_0: expected an allowed action \(0, 1\), got 2"):
        forbidden.demonstrations()


def test_it_trains_from_what_was_recorded(tmp_path: Path) -> None:
    file = str(tmp_path / "tag.safetensors")
    played(chased(), 4).save(file)
    tiny = ["--steps", "24", "--actor.steps-per-iteration", "12", "--learner.updates", "1", "--learner.batch-size", "8"]
    few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
    some = [
        "--reward.updates",
        "1",
        "--reward.batch-size",
        "8",
        "--learner.start",
        "random",
        "--learner.policy",
        "actor",
    ]
    place = ["--runs-folder", str(tmp_path), "--run", "tag", "--mode", "serial"]
    assert main(["train", "--environment", TAG, "--demonstrations", file, *tiny, *few, *some, *place]) == 0
    result = json.loads((tmp_path / "tag" / "result.json").read_text())
    assert (result["status"], result["iterations"]) == ("finished", 2)


def test_any_environment_of_ours_is_recorded_as_parallel_env() -> None:
    """With its masks, and as its spec describes what is observed."""
    name = "berlin?scenario=berlin46&types=2&agents=4&sight=near"
    env = bm3il.Recorder(bm3il.as_parallel_env(name), name)
    seen, _ = env.reset(seed=4)
    for _ in range(3):
        env.step({agent: int(np.flatnonzero(seen[agent]["action_mask"])[-1]) for agent in env.agents})
        seen = env._observations
    found, world = env.demonstrations(), make_environment(name, 1)
    now = world.reset(4)
    assert found.spec == world.spec
    for step in range(3):
        last = [mask.shape[-1] - 1 - mask[..., ::-1].argmax(-1) for mask in now.action_masks]
        for m, chosen in enumerate(last):
            np.testing.assert_array_equal(found.observations[m][step], now.observations[m][0])
            np.testing.assert_array_equal(found.actions[m][step], chosen[0])
        now = world.step(last)
    with pytest.raises(bm3il.InputError, match=r"and for bm3il\.as_parallel_env"):
        bm3il.Recorder(simple_tag_v3.parallel_env(), name)


@pytest.mark.parametrize("names", ["a_1+a_0", "alice+bob", "player_1+player_2"])
def test_environments_of_pettingzoo_are_recorded_as_parallel_env_whatever_their_agents_are_called(
    names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """as_parallel_env counts agents in their order, by names that PettingZoo's own may have for others."""

    class Named(Leaving):
        def __init__(self, names: str) -> None:
            super().__init__()
            self.possible_agents = names.split("+")

        def observation_space(self, name: str) -> Any:
            return spaces.Box(-9, 9, (1,), np.float32)

        def seen(self) -> tuple[dict[str, Any], dict[str, Any]]:
            return {a: np.array([n], np.float32) for n, a in enumerate(self.possible_agents)}, {}

    module = ModuleType("named")
    module.parallel_env = Named  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "named", module)
    name = f"pettingzoo:named?arguments=names:{names}"
    env = bm3il.Recorder(bm3il.as_parallel_env(name), name)
    seen, _ = env.reset(seed=1)
    env.step({agent: int(seen[agent]["observation"][0]) for agent in env.agents})
    found = env.demonstrations()
    assert np.concatenate([seen[0, :, 0] for seen in found.observations]).tolist() == [0, 1]
    assert np.concatenate([done[0] for done in found.actions]).tolist() == [0, 1]
    with pytest.raises(bm3il.InputError, match=r"is another environment than is played \(.*\): name what is recorded"):
        bm3il.Recorder(bm3il.as_parallel_env(name), "rover_tower")
