"""Scenarios of VMAS, batched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vmas")

import bm3il
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.adapters.vmas import Vmas
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

SPREAD = "vmas:simple_spread?n_agents=2&max_steps=5"


@pytest.mark.parametrize(
    "name",
    [
        SPREAD,
        "vmas:simple_tag?continuous_actions=false&max_steps=10",
        "vmas:simple_speaker_listener?max_steps=5",
        "vmas:wheel?max_steps=2",
        "vmas:balance?n_agents=3&random_package_pos_on_line=false&max_steps=20",
        "vmas:football?n_blue_agents=2&n_red_agents=2&ai_red_agents=false&dict_obs=true&max_steps=5",
        f"{SPREAD}&noise=0.5",
    ],
)
def test_they_keep_the_contract(name: str) -> None:
    assert check_environment(name) == 0
    assert make_environment(name, 1).spec.name == name


def test_types_are_read_from_names_or_given() -> None:
    spec = make_environment("vmas:simple_tag?num_good_agents=2", 1).spec
    assert [(t.name, t.count) for t in spec.types] == [("adversary", 3), ("agent", 2)]
    given = make_environment(f"{SPREAD}&types=agent_1,agent_0", 1).spec
    assert [(t.name, t.count) for t in given.types] == [("agent_1", 1), ("agent_0", 1)]


def test_what_changes_no_observation_is_no_other_view() -> None:
    spec = make_environment(SPREAD, 1).spec
    assert spec.view == "vmas:simple_spread?n_agents=2"
    assert make_environment(f"{SPREAD}&obs_agents=false", 1).spec.view == f"{spec.view}&obs_agents=false"


def test_actions_are_scaled_to_what_each_agent_can_do() -> None:
    environment = make_environment("vmas:simple_reference?max_steps=5", 1)
    assert isinstance(environment, Vmas)
    (bounds,) = environment._bounds
    assert bounds is not None
    low, high = bounds
    assert (low[0].tolist(), high[0].tolist()) == ([-1, -1] + [0] * 10, [1, 1] + [1] * 10), "its words are in 0..1"
    environment.reset(0)
    environment.step([np.full((1, 2, 12), -3, np.float32)])  # VMAS itself raises for what is out of its range
    for agent in environment._env.agents:
        assert not agent.action.c.any()


def test_agents_move_as_they_act_and_get_their_own_rewards() -> None:
    environment = make_environment("vmas:simple_tag?num_good_agents=1&num_adversaries=2&max_steps=9", 3)
    before = environment.reset(4).observations
    now = environment.step([np.zeros((3, 2, 2), np.float32), np.tile(np.float32([1, 0]), (3, 1, 1))])
    moved = now.observations[1][:, 0, :2] - before[1][:, 0, :2]
    assert (moved[:, 0] > 0.01).all()
    np.testing.assert_allclose(moved[:, 1], 0, atol=1e-6)
    assert [rewards.shape for rewards in now.rewards] == [(3, 2), (3, 1)]


def test_an_end_terminates_and_a_limit_truncates() -> None:
    push = [np.tile(np.linspace(0, 1, 8, dtype=np.float32)[:, None, None], (1, 3, 2))]

    def played(max_steps: int) -> Iterator[TimeStep]:
        environment = make_environment(f"vmas:balance?max_steps={max_steps}", 8)
        environment.reset(0)
        while True:
            yield environment.step(push)

    first, now = next((t, now) for t, now in enumerate(played(100), 1) if now.terminated.any())
    assert not now.terminated.all()
    assert not now.truncated.any()
    assert now.active[0].all(), "they lived to see it"
    for t, cut in zip(range(1, first + 2), played(first), strict=False):  # it falls in the very step of the limit
        if t == first:
            np.testing.assert_array_equal(cut.terminated, now.terminated)
            assert cut.active[0].all()
    np.testing.assert_array_equal(cut.truncated, ~now.terminated)
    np.testing.assert_array_equal(cut.terminated, now.terminated)
    assert not cut.active[0].any()
    assert not cut.observations[0].any()


def test_environments_of_one_process_do_not_share_chances() -> None:
    def played(other: bool) -> np.ndarray:
        # Targets that are found come back somewhere else: chances of every step.
        environment = make_environment(
            "vmas:discovery?n_agents=2&agents_per_target=1&covering_range=9&lidar_range=3", 2
        )
        environment.reset(1)
        if other:
            make_environment(SPREAD, 2).reset(9)
        actions = [np.zeros((2, t.count, t.action_dim), np.float32) for t in environment.spec.types]
        return np.stack([environment.step(actions).observations[0] for _ in range(3)])

    alone = played(other=False)
    assert (alone[0] != alone[1]).any()
    np.testing.assert_array_equal(played(other=True), alone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vmas", "unknown scenario of VMAS ''"),
        ("vmas:simple_spraed", "unknown scenario of VMAS 'simple_spraed'; did you mean simple_spread"),
        (
            "vmas:simple_spread?n_agnts=4",
            "unknown argument of the scenario simple_spread 'n_agnts'; did you mean n_agents",
        ),
        ("vmas:simple_spread?n_agents=many", "vmas:simple_spread cannot be made: TypeError"),
        ("vmas:simple_spread?max_steps=0", "expected num_envs and max_steps ≥ 1"),
        ("vmas:simple_spread?types=agent_0", "types must name each agent once"),
        ("vmas:simple_tag?types=adversary_0+adversary_1+adversary_2+agent_0", "adversary_0 and agent_0 differ"),
        ("vmas:simple_spread?processes=2", "cannot be divided among processes"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        make_environment(name, 2)
    assert "\n" not in str(raised.value)


def test_start_states_are_refused() -> None:
    with pytest.raises(InputError, match="cannot start from given states"):
        make_environment(SPREAD, 1).reset(0, {"places": np.zeros((1, 2))})


def test_nothing_but_its_adapter_imports_it() -> None:
    folder = Path(bm3il.__file__).parent
    files = [
        file
        for room in ("protocol", "actors", "learner", "reward_server", "launch")
        for file in (folder / room).rglob("*.py")
    ]
    importing = [file.name for file in files if re.search(r"^\s*(?:import|from) vmas\b", file.read_text(), re.M)]
    assert importing == ["vmas.py"]


@pytest.mark.parametrize(("place", "pixel"), [((0.9, 0.0), (200, 350)), ((0.0, -0.9), (350, 200))])
def test_the_first_copy_is_drawn_from_above(place: tuple[float, float], pixel: tuple[int, int]) -> None:
    environment = make_environment("vmas:navigation?n_agents=1", 2, drawn=True)
    assert isinstance(environment, Vmas)
    environment.reset(0)
    world = environment._env.world
    (agent,), (goal,) = world.agents, world.landmarks
    for entity, (x, y) in ((agent, place), (goal, (-0.5, 0.5))):
        position = entity.state.pos.clone()
        position[0, 0], position[0, 1] = x, y
        entity.set_pos(position, batch_index=None)
    picture = environment.render()
    assert (picture.dtype, picture.shape) == (np.uint8, (400, 400, 3))
    np.testing.assert_allclose(picture[pixel], np.multiply(agent.color, 255), atol=1)
    np.testing.assert_allclose(picture[117, 117], np.multiply(goal.color, 255), atol=1)
    assert (picture[200, 200] == 255).all()
