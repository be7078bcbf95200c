"""Somebody else's environments, through PettingZoo's parallel API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mpe2")
from gymnasium import spaces

from bm3il.launch.cli import main
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.adapters.spaces import parted, parts_of, taker, unmasked
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.registry import make_environment

SPREAD = "pettingzoo:mpe2.simple_spread_v3"


class Dying:
    """Two agents count; the first dies after two steps, the other terminates after four. The second has a mask."""

    possible_agents = ["walker_0", "walker_1"]  # noqa: RUF012
    max_cycles = 9

    def __init__(self, bonus: float = 1.0, shape: int = 1) -> None:
        self.bonus, self.shape = bonus, shape
        self.unwrapped = self

    def observation_space(self, name: str) -> Any:
        seen = spaces.Box(-9, 9, (self.shape if name == "walker_1" else 1,))
        return spaces.Dict({"observation": seen, "action_mask": spaces.MultiBinary(3)})

    def action_space(self, name: str) -> Any:
        return spaces.Discrete(3)

    def reset(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents, self.steps, self.start = list(self.possible_agents), 0, seed % 5
        return self.observed(), {}

    def observed(self) -> dict[str, Any]:
        value = np.full(1, self.start + self.steps, np.float32)
        return {name: {"observation": value, "action_mask": np.array([1, 0, 1])} for name in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[Any, ...]:
        assert set(actions) == set(self.agents)
        self.steps += 1
        over = {name: self.steps >= (2 if name == "walker_0" else 4) for name in self.agents}
        rewards = {name: self.bonus * actions[name] for name in self.agents}
        result = self.observed(), rewards, over, dict.fromkeys(self.agents, False), {}
        self.agents = [name for name in self.agents if not over[name]]
        return result

    def close(self) -> None:
        self.agents = []


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("dying")
    module.parallel_env = Dying  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dying", module)


@pytest.mark.parametrize(
    "name",
    [
        SPREAD,
        f"{SPREAD}?arguments=N:4,max_cycles:10,continuous_actions:true",
        "pettingzoo:mpe2.simple_adversary_v3",
        "pettingzoo:mpe2.simple_tag_v3?arguments=max_cycles:7",
        "pettingzoo:dying",
    ],
)
def test_they_keep_the_contract(name: str) -> None:
    assert check_environment(name) == 0


def test_types_are_read_from_names_or_given() -> None:
    spec = make_environment("pettingzoo:mpe2.simple_tag_v3", 1).spec
    assert [(t.name, t.count) for t in spec.types] == [("adversary", 3), ("agent", 1)]
    given = make_environment(f"{SPREAD}?types=agent_2,agent_0+agent_1", 1).spec
    assert [(t.name, t.count) for t in given.types] == [("agent_2", 1), ("type1", 2)]


def test_agents_that_die_are_inactive_and_the_last_ends_the_episode() -> None:
    environment = make_environment("pettingzoo:dying?arguments=bonus:2", 2)
    now = environment.reset(0)
    assert now.action_masks[0][0].tolist() == [[True, False, True]] * 2
    history = []
    for _ in range(5):
        now = environment.step([np.full((2, 2), 2)])
        history.append((now.active[0][0].tolist(), now.rewards[0][0].tolist(), bool(now.terminated[0])))
    assert history == [
        ([True, True], [4, 4], False),
        ([False, True], [4, 4], False),
        ([False, True], [0, 4], False),
        ([False, True], [0, 4], True),
        ([False, False], [0, 0], True),
    ]
    assert not now.truncated.any()


def test_a_time_limit_truncates() -> None:
    environment = make_environment(f"{SPREAD}?arguments=max_cycles:3", 2)
    environment.reset(0)
    for _ in range(3):
        now = environment.step([np.zeros((2, 3), int)])
    assert now.truncated.all()
    assert not now.terminated.any()
    assert now.active[0].all()


def test_seeds_decide_and_copies_differ() -> None:
    environment = make_environment(SPREAD, 2)
    first = environment.reset(1).observations[0].copy()
    assert (environment.reset(2).observations[0] != first).any()
    np.testing.assert_array_equal(environment.reset(1).observations[0], first)
    assert (first[0] != first[1]).any()


def test_boxes_are_scaled() -> None:
    boxes = [
        spaces.Box(np.array([-2, 0], np.float32), np.array([2, 5], np.float32)),
        spaces.Box(0, 3, (2, 1), np.int64),
    ]
    given = np.array([[[-1, -1], [-1, 2]], [[1, 1], [0.3, 0.4]], [[0, -9], [0, 0]]], np.float32)  # [E, X, A]
    taken = taker(boxes)(given)
    assert [row[0].tolist() for row in taken] == [[-2, 0], [2, 5], [0, 0]]
    assert [row[1].tolist() for row in taken] == [[[0], [3]], [[2], [2]], [[2], [2]]]
    assert all(box.contains(member) for row in taken for box, member in zip(boxes, row, strict=True))
    for dtype in (np.float32, np.float64):  # −0.1 + (0.2 − −0.1) is more than 0.2
        narrow = spaces.Box(dtype(-0.1), dtype(0.2), (1,), dtype)
        assert narrow.contains(taker([narrow])(np.ones((1, 1, 1), np.float32))[0][0])


def test_discrete_actions_begin_where_their_space_does() -> None:
    assert taker([spaces.Discrete(3), spaces.Discrete(3, start=-1)])(np.array([[0, 0], [2, 2]])) == [[0, -1], [2, 1]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pettingzoo:mpe2.simple_spraed_v3", "did you mean simple_spread_v3"),
        ("pettingzoo:json", "offers no parallel_env"),
        ("pettingzoo", "offers no parallel_env"),
        (f"{SPREAD}?types=agent_0", "types must name each agent once"),
        (f"{SPREAD}?arguments=M:3", "cannot be made with arguments M:3: TypeError"),
        (f"{SPREAD}?arguments=N", "expected NAME:VALUE"),
        ("pettingzoo:dying?arguments=shape:2", "walker_0 and walker_1 differ"),
    ],
)
def test_what_cannot_be_made_is_said(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_environment(name, 1)


def test_an_environment_must_tell_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dying, "max_cycles", None)
    with pytest.raises(InputError, match="episode_length"):
        make_environment("pettingzoo:dying", 1)
    assert make_environment("pettingzoo:dying?episode_length=5", 1).spec.episode_length == 5


def test_start_states_are_refused() -> None:
    with pytest.raises(InputError, match="cannot start from given states"):
        make_environment(SPREAD, 1).reset(0, {"places": np.zeros((1, 2))})


def test_it_trains(tmp_path: Path) -> None:
    tiny = ["--steps", "50", "--actor.steps-per-iteration", "25", "--learner.updates", "1", "--learner.batch-size", "8"]
    few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
    place = ["--runs-folder", str(tmp_path), "--run", "spread", "--mode", "serial", "--learner.start", "random"]
    assert main(["train", "--environment", SPREAD, "--algorithm", "maac", *tiny, *few, *place]) == 0
    result = SimpleNamespace(**json.loads((tmp_path / "spread" / "result.json").read_text()))
    assert (result.status, result.environment) == ("finished", SPREAD)


def test_entries_of_a_dictionary_are_named_parts() -> None:
    from gymnasium.spaces.utils import flatten

    pair = spaces.Dict({"goal": spaces.Discrete(3), "near": spaces.Box(-1, 1, (2, 2))})
    space = spaces.Dict({"own": spaces.Box(-1, 1, (2,)), "world": pair})
    parts = [(part.name, part.width) for part in parts_of(space)]
    assert parts == [("own", 2), ("world.goal", 3), ("world.near", 4)]
    seen = {"own": np.full(2, 5.0), "world": {"goal": 1, "near": np.full((2, 2), 7.0)}}
    assert flatten(space, seen).tolist() == [5, 5, 0, 1, 0, 7, 7, 7, 7]
    assert parts_of(spaces.Box(-1, 1, (2,))) == ()


def test_a_mask_is_parted_from_all_that_is_observed_beside_it() -> None:
    mask, box = spaces.MultiBinary(2), spaces.Box(-1, 1, (2,))
    seen, allowed = {"action_mask": np.array([0, 1]), "observation": np.ones(2)}, [0, 1]
    assert unmasked(spaces.Dict({"action_mask": mask, "observation": box})) == box
    assert [part.tolist() for part in parted(seen)] == [[1, 1], allowed]
    assert unmasked(spaces.Dict({"action_mask": mask, "observation": box, "goal": box})) == spaces.Dict(
        {"goal": box, "observation": box}
    )
    with_goal = {**seen, "goal": np.zeros(2)}
    assert parted(with_goal)[0] is with_goal
    assert parted({"observation": 1}) == ({"observation": 1}, None)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "pettingzoo:picture_world?arguments=agents:2,side:6"


def test_spaces_of_integers_are_kept_as_integers(pictures: str) -> None:
    assert check_environment(pictures) == 0
    environment = make_environment(pictures, 2)
    now = environment.reset(0)
    (form,) = forms(environment.spec)
    assert form.table_of(2)["uint8"] == ("uint8", (2, 2, 108))
    assert now.columns is not None
    assert {name: str(array.dtype) for name, array in now.columns[0].items()} == {"uint8": "uint8", "masks": "bool"}
    assert now.observations[0].dtype == np.float32
    assert set(np.unique(now.observations[0])) == {0, 128, 255}  # as they are, and not scaled


def test_entries_of_a_dictionary_are_each_kept_in_the_fewest_bytes(pictures: str) -> None:
    name = f"{pictures},quirk:dict"
    assert check_environment(name) == 0
    environment = make_environment(name, 1)
    kinds = {part.name: (part.width, part.kind) for part in environment.spec.types[0].parts}
    assert kinds == {
        "picture": (108, "uint8"),
        "moves": (1, "int16"),
        "last": (3, "uint8"),
        "lamps": (2, "uint8"),
        "speed": (1, "own"),
    }
    ends = np.cumsum([width for width, _ in kinds.values()])
    seen = dict(zip(kinds, np.split(environment.reset(0).observations[0][0, 0], ends[:-1]), strict=True))
    assert [seen[part].tolist() for part in ("moves", "last", "lamps", "speed")] == [[-400], [1, 0, 0], [1, 0], [0.25]]


def test_what_a_space_of_integers_does_not_hold_is_refused(pictures: str) -> None:
    environment = make_environment(f"{pictures},quirk:scaled", 1)
    with pytest.raises(InputError, match=r"eye_0 observes .*, which is none of the integers of its observation space"):
        environment.reset(0)
