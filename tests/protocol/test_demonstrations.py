"""The demonstrations file: what is written comes back, what is wrong is refused by name."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bm3il.launch.cli import main
from bm3il.protocol import demonstration_checks, packing
from bm3il.protocol.demonstrations import Demonstrations, load_demonstrations, resolve
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import Trajectories

torch.set_num_threads(1)

SPEC = EnvironmentSpec("town", (TypeSpec("bus", 3, 4, 5), TypeSpec("tram", 1, 2, 3, discrete=False)), 6)
LENGTHS = np.array([6, 2, 4, 6, 1])
GROUPS = np.array([7, 3, 7, 7, 5])

Tensors = dict[str, np.ndarray]
Header = dict[str, Any]


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files, too, are checked in several parts."""
    monkeypatch.setattr(demonstration_checks, "NUMBERS_AT_ONCE", 4 * 3 * (4 + 5))


@pytest.fixture
def demonstrations() -> Demonstrations:
    random, rows = np.random.default_rng(0), int(LENGTHS.sum())
    actions = random.integers(5, size=(rows, 3))
    masks = random.random((rows, 3, 5)) < 0.5
    np.put_along_axis(masks, actions[..., None], True, axis=2)
    return Demonstrations.of_types(
        spec=SPEC,
        origin="a test",
        observations=[random.normal(size=(rows, t.count, t.observation_dim)).astype(np.float32) for t in SPEC.types],
        actions=[actions, random.uniform(-1, 1, (rows, 1, 3)).astype(np.float32)],
        action_masks=[masks, np.ones((rows, 1, 3), bool)],
        active=[random.random((rows, 3)) < 0.8, np.ones((rows, 1), bool)],
        episode_lengths=LENGTHS,
        returns=random.normal(size=(5, 4)).astype(np.float32),
        groups=GROUPS,
        starts={"places": random.normal(size=(5, 3, 2)), "lines": np.arange(5)},
    )


def arrays_of(demonstrations: Demonstrations) -> Tensors:
    """All arrays by name."""
    fields = ("observations", "actions", "action_masks", "active")
    named = {f"{m}.{f}": a for f in fields for m, a in enumerate(getattr(demonstrations, f))}
    named |= {name: getattr(demonstrations, name) for name in ("episode_lengths", "returns", "groups")}
    return named | {f"starts.{name}": array for name, array in demonstrations.starts.items()}


def assert_same(one: Demonstrations, other: Demonstrations) -> None:
    a, b = arrays_of(one), arrays_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def changed(demonstrations: Demonstrations, name: str, array: np.ndarray) -> Demonstrations:
    """The same with another array."""
    return replace(demonstrations, arrays={**demonstrations.arrays, name: array})


def opened(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a file, in memory."""
    with safe_open(path, "np") as file:
        return load_file(path), file.metadata()


def test_saved_comes_back(tmp_path: Path, demonstrations: Demonstrations) -> None:
    path = tmp_path / "some.safetensors"
    demonstrations.save(path)
    loaded = Demonstrations.load(path)
    assert_same(loaded, demonstrations)
    assert (loaded.spec, loaded.origin) == (SPEC, "a test")
    assert [p.name for p in tmp_path.iterdir()] == ["some.safetensors"]
    tensors = load_file(path)
    assert tensors["0.actions"].dtype == np.uint8
    assert "1.active" not in tensors
    assert "1.masks" not in tensors


def test_the_same_recording_is_the_same_bytes(tmp_path: Path, demonstrations: Demonstrations) -> None:
    """Else runs from it, which know it by its hash, would not know it again."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for path in paths:
        demonstrations.save(path)
    assert len({path.read_bytes() for path in paths}) == 1


def test_file_is_mapped_not_copied(tmp_path: Path, demonstrations: Demonstrations) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    path = tmp_path / "mapped.safetensors"
    demonstrations.save(path)
    loaded = Demonstrations.load(path)
    address = loaded.observations[0].ctypes.data
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
    assert any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


def test_unwritable_folder_is_an_error_and_leaves_nothing(tmp_path: Path, demonstrations: Demonstrations) -> None:
    with pytest.raises(InputError, match="cannot write"):
        demonstrations.save(tmp_path / "no such folder" / "x.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        demonstrations.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_return_is_averaged_over_episodes_and_its_error_over_groups(demonstrations: Demonstrations) -> None:
    values = np.array([1.0, 5.0, 2.0, 3.0, 9.0])
    known = replace(demonstrations, returns=np.repeat(values[:, None], 4, axis=1).astype(np.float32))
    assert known.return_mean == pytest.approx(4)
    # groups: 7 → (1 + 2 + 3) − 3·4, 3 → 5 − 4, 5 → 9 − 4
    assert known.return_stderr == pytest.approx(np.sqrt((36 + 1 + 25) * 3 / 2) / 5)
    nothing = replace(demonstrations, returns=np.full((5, 4), np.nan, np.float32))
    assert nothing.return_mean is None
    assert nothing.return_stderr is None


def test_returns_of_agents_are_means_over_the_episodes_in_which_all_are_known(
    demonstrations: Demonstrations,
) -> None:
    returns = np.arange(20, dtype=np.float32).reshape(5, 4)
    returns[1, 2] = np.nan
    known = replace(demonstrations, returns=returns)
    assert known.returns_of_agents is not None
    np.testing.assert_allclose(known.returns_of_agents, returns[[0, 2, 3, 4]].mean(axis=0))
    nothing = replace(demonstrations, returns=np.full((5, 4), np.nan, np.float32))
    assert nothing.returns_of_agents is None


def test_selection_is_independent_first(demonstrations: Demonstrations) -> None:
    for seed in range(20):
        chosen = demonstrations.select(3, seed)
        assert sorted(chosen.groups) == [3, 5, 7], "one of every group comes before a second of any"
        assert_same(chosen, demonstrations.select(3, seed))
        assert set(demonstrations.select(1, seed).groups) <= set(demonstrations.select(2, seed).groups)
    assert_same(demonstrations.select(5, 0), demonstrations)
    assert len({float(demonstrations.select(3, seed).returns.sum()) for seed in range(20)}) == 3
    assert len({int(demonstrations.select(1, seed).groups[0]) for seed in range(20)}) == 3
    for wrong in (0, 6):
        with pytest.raises(InputError, match=r"1\.\.5 demonstration episodes"):
            demonstrations.select(wrong, 0)


def test_selected_rows_belong_to_the_selected_episodes(demonstrations: Demonstrations) -> None:
    chosen = demonstrations.select(2, 4)
    first_rows = np.cumsum(LENGTHS) - LENGTHS
    wanted = []
    for returns in chosen.returns:
        (episode,) = np.flatnonzero((demonstrations.returns == returns).all(axis=1))
        wanted.extend(range(first_rows[episode], first_rows[episode] + LENGTHS[episode]))
        assert demonstrations.starts["lines"][episode] in chosen.starts["lines"]
    for m in range(2):
        np.testing.assert_array_equal(chosen.observations[m], demonstrations.observations[m][wanted])
        np.testing.assert_array_equal(chosen.actions[m], demonstrations.actions[m][wanted])


def test_split_keeps_groups_together(demonstrations: Demonstrations) -> None:
    train, held_out = demonstrations.split(0.4, seed=1)
    assert held_out is not None
    assert len(set(held_out.groups)) == 1
    assert not set(train.groups) & set(held_out.groups)
    assert train.num_episodes + held_out.num_episodes == 5
    assert demonstrations.split(0.1, seed=1) == (demonstrations, None)


def test_a_part_of_groups_is_counted_as_it_is_written() -> None:
    spec, zeros = EnvironmentSpec("one", (TypeSpec("a", 1, 1, 2),), 1), np.zeros((100, 1))
    recorded = Demonstrations.of_types(
        spec,
        "",
        [zeros[..., None].astype(np.float32)],
        [zeros.astype(int)],
        [np.ones((100, 1, 2), bool)],
        [np.ones((100, 1), bool)],
        np.ones(100, np.int64),
        zeros.astype(np.float32),
        np.arange(100),
    )
    for part, count in ((0.29, 29), (0.57, 57), (0.1, 10)):
        held_out = recorded.split(part, seed=0)[1]
        assert held_out is not None
        assert held_out.num_episodes == count


def test_a_changed_world_may_have_another_crowd(demonstrations: Demonstrations) -> None:
    demonstrations = changed(demonstrations, "0.active", np.ones_like(demonstrations.active[0]))
    types = (replace(SPEC.types[0], count=5), replace(SPEC.types[1], count=2))
    other = replace(SPEC, types=types, name="town?demand=1.7", changes=SPEC.name)
    demonstrations.check_against(other)
    with pytest.raises(InputError, match="expected count 5, found 3"):
        demonstrations.check_against(replace(other, changes=""))
    with pytest.raises(InputError, match="expected observation_dim"):
        demonstrations.check_against(replace(other, types=(replace(types[0], observation_dim=5), types[1])))

    crowd = demonstrations.for_crowd(other)
    crowd.check_against(replace(other, changes=""))
    for m, agent_type in enumerate(types):
        for row in range(demonstrations.num_rows):
            for agent in range(agent_type.count):
                recorded = (agent + row) % SPEC.types[m].count
                for field in ("observations", "actions", "action_masks", "active"):
                    mine, theirs = (getattr(each, field)[m] for each in (crowd, demonstrations))
                    np.testing.assert_array_equal(mine[row, agent], theirs[row, recorded])
    assert crowd.returns.shape == (5, 7)
    assert crowd.return_mean == pytest.approx(demonstrations.return_mean)
    assert crowd.return_stderr == pytest.approx(demonstrations.return_stderr)
    assert not crowd.starts
    np.testing.assert_array_equal(crowd.groups, demonstrations.groups)


def test_the_same_crowd_is_left_alone(demonstrations: Demonstrations) -> None:
    assert demonstrations.for_crowd(replace(SPEC, changes="town")) is demonstrations


def test_a_smaller_crowd_shows_every_recorded_agent(demonstrations: Demonstrations) -> None:
    seen = demonstrations.observations[0]
    alone = demonstrations.for_crowd(replace(SPEC, types=(replace(SPEC.types[0], count=1), SPEC.types[1])))
    np.testing.assert_array_equal(alone.observations[0][:, 0], seen[np.arange(len(seen)), np.arange(len(seen)) % 3])
    unknown = replace(demonstrations, returns=np.full((5, 4), np.nan, np.float32))
    assert unknown.for_crowd(alone.spec).return_mean is None


def test_trajectories_lose_their_padding() -> None:
    played = Trajectories.zeros(replace(SPEC, episode_length=6), 2)
    played.lengths[:] = [2, 6]
    for m in range(2):
        played.arrays[f"{m}.own"][:] = np.arange(7)[:, None, None, None] + 10 * np.arange(2)[:, None, None]
        played.arrays[f"{m}.masks"][:] = played.active[m][:] = True
        played.rewards[m][:2] = 1
    made = Demonstrations.from_trajectories(played, SPEC, "test")
    assert made.observations[0][:, 0, 0].tolist() == [0, 1, 10, 11, 12, 13, 14, 15]
    assert made.episode_lengths.tolist() == [2, 6]
    assert made.groups.tolist() == [0, 1]
    assert made.return_mean == 2


def test_spec_must_fit(demonstrations: Demonstrations) -> None:
    demonstrations.check_against(SPEC)
    wider = replace(SPEC, types=(replace(SPEC.types[0], observation_dim=9), SPEC.types[1]))
    with pytest.raises(InputError, match="type 'bus': expected observation_dim 9, found 4"):
        demonstrations.check_against(wider)
    with pytest.raises(InputError, match="expected 1 agent types, found 2"):
        demonstrations.check_against(replace(SPEC, types=SPEC.types[:1]))


def _set(name: str, index: Any, value: float) -> Callable[[Tensors, Header], None]:
    def change(tensors: Tensors, header: Header) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return change


def _replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, Header], None]:
    def change(tensors: Tensors, header: Header) -> None:
        tensors[name] = np.ascontiguousarray(make(tensors[name]))

    return change


def _negative(tensors: Tensors, header: Header) -> None:
    tensors["0.actions"] = tensors["0.actions"].astype(np.int8)
    tensors["0.actions"][2:4, 1] = -1


def _forbid(tensors: Tensors, header: Header) -> None:
    tensors["0.active"] = np.ones_like(tensors["0.active"])
    tensors["0.masks"] = tensors["0.masks"].copy()
    for row, agent in ((4, 1), (9, 0)):
        tensors["0.masks"][row, agent, tensors["0.actions"][row, agent]] = False


def _drop_groups(tensors: Tensors, header: Header) -> None:
    del tensors["groups"]


def _add_tensor(tensors: Tensors, header: Header) -> None:
    tensors["7.actions"] = np.zeros(3)


def _empty(tensors: Tensors, header: Header) -> None:
    for name, array in tensors.items():
        tensors[name] = array[:0]


def _lie_about_rows(tensors: Tensors, header: Header) -> None:
    header["rows"] = 18


def _huge_type(tensors: Tensors, header: Header) -> None:
    header["spec"]["types"][1] |= {"count": 10**6, "action_dim": 10**6}


def _no_spec(tensors: Tensors, header: Header) -> None:
    header["spec"] = [1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("0.own", (8, 2, 1), np.nan), "type 'bus': 1 observed values are not finite.*row 8, agent 2"),
        (_set("1.own", (0, 0, 0), np.inf), "type 'tram': 1 observed values"),
        (_set("0.actions", (3, 1), 5), r"type 'bus': 1 actions are not in 0\.\.4.*row 3, agent 1"),
        (_negative, "type 'bus': 2 actions are not in"),
        (_set("1.actions", (3, 0, 0), np.nan), "type 'tram': 1 action values are not within"),
        (_forbid, "type 'bus': 2 actions are forbidden by their masks, the first in row 4, agent 1"),
        (_set("episode_lengths", 0, 5), r"own of type 'bus': expected \[18, 3, 4\], found \[19, 3, 4\]"),
        (_set("episode_lengths", 0, 7), r"episodes of 1\.\.6 steps, found 1\.\.7"),
        (_set("episode_lengths", 0, 0), r"episodes of 1\.\.6 steps, found 0"),
        (_set("returns", (1, 1), np.inf), "a return is infinite"),
        (_set("starts.places", (1, 1), np.nan), "starts.places: a value is not finite"),
        (_replace("returns", lambda a: a[:, :2]), r"returns: expected \[5, 4\], found \[5, 2\]"),
        (_replace("groups", lambda a: a[:4]), r"groups: expected \[5\], found \[4\]"),
        (_replace("starts.places", lambda a: a[:4]), "starts.places: expected"),
        (_replace("1.actions", lambda a: a[:, :, 0]), "actions of type 'tram': expected"),
        (_replace("0.active", lambda a: a[:, :2]), "active of type 'bus': expected"),
        (_replace("0.own", lambda a: a.astype(np.float64)), "'0.own': expected F32, found F64"),
        (_replace("0.actions", lambda a: a.astype(np.float32)), "'0.actions': expected I8 or .*found F32"),
        (_replace("episode_lengths", lambda a: a[:, None]), r"episode_lengths: expected \[5\], found \[5, 1\]"),
        (_replace("1.own", lambda a: a.sum()), "own of type 'tram': expected"),
        (_drop_groups, "tensors are missing: groups"),
        (_add_tensor, r"unexpected tensors: 7\.actions"),
        (_empty, "at least one episode"),
        (_lie_about_rows, "header says 18 rows, the tensors hold 19"),
        (_huge_type, r"expected \[5, 1000003\], found \[5, 4\]"),
        (_no_spec, "not an environment spec"),
    ],
)
def test_bad_content_is_refused(
    tmp_path: Path, demonstrations: Demonstrations, change: Callable[[Tensors, Header], None], text: str
) -> None:
    path = tmp_path / "bad.safetensors"
    demonstrations.save(path)
    tensors, metadata = opened(path)
    header = json.loads(metadata["header"])
    change(tensors, header)
    save_file(tensors, path, metadata | {"header": json.dumps(header)})
    with pytest.raises(InputError, match=text) as error:
        Demonstrations.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"format": "other"}, "expected format 'bm3il-demonstrations', found 'other'"),
        ({"version": "3"}, "version 1 or 2 of the format, found '3'"),
        ({"header": "{"}, "the header is not JSON"),
        ({"header": "[" * 100_000}, "the header is not JSON"),
        ({"header": "[]"}, "expected a header of names and values"),
    ],
)
def test_bad_metadata_is_refused(
    tmp_path: Path, demonstrations: Demonstrations, metadata: dict[str, str], text: str
) -> None:
    path = tmp_path / "bad.safetensors"
    demonstrations.save(path)
    tensors, honest = opened(path)
    save_file(tensors, path, honest | metadata)
    with pytest.raises(InputError, match=text):
        Demonstrations.load(path)


def test_damaged_files_are_refused(tmp_path: Path, demonstrations: Demonstrations) -> None:
    path = tmp_path / "damaged.safetensors"
    demonstrations.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"abc", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"expected a safetensors file of demonstrations: .* `bm3il demonstrations import` makes"
        ):
            Demonstrations.load(path)
    for missing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="neither a file nor one of those that ship"):
            Demonstrations.load(missing)


def test_inactive_agents_may_do_what_is_forbidden(demonstrations: Demonstrations) -> None:
    masks = demonstrations.action_masks[0].copy()
    row, agent = np.argwhere(~demonstrations.active[0])[0]
    masks[row, agent] = False
    changed(demonstrations, "0.masks", masks)


def test_names_are_resolved(tmp_path: Path) -> None:
    assert resolve("rover_tower_8").name == "rover_tower_8.safetensors"
    assert resolve("rover_tower_4.safetensors").is_file()
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"")
    assert resolve(str(own)) == own
    with pytest.raises(InputError, match=r"rover_tower_4, rover_tower_8.*bm3il demonstrations record"):
        resolve("rover_tower_9")


@pytest.fixture
def packed_file(demonstrations: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose observations of buses are packed: they repeat."""
    monkeypatch.setattr(packing, "PACKED_FROM_BYTES", 1)
    path = tmp_path / "packed.safetensors"
    changed(demonstrations, "0.own", np.zeros_like(demonstrations.observations[0])).save(path)
    return path


def test_what_repeats_is_packed_and_comes_back(packed_file: Path, demonstrations: Demonstrations) -> None:
    assert "0.own.xz" in load_file(packed_file)
    assert "0.own" not in load_file(packed_file)
    loaded = Demonstrations.load(packed_file)
    assert (loaded.observations[0] == 0).all()
    np.testing.assert_array_equal(loaded.observations[1], demonstrations.observations[1])


@pytest.mark.parametrize(
    ("name", "packed", "message"),
    [
        ("0.own.xz", b"no xz at all", "expected xz"),
        ("0.own.xz", lzma.compress(bytes(8)), "bytes when unpacked, found 8"),
        ("0.own.xz", lzma.compress(bytes(10 * 19 * 3 * 4 * 4)), "bytes when unpacked, found more"),
        ("0.masks.xz", lzma.compress(bytes([2]) * (19 * 3 * 5)), "expected bytes of 0 and 1"),
        ("episode_lengths.xz", lzma.compress(bytes(40)), "a tensor is there twice"),
    ],
)
def test_hostile_packed_tensors_are_refused(packed_file: Path, name: str, packed: bytes, message: str) -> None:
    tensors, metadata = opened(packed_file)
    tensors.pop(name.removesuffix(".xz") if "mask" in name else name, None)
    tensors[name] = np.frombuffer(packed, np.uint8)
    save_file(tensors, packed_file, metadata)
    with pytest.raises(InputError, match=message):
        Demonstrations.load(packed_file)


def test_forbidden_actions_are_counted_refused_and_left_out_on_demand(
    demonstrations: Demonstrations, tmp_path: Path
) -> None:
    path, output = tmp_path / "wrong.safetensors", tmp_path / "clean.safetensors"
    demonstrations.save(path)
    tensors, metadata = opened(path)
    rows, agents = demonstrations.active[0].nonzero()
    for row, agent in zip(rows[:3], agents[:3], strict=True):
        tensors["0.masks"][row, agent, demonstrations.actions[0][row, agent]] = False
    save_file(tensors, path, metadata)
    first = f"3 actions are forbidden by their masks, the first in row {rows[0]}, agent {agents[0]}; `bm3il"
    with pytest.raises(InputError, match=first):
        Demonstrations.load(path)
    assert main(["demonstrations", "clean", str(path), "--output", str(output)]) == 0
    active = Demonstrations.load(output).active[0]
    assert (~active[rows[:3], agents[:3]]).all()
    assert active.sum() == demonstrations.active[0].sum() - 3


@pytest.mark.parametrize("episodes", [10, 0])
def test_every_seed_learns_from_the_same_demonstrations(tmp_path: Path, episodes: int) -> None:
    tower = "rover_tower?pairs=2"
    job = Job(
        *("run", tmp_path, tower, make_environment(tower, 1).spec, "rover_tower_4", episodes, "bm3il", "serial"),
        *(0, 1000, 1, "type", False, Endpoints("", "", "", "")),
    )
    chosen = [load_demonstrations(replace(job, seed=seed)) for seed in (1, 2)]
    one, other = chosen
    assert one is not None
    assert other is not None
    assert one.num_episodes == (episodes or 100)
    np.testing.assert_array_equal(one.returns, other.returns)
