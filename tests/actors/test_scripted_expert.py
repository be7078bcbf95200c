"""The scripted expert, what was recorded of it, and the authors' experts."""

from __future__ import annotations

import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.experts import scripted
from bm3il.actors.experts.importers import import_rover_tower
from bm3il.actors.experts.recording import record
from bm3il.actors.experts.scripted import GROUP, NoExpertError, RoverTowerExpert, expert_for
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.plain import shown

torch.set_num_threads(1)


class Replay:
    """Acts as demonstrated, step after step."""

    def __init__(self, demonstrations: Demonstrations) -> None:
        shape = (demonstrations.num_episodes, -1)
        self._actions = [a.reshape(*shape, a.shape[1]).swapaxes(0, 1) for a in demonstrations.actions]
        self._step = -1

    def act(self, *_: object) -> list[np.ndarray]:
        self._step += 1
        return [actions[self._step] for actions in self._actions]


def assert_replays(demonstrations: Demonstrations, tolerance: float) -> None:
    """From its start states, the actions of the demonstrations lead to its observations and returns."""
    pairs, episodes = demonstrations.spec.types[0].count, demonstrations.num_episodes
    played = rollout(RoverTower(episodes, pairs), Replay(demonstrations), 0, starts=demonstrations.starts)
    again = Demonstrations.from_trajectories(played, played.spec, "")
    for m in range(2):
        np.testing.assert_allclose(again.observations[m], demonstrations.observations[m], rtol=0, atol=tolerance)
    np.testing.assert_allclose(again.returns, demonstrations.returns, rtol=0, atol=25 * tolerance)


@pytest.mark.parametrize("pairs", [4, 2])
def test_expert_solves_the_task_as_well_as_one_who_knows_the_goals(pairs: int) -> None:
    returns = rollout(RoverTower(20_000, pairs), RoverTowerExpert(), 0).returns().mean(axis=1)
    assert returns.mean() > 126, "the greedy rover that knows its goal has 131.9"


def test_expert_uses_the_symbols_alone() -> None:
    """With the messages of another tower, the rovers do not find their goals."""

    class Deaf(RoverTowerExpert):
        def act(self, now: TimeStep, *_: object) -> list[np.ndarray]:
            rover, tower = (array.copy() for array in now.observations)
            rover[..., -9:-4] = np.roll(rover[..., -9:-4], 1, axis=1)
            return super().act(shown([rover, tower], now.action_masks))

    assert rollout(RoverTower(2_000), Deaf(), 0).returns().mean() < 30


def test_expert_is_found_by_spec() -> None:
    assert isinstance(expert_for(RoverTower(1, 3).spec), RoverTowerExpert)
    with pytest.raises(NoExpertError, match="no scripted expert for 'other'; there is one for berlin, rover_tower"):
        expert_for(spec_of("other"))


def spec_of(name: str) -> EnvironmentSpec:
    return EnvironmentSpec(name, (TypeSpec("a", 1, 1, 1),), 1)


class OwnExpert(UniformPolicy):
    """Somebody's own."""


@pytest.fixture
def own_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of somebody's own package."""
    names = {
        "mine": f"{__name__}:OwnExpert",
        "pettingzoo": f"{__name__}:UniformPolicy",
        "pettingzoo:mpe2.simple_tag_v3": f"{__name__}:OwnExpert",
        "moved": f"{__name__}:Nobody",
    }
    points = [EntryPoint(name, value, GROUP) for name, value in names.items()]
    monkeypatch.setattr(scripted, "entry_points", lambda group: points if group == GROUP else [])


@pytest.mark.usefixtures("own_experts")
def test_an_expert_of_somebodys_own_is_found_by_the_name_of_the_environment() -> None:
    assert isinstance(expert_for(spec_of("mine?size=3&slip=0.1")), OwnExpert)
    assert isinstance(expert_for(spec_of("pettingzoo:mpe2.simple_tag_v3?arguments=N:3")), OwnExpert)
    assert type(expert_for(spec_of("pettingzoo:mpe2.simple_spread_v3"))) is UniformPolicy
    with pytest.raises(InputError, match=r"the expert of 'moved' is .*:Nobody, which cannot be imported") as error:
        expert_for(spec_of("moved"))
    assert not isinstance(error.value, NoExpertError), "a baseline that is missing for no reason would go unnoticed"


@pytest.mark.parametrize("agents", [8, 4])
def test_shipped_demonstrations_are_what_the_command_records(agents: int) -> None:
    path = resolve(f"rover_tower_{agents}")
    assert path.stat().st_size < 1_000_000
    shipped = Demonstrations.load(path)
    again = record(RoverTower(100, agents // 2), RoverTowerExpert(), 100, seed=0, origin="")
    assert shipped.return_mean == again.return_mean
    assert shipped.return_mean > 120
    for field in ("observations", "actions"):
        for one, other in zip(getattr(shipped, field), getattr(again, field), strict=True):
            np.testing.assert_array_equal(one, other)
    assert_replays(shipped, 0)


def test_recording_stops_at_the_number_asked_for() -> None:
    recorded = record(RoverTower(4, 2), RoverTowerExpert(), 6, seed=1, origin="")
    assert (recorded.num_episodes, recorded.num_rows) == (6, 150)
    assert len(np.unique(recorded.starts["rover_positions"], axis=0)) == 6
    assert_replays(recorded, 0)
    with pytest.raises(InputError, match="at least 1 episode"):
        record(RoverTower(4, 2), RoverTowerExpert(), 0, seed=1, origin="")


def test_what_is_recorded_in_batches_are_as_many_other_episodes_from_their_starts() -> None:
    recorded = record(RoverTower(2, 2), RoverTowerExpert(), 5, seed=0, origin="")
    assert recorded.num_episodes == 5
    assert len(np.unique(recorded.starts["rover_positions"], axis=0)) == 5
    assert_replays(recorded, 0)


@pytest.mark.parametrize(("agents", "episodes", "mean"), [(8, 415, 111.3), (4, 413, 132.6)])
def test_authors_experts_are_imported_and_replay(shared: Path, agents: int, episodes: int, mean: float) -> None:
    path = shared / f"data/rover_tower/expert_{agents}_train.npz"
    imported = import_rover_tower(path)
    imported.check_against(RoverTower(1, agents // 2).spec)
    assert (imported.num_episodes, len(np.unique(imported.groups))) == (episodes, 83)
    assert imported.return_mean == pytest.approx(mean, abs=0.1)
    assert_replays(imported, 1e-5)
    assert import_rover_tower(path, keep_duplicates=True).num_episodes == 664
    assert len(np.unique(imported.select(83, 0).groups)) == 83


def small_npz() -> dict[str, np.ndarray]:
    """The fields of a well-formed file: 2 episodes of 2 pairs."""
    played = record(RoverTower(2, 2), RoverTowerExpert(), 2, seed=0, origin="")
    rover, tower = (array.reshape(2, 25, 2, -1) for array in played.observations)
    rover_act, tower_act = (array.reshape(2, 25, 2) for array in played.actions)
    reward = np.zeros((2, 25, 2), np.float32)
    return {
        "rover_obs": rover,
        "tower_obs": tower,
        "rover_act": rover_act,
        "tower_act": tower_act,
        "rover_reward": reward,
        "tower_reward": reward,
        "goal_pos": played.starts["goal_positions"],
        "tower_listener": played.starts["rover_of_tower"],
        "start_group": np.array([0, 1]),
        "is_duplicate": np.array([False, False]),
    }


def test_well_formed_npz_is_imported(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", **small_npz())
    assert import_rover_tower(tmp_path / "some.npz").num_rows == 50


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rover_act", None, "'rover_act' is missing"),
        ("goal_pos", None, "'goal_pos' is missing"),
        ("goal_pos", np.zeros((2, 2)), "goal_pos: expected"),
        ("goal_pos", np.zeros((0, 2, 2)), "goal_pos: expected"),
        ("rover_act", np.full((2, 25, 2), 5), r"actions are not in 0\.\.4"),
        ("rover_act", np.zeros((2, 24, 2)), "rover_act: expected"),
        ("rover_obs", np.full((2, 25, 2, 11), np.nan), "not finite"),
        ("rover_reward", np.full((2, 25, 2), np.inf), "infinite"),
        ("tower_listener", np.zeros((2, 2), int), "permutation"),
        ("is_duplicate", np.ones(2, bool), "at least one episode"),
        ("start_group", np.array(["a", "b"]), "expected numbers"),
        ("start_group", np.array([{}, {}], object), "pickle"),
    ],
)
def test_hostile_npz_is_refused(tmp_path: Path, name: str, value: np.ndarray | None, text: str) -> None:
    fields = small_npz()
    if value is None:
        del fields[name]
    else:
        fields[name] = value
    np.savez(tmp_path / "bad.npz", **fields)
    with pytest.raises(InputError, match=text) as error:
        import_rover_tower(tmp_path / "bad.npz")
    assert "\n" not in str(error.value)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **small_npz())
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (b"", b"abc", whole[: len(whole) // 2], whole[:2_000] + b"\0" * 500 + whole[2_500:]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match="expected an npz of Rover Tower demonstrations"):
            import_rover_tower(tmp_path / "bad.npz")
    with pytest.raises(InputError, match="expected an npz"):
        import_rover_tower(tmp_path / "absent.npz")


def test_a_packed_npz_that_is_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", **small_npz())
    whole = (tmp_path / "whole.npz").read_bytes()
    for place in range(40, len(whole), 23):
        (tmp_path / "bad.npz").write_bytes(whole[:place] + b"\xff" * 30 + whole[place + 30 :])
        with pytest.raises(InputError, match="expected an npz of Rover Tower demonstrations"):
            import_rover_tower(tmp_path / "bad.npz")
    version = whole.index(b"PK\x01\x02") + 6
    (tmp_path / "bad.npz").write_bytes(whole[:version] + b"\xf0" + whole[version + 1 :])
    with pytest.raises(InputError, match=r"zip file version 24\.0"):
        import_rover_tower(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (b"no array", "goal_pos: expected an array"),
        (
            b"\x93NUMPY\x02\x00" + (20_000).to_bytes(4, "little") + b" " * 20_000,
            "goal_pos cannot be read: Header info length",
        ),
        (
            b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % 10**15,
            "goal_pos cannot be read",
        ),
        (b"\x93NUMPY\x01\x00v\x00{'descr': (1, 2", "goal_pos cannot be read"),
    ],
    ids=["no array", "long heading", "too large", "cut off"],
)
def test_a_member_that_is_no_array_is_refused_in_one_line(member: bytes, text: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("goal_pos.npy", member.ljust(128) if member.startswith(b"\x93NUMPY\x01") else member)
    with pytest.raises(InputError, match=text) as error:
        import_rover_tower(tmp_path / "bad.npz")
    assert "\n" not in str(error.value)
