"""Demonstrations from the files of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bm3il.actors.environments.berlin.environment import berlin_of
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.arrays import field, opened
from bm3il.protocol.recordings.positions import retraced
from bm3il.protocol.registry import make_environment

MAX_UNPACKED_BYTES = 1 << 30
DAY = "person_location"
"""The array of a recorded day."""


def import_rover_tower(path: str | Path, keep_duplicates: bool = False) -> Demonstrations:
    """Demonstrations from an npz of the Rover Tower experts that the paper's authors trained.

    Fields, for E episodes of 25 steps and P pairs: `rover_obs` [E, 25, P, P+9], `tower_obs` [E, 25, P, P+4],
    `rover_act`, `tower_act`, `rover_reward`, `tower_reward` [E, 25, P], `goal_pos` [E, P, 2] (of each tower's pair),
    `tower_listener` [E, P] (the rover that each tower guides), `start_group` [E], `is_duplicate` [E].
    Episodes that are copies of others are left out unless `keep_duplicates`; episodes of one start form a group.

    Raises InputError if the file is not such an npz or its values are not a Rover Tower's.
    """
    with opened(path, "Rover Tower demonstrations", MAX_UNPACKED_BYTES) as file:
        fields = {name: field(file, name, shape) for name, shape in _shapes(file).items()}
        return _convert(fields, Path(path).name, keep_duplicates)


def import_day(path: str | Path, environment: str) -> tuple[Demonstrations, list[str]]:
    """Demonstrations from an npz of one recorded day in a town, and what was left out of it, in words.

    Field `person_location` [T+1, N]: where each of N persons is in each minute, numbered as in the `locations.csv` that
    the scenario was made of: facilities before roads. What they saw and did is worked out by the environment. Agents
    are inactive in steps of which it cannot tell what they did.
    Raises InputError if the file is not such an npz, or its day does not fit the environment.
    """
    town = berlin_of(make_environment(environment, 1))
    with opened(path, "a day in a town", MAX_UNPACKED_BYTES) as file:
        recorded = field(file, DAY, None).astype(np.int64)
    facilities, places = town.scenario.num_facilities, town.scenario.num_locations
    steps, agents = town.spec.episode_length, town.spec.num_agents
    if recorded.ndim != 2 or recorded.shape[0] < steps + 1 or recorded.shape[1] != agents:
        raise InputError(f"{path}: expected {steps + 1} or more minutes of {agents} persons, found {recorded.shape}")
    # Before they are renumbered, which would make some other place of −1.
    if recorded.min() < 0 or recorded.max() >= places:
        raise InputError(f"{path}: locations must lie in 0..{places - 1}")
    location = np.where(recorded < facilities, recorded + town.scenario.num_roads, recorded - facilities)
    positions = [location[: steps + 1, town.spec.agents(m), None].astype(float) for m in range(town.spec.num_types)]
    try:
        day = retraced(town, [positions])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    origin = "; ".join([f"recorded day {Path(path).name}", *day.left_out])
    return Demonstrations.from_trajectories(day.trajectories, town.spec, origin), day.left_out


def _shapes(file: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    goals = field(file, "goal_pos", None)
    if goals.ndim != 3 or goals.shape[2] != 2 or not goals.size:
        raise InputError(f"goal_pos: expected [episodes, pairs, 2], found {list(goals.shape)}")
    episodes, pairs, _ = goals.shape
    steps = (episodes, RoverTower(1, pairs).spec.episode_length, pairs)
    return {
        "rover_obs": (*steps, pairs + 9),
        "tower_obs": (*steps, pairs + 4),
        **dict.fromkeys(("rover_act", "tower_act", "rover_reward", "tower_reward"), steps),
        "goal_pos": (episodes, pairs, 2),
        "tower_listener": (episodes, pairs),
        "start_group": (episodes,),
        "is_duplicate": (episodes,),
    }


def _convert(fields: dict[str, np.ndarray], name: str, keep_duplicates: bool) -> Demonstrations:
    if not keep_duplicates:
        unique = ~fields["is_duplicate"].astype(bool)
        fields = {key: array[unique] for key, array in fields.items()}
    episodes, steps, pairs = fields["rover_act"].shape

    def rows(key: str, dtype: type) -> np.ndarray:
        return fields[key].reshape(episodes * steps, *fields[key].shape[2:]).astype(dtype)

    spec = RoverTower(1, pairs).spec
    rewards = np.concatenate([fields["rover_reward"], fields["tower_reward"]], axis=2)
    demonstrations = Demonstrations.of_types(
        spec=spec.plain(),
        origin=f"imported from {name}, without copies of episodes" if not keep_duplicates else f"imported from {name}",
        observations=[rows("rover_obs", np.float32), rows("tower_obs", np.float32)],
        actions=[rows("rover_act", np.int64), rows("tower_act", np.int64)],
        action_masks=[np.ones((episodes * steps, pairs, t.action_dim), bool) for t in spec.types],
        active=[np.ones((episodes * steps, pairs), bool) for _ in spec.types],
        episode_lengths=np.full(episodes, steps),
        returns=rewards.sum(axis=1, dtype=np.float64).astype(np.float32),
        groups=fields["start_group"].astype(np.int64),
        starts={
            "rover_positions": np.ascontiguousarray(fields["rover_obs"][:, 0, :, -4:-2]),
            "goal_positions": fields["goal_pos"],
            "rover_of_tower": fields["tower_listener"].astype(np.int64),
        },
    )
    RoverTower(episodes, pairs).reset(0, demonstrations.starts)  # refuses start states that are none
    return demonstrations.in_form_of(spec)
