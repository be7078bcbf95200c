"""A town of two tables, and a recorded day in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.environments.berlin.scenario_file import format_scenario
from bm3il.actors.environments.berlin.town import read_town
from bm3il.actors.experts.importers import import_day
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

LOCATIONS = """index,name,kind,roadload_vehicles,free_flow_minutes
0,h,facility,,
1,w,facility,,
2,out,road,10,4
3,detour,road,20,8
4,back,road,10,4
"""
MOVES = [(0, 2), (0, 3), (2, 1), (3, 1), (1, 4), (4, 0), (2, 4), (3, 4), (4, 2), (4, 3)]


def tables(folder: Path, locations: str = LOCATIONS, moves: list[tuple[int, int]] = MOVES) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "locations.csv").write_text(locations)
    rows = [f"{i},{i},stay" for i in range(5)] + [f"{a},{b},move" for a, b in moves]
    (folder / "transitions.csv").write_text("from_index,to_index,kind\n" + "\n".join(rows) + "\n")
    return folder


def day(folder: Path, *persons: list[tuple[int, int]]) -> Path:
    """Persons as (minute, location from then on)."""
    where = np.zeros((1441, len(persons)), np.int8)
    for person, changes in enumerate(persons):
        for minute, location in changes:
            where[minute:, person] = location
    np.savez(folder / "day.npz", person_location=where)
    return folder / "day.npz"


def environment(folder: Path) -> str:
    path = folder / "town.json"
    path.write_text(format_scenario(read_town(tables(folder / "town"))))
    return f"berlin?scenario={path}&types=1&agents=2"


WORKS = [(480, 2), (490, 1), (1020, 4), (1030, 0)]


def test_moves_tell_the_junctions(tmp_path: Path) -> None:
    town = read_town(tables(tmp_path / "town"))
    assert (town.num_roads, town.num_facilities, len(town.junction_names)) == (3, 2, 2)
    assert town.tail.tolist() == [town.facility_junction[0], town.facility_junction[0], town.facility_junction[1]]
    assert town.way(0, 1) == [0]
    np.testing.assert_array_equal(town.load_agents, [10, 20, 10])


def test_a_way_of_one_road_is_no_type(tmp_path: Path) -> None:
    name = environment(tmp_path)
    with pytest.raises(InputError, match="agent types"):
        import_day(day(tmp_path, WORKS, WORKS), name)


@pytest.fixture
def long_town(tmp_path: Path) -> str:
    """The same with the way out in two roads."""
    locations = LOCATIONS + "5,second,road,10,4\n"
    moves = [(0, 2), (0, 3), (2, 5), (5, 1), (3, 1), (1, 4), (4, 0), (5, 4), (3, 4), (4, 2), (4, 3)]
    path = tmp_path / "town.json"
    path.write_text(format_scenario(read_town(tables(tmp_path / "town", locations, moves))))
    return f"berlin?scenario={path}&types=1&agents=2"


def test_recorded_moves_become_actions(tmp_path: Path, long_town: str) -> None:
    slow = [(480, 2), (500, 5), (520, 1), (1020, 4), (1030, 0)]
    demonstrations, _ = import_day(day(tmp_path, slow, slow), long_town)
    assert (demonstrations.num_rows, demonstrations.num_episodes) == (1440, 1)
    actions, seen = demonstrations.actions[0], demonstrations.observations[0]
    assert actions[478, 0] == 4  # home comes behind the four roads
    assert actions[479, 0] == 0  # the first road
    assert seen[480, 0, :6].tolist() == [1, 0, 0, 0, 0, 0]
    town = make_environment(long_town, 1)
    assert isinstance(town, Berlin)
    town.reset(0)
    fresh = town.show(np.array([[0, 0]]), 480)
    np.testing.assert_array_equal(fresh.observations[0][0], seen[480])
    assert demonstrations.return_mean == pytest.approx(1440 - 2 * 40 - 2 * 10, abs=45)


def test_who_is_still_on_a_road_may_have_wanted_to_go_on(tmp_path: Path, long_town: str) -> None:
    """Two cars on a road of four minutes; who stays at home or at work wants to."""
    slow = [(480, 2), (500, 5), (520, 1), (1020, 4), (1030, 0)]
    demonstrations, left_out = import_day(day(tmp_path, slow, slow), long_town)
    active = demonstrations.active[0]
    assert active.sum(axis=0).tolist() == [1440 - 19 - 19 - 9] * 2
    assert active[478:481, 0].tolist() == [True, True, False]
    assert active[499].all()
    assert left_out == [f"transitions that several actions could have made, left out: {2 * (19 + 19 + 9)}"]
    assert demonstrations.origin.endswith(left_out[0])


def test_a_move_that_is_no_transition_is_left_out_and_counted(tmp_path: Path, long_town: str) -> None:
    jumps = [(480, 2), (481, 1), (1020, 4), (1021, 0)]
    demonstrations, left_out = import_day(day(tmp_path, jumps, jumps), long_town)
    assert left_out == ["transitions that no action makes, left out: 2"]
    assert not demonstrations.active[0][480].any()
    assert demonstrations.active[0][479].all()


def test_what_is_wrong_is_named(tmp_path: Path, long_town: str) -> None:
    with pytest.raises(InputError, match="person 1 does not begin the day at home"):
        import_day(day(tmp_path, [(480, 2)], [(0, 2)]), long_town)
    with pytest.raises(InputError, match="2 persons"):
        import_day(day(tmp_path, [(480, 2)]), long_town)
    with pytest.raises(InputError, match=r"expected a world of berlin, .* got 'rover_tower.pairs=2'"):
        import_day(tmp_path / "day.npz", "rover_tower?pairs=2")
    for number in ("soon", "nan", "inf"):
        with pytest.raises(InputError, match=f"row 2: free_flow_minutes must be a number, got '{number}'"):
            read_town(tables(tmp_path / "bad", LOCATIONS.replace("10,4\n3", f"10,{number}\n3")))
    with pytest.raises(InputError, match=r"expected two of 0\.\.4"):
        read_town(tables(tmp_path / "worse", moves=[(0, 9)]))


def test_tables_of_a_spreadsheet_begin_with_a_mark(tmp_path: Path) -> None:
    assert read_town(tables(tmp_path / "town", "\ufeff" + LOCATIONS)).num_roads == 3


def test_the_published_town(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "networks" / "SynthTown"
    if not folder.is_dir():
        pytest.skip("the folder of SynthTown is absent")
    path = tmp_path / "synthtown.json"
    path.write_text(format_scenario(read_town(folder)))
    name = f"berlin?scenario={path}&types=1&agents=50"
    demonstrations, left_out = import_day(folder / "synthtown_day.npz", name)
    assert (left_out[0], demonstrations.num_rows) == ("transitions that no action makes, left out: 1", 1440)
    recorded = np.load(folder / "synthtown_day.npz")["counts"]
    first_road = np.array([seen[:, :23].sum(axis=1) for seen in demonstrations.observations[0].transpose(1, 0, 2)])
    np.testing.assert_array_equal(first_road.sum(axis=0), recorded[:1440, 2:].sum(axis=1))
