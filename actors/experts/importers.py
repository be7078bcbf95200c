"""Demonstrations from the files of others."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bm3il.actors.environments.berlin.environment import Berlin, berlin_of
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment
from bm3il.protocol.trajectories import Trajectories, columns_of

MAX_UNPACKED_BYTES = 1 << 30


def import_rover_tower(path: str | Path, keep_duplicates: bool = False) -> Demonstrations:
    """Demonstrations from an npz of the Rover Tower experts that the paper's authors trained.

    Fields, for E episodes of 25 steps and P pairs: `rover_obs` [E, 25, P, P+9], `tower_obs` [E, 25, P, P+4],
    `rover_act`, `tower_act`, `rover_reward`, `tower_reward` [E, 25, P], `goal_pos` [E, P, 2] (of each tower's pair),
    `tower_listener` [E, P] (the rover that each tower guides), `start_group` [E], `is_duplicate` [E].
    Episodes that are copies of others are left out unless `keep_duplicates`; episodes of one start form a group.

    Raises InputError if the file is not such an npz or its values are not a Rover Tower's.
    """
    try:
        return _convert(_read(Path(path)), Path(path).name, keep_duplicates)
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: expected an npz of Rover Tower demonstrations: {error}") from error


def import_day(path: str | Path, environment: str) -> tuple[Demonstrations, int]:
    """Demonstrations from an npz of one recorded day in a town, and how many recorded moves were left out.

    Field `person_location` [T+1, N]: where each of N persons is in each minute, numbered as in the `locations.csv` that
    the scenario was made of: facilities before roads. What they saw is worked out by the environment. A move that is
    no single transition of the scenario is left out: its agent is inactive in that step.
    Raises InputError if the file is not such an npz, or its day does not fit the environment.
    """
    town = berlin_of(make_environment(environment, 1))
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise InputError(f"it unpacks to more than the {MAX_UNPACKED_BYTES} bytes allowed")
            recorded = _field(file, "person_location", None).astype(np.int64)
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path}: expected an npz of a day in a town: {error}") from error
    facilities, places = town.scenario.num_facilities, town.scenario.num_locations
    steps, agents = town.spec.episode_length, town.spec.num_agents
    if recorded.ndim != 2 or recorded.shape[0] < steps + 1 or recorded.shape[1] != agents:
        raise InputError(f"{path}: expected {steps + 1} or more minutes of {agents} persons, found {recorded.shape}")
    if recorded.min() < 0 or recorded.max() >= places:
        raise InputError(f"{path}: locations must lie in 0..{places - 1}")
    location = np.where(recorded < facilities, recorded + town.scenario.num_roads, recorded - facilities)
    if (location[0] != town.home).any():
        raise InputError(f"{path}: person {int((location[0] != town.home).argmax())} does not begin the day at home")
    trajectories, left_out = _replayed(town, location[: steps + 1])
    origin = f"recorded day {Path(path).name}; {left_out} moves left out"
    return Demonstrations.from_trajectories(trajectories, town.spec, origin), left_out


def _replayed(town: Berlin, location: np.ndarray) -> tuple[Trajectories, int]:
    """A day [T+1, N] as one episode."""
    spec, steps = town.spec, len(location) - 1
    day = Trajectories.zeros(spec, 1)
    day.truncated[-1] = True
    allowed = town.allowed[location[:-1], location[1:]]
    active, actions, rewards = (day.arrays[f"0.{name}"][:, 0] for name in ("active", "actions", "rewards"))
    active[:-1], active[-1] = allowed, True
    actions[:] = np.where(allowed, location[1:], location[:-1])
    town.reset(0)
    for t in range(steps + 1):
        now = town.show(location[t][None], t)
        for name, column in columns_of(day.arrays, 0).items():
            column[t] = now.seen(spec)[0].columns[name]
        if t:
            rewards[t - 1] = np.concatenate(now.rewards, axis=1)
    return Trajectories.from_arrays(day.arrays, spec), int((~allowed).sum())


def _read(path: Path) -> dict[str, np.ndarray]:
    # A small archive can unpack to any size, so the sizes it states are checked before anything is unpacked.
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    if unpacked_bytes > MAX_UNPACKED_BYTES:
        raise InputError(f"it unpacks to {unpacked_bytes} bytes, more than the {MAX_UNPACKED_BYTES} allowed")
    with np.load(path, allow_pickle=False) as file:
        return {name: _field(file, name, shape) for name, shape in _shapes(file).items()}


def _shapes(file: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    goals = _field(file, "goal_pos", None)
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


def _field(file: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    if name not in file:
        raise InputError(f"the field '{name}' is missing")
    array = file[name]
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected numbers, found {array.dtype}")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")
    return array


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
