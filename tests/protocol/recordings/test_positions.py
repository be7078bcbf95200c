"""Tables of where agents were, for an environment that can tell what they did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polars")

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import AMBIGUOUS, IMPOSSIBLE, Starts, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import perturbed
from bm3il.protocol.recordings.long_table import read_table
from bm3il.protocol.recordings.positions import retraced
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.protocol.recordings.written import Row, write


class Line:
    """Walkers on the places 0..9: 0 stays, 1 and 2 go right, 3 goes left. They see their place, and how many walk."""

    spec = EnvironmentSpec("line", (TypeSpec("walker", 2, 2, 4), TypeSpec("dog", 1, 2, 4)), 5)
    num_envs = 1
    positions = (("place",), ("place",))

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        return self.show_at([np.zeros((1, t.count, 1)) for t in self.spec.types], 0)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        raise NotImplementedError

    def show_at(self, positions: Sequence[np.ndarray], step: int) -> TimeStep:
        self.shown = positions
        there = [~np.isnan(places[..., 0]) for places in positions]
        if (np.nan_to_num(positions[1]) > 9).any():
            raise InputError(f"step {step}: the dog has left the line")
        count = sum(int(agents.sum()) for agents in there)
        seen = [np.nan_to_num(np.stack([p[..., 0], np.full(p.shape[:2], count)], -1)) for p in positions]
        masks = [np.ones((1, t.count, 4), bool) for t in self.spec.types]
        rewards = [np.nan_to_num(p[..., 0]).astype(np.float32) * (step > 0) for p in positions]
        no = np.zeros(1, bool)
        return TimeStep([s.astype(np.float32) for s in seen], masks, there, rewards, no, no)

    def actions_to(self, positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        ways = [(after - before)[..., 0] for before, after in zip(self.shown, positions, strict=True)]
        return [np.select([way == 0, way == 1, way == -1], [0, AMBIGUOUS, 3], IMPOSSIBLE) for way in ways]


def rows(**ways: Sequence[int | None]) -> list[Row]:
    """Of one episode: where each agent is in each step."""
    return [
        {"episode": 7, "step": step, "agent": agent, "place": place}
        for agent, way in ways.items()
        for step, place in enumerate(way)
        if place is not None
    ]


def read(tmp_path: Path, table: list[Row], environment: Any = None) -> tuple[Demonstrations, list[str]]:
    return read_table(write(tmp_path / "places.csv", table), environment or Line())


def test_positions_become_observations_and_actions(tmp_path: Path) -> None:
    table = rows(walker_0=[5, 4, 4, 5], walker_1=[None, 2, 7, 7], dog=[3, 2, 1, 0])
    found, notes = read(tmp_path, table)
    told, *left_out = notes
    assert told.startswith("no column 'action'")
    assert left_out == [
        "transitions that no action makes, left out: 1",
        "transitions that several actions could have made, left out: 1",
    ]
    assert found.active[0].tolist() == [[True, False], [True, False], [False, True]]
    assert found.active[1].tolist() == [[True]] * 3
    assert found.actions[0][found.active[0]].tolist() == [3, 0, 0]
    assert found.actions[1].tolist() == [[3]] * 3
    assert found.observations[1][:, 0].tolist() == [[3, 2], [2, 3], [1, 3]]
    assert found.returns.tolist() == [[13, 16, 3]], "rewards are of the places where actions lead to"
    assert found.origin == "imported from places.csv, positions; " + "; ".join(left_out)


def test_a_world_that_slips_tells_what_the_one_inside_does(tmp_path: Path) -> None:
    found, _ = read(tmp_path, rows(dog=[3, 2]), perturbed(Line(), slip=0.5))
    assert found.actions[1].tolist() == [[3]]


def test_an_episode_of_positions_has_one_row_more_than_steps(tmp_path: Path) -> None:
    assert read(tmp_path, rows(dog=[5, 4, 3, 2, 1, 0]))[0].num_rows == 5
    with pytest.raises(
        InputError, match=r"places.csv, row 8: expected at most 5 steps, as an episode of 'line' has them"
    ):
        read(tmp_path, rows(dog=[6, 5, 4, 3, 2, 1, 0]))
    with pytest.raises(InputError, match="expected where all went after step 1 of episode '7', found none"):
        read(tmp_path, rows(dog=[6]))


def test_a_place_where_nobody_can_be_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"places.csv: step 1: the dog has left the line"):
        read(tmp_path, rows(dog=[9, 10]))
    with pytest.raises(
        InputError, match=r"places.csv, row 3: expected a number in 'place' \(where it is, of 'dog'\), got 'x'"
    ):
        read(tmp_path, [*rows(dog=[9]), {"episode": 7, "step": 1, "agent": "dog", "place": "x"}])


def test_an_environment_that_cannot_tell_needs_actions(tmp_path: Path) -> None:
    rovers = make_environment("rover_tower?pairs=1", 1)
    table = [{"episode": 0, "step": 0, "agent": "rover", "tower": 0, "symbol": None}]
    with pytest.raises(InputError, match=r"the column 'position.0' .* is missing"):
        read(tmp_path, table, rovers)
    with pytest.raises(InputError, match="does not tell which action leads"):
        retraced(rovers, [])


def test_commuters_are_retraced_from_their_places_alone(tmp_path: Path) -> None:
    """A day at home, but for one who is on a road for two steps."""
    town = make_environment("berlin?types=2&agents=3", 1)
    assert isinstance(town, Berlin)
    steps, home = town.spec.episode_length, town.home.tolist()
    road = int(np.flatnonzero(town.allowed[home[0]])[0])
    agents = [f"{t.name}_{x}" for t in town.spec.types for x in range(t.count)]
    ways = {agent: [place] * (steps + 1) for agent, place in zip(agents, home, strict=True)}
    ways[agents[0]][3:5] = [road, road]
    found, notes = read(tmp_path, rows(**ways), town)
    first = found.active[0][:, 0]
    assert first[:3].all()
    assert not first[3], "he may have wanted to go on"
    assert found.actions[0][:3, 0].tolist() == [home[0], home[0], road]
    assert found.observations[0][3, 0, road] == 1
    assert found.num_rows == steps
    assert sum(int((~active).sum()) for active in found.active) == sum(
        int(note.rpartition(" ")[2]) for note in notes[1:]
    )
    ways[agents[1]][0] = road
    with pytest.raises(InputError, match=r"places.csv: person 1 does not begin the day at home"):
        read(tmp_path, rows(**ways), town)
    ways[agents[1]][0] = 99
    with pytest.raises(InputError, match=r"step 0: person 1 must be at one of the locations 0\.\.55, is at 99"):
        read(tmp_path, rows(**ways), town)
