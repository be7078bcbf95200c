"""Scenarios: what is refused, and that a file says what was saved."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.actors.environments.berlin.scenario_file import (
    format_scenario,
    load_scenario,
    parse_scenario,
    shipped_scenarios,
)
from bm3il.protocol.errors import InputError

BERLIN = load_scenario("berlin46")


def changed(name: str, row: int, value: Any) -> Scenario:
    array = getattr(BERLIN, name).copy()
    array[row] = value
    return replace(BERLIN, **{name: array})


@pytest.mark.parametrize("name", shipped_scenarios())
def test_a_file_says_what_was_saved(name: str) -> None:
    text = format_scenario(load_scenario(name))
    assert format_scenario(parse_scenario(text)) == text


def test_shipped_types_are_those_of_the_paper(shared: Any) -> None:
    table = (shared / "data/berlin/berlin46/types.csv").read_text().split()[1:]
    for types, agents in ((5, 50), (10, 50), (15, 60)):
        rows = [line.split(",") for line in table if line.startswith(f"types{types}_agents{agents},")]
        expected = [(int(row[2]), int(row[3]), int(row[4])) for row in rows]
        assert BERLIN.agent_types(types, agents) == expected


def test_agents_are_shared_out_completely() -> None:
    for types, agents in ((3, 7), (5, 5), (15, 61)):
        assert sum(count for _, _, count in BERLIN.agent_types(types, agents)) == agents


def test_of_equal_shares_the_first_pairs_get_who_is_left_on_every_processor() -> None:
    """numpy sorts ties in another order where it has wider vectors."""
    counts = {(home, work): count for home, work, count in load_scenario("berlin400").agent_types(16, 60)}
    order = list(counts)
    assert order.index((14, 41)) < order.index((13, 42))
    assert (counts[14, 41], counts[13, 42]) == (4, 3)


def test_the_median_trip_is_that_of_trips_and_not_of_pairs() -> None:
    demand = BERLIN.demand.astype(int)
    minutes = [BERLIN.free_flow_minutes[BERLIN.way(home, work)].sum() for home, work, _ in demand]
    every_trip = np.sort(np.repeat(minutes, demand[:, 2]))
    assert BERLIN.median_trip_minutes() == pytest.approx(every_trip[(len(every_trip) - 1) // 2], abs=1e-3)
    assert np.median(minutes) != pytest.approx(BERLIN.median_trip_minutes(), abs=1e-3)


def test_ways_are_connected_and_fastest() -> None:
    home, work, _ = BERLIN.agent_types(1, 1)[0]
    way = BERLIN.way(home, work)
    assert BERLIN.tail[way[0]] == BERLIN.facility_junction[home]
    assert BERLIN.head[way[-1]] == BERLIN.facility_junction[work]
    np.testing.assert_array_equal(BERLIN.head[way[:-1]], BERLIN.tail[way[1:]])
    assert BERLIN.free_flow_minutes[way].sum() == pytest.approx(BERLIN.trip_minutes(home)[0][46 + work], abs=1e-3)


def test_next_hops_are_the_fastest_way_from_everywhere() -> None:
    for home, work, _ in BERLIN.demand.astype(int):
        after, minutes = BERLIN.next_hops(work)
        here, roads = int(after[46 + home]), []
        while here != 46 + work:
            roads.append(here)
            here = int(after[here])
        assert roads == BERLIN.way(home, work)
        assert minutes[46 + home] == pytest.approx(BERLIN.free_flow_minutes[roads].sum(), abs=1e-6)
    assert after[46 + work] == 46 + work
    assert BERLIN.allowed[np.arange(56), after].all()


def test_closed_roads_are_no_next_hops() -> None:
    open_roads, closed = BERLIN.next_hops(5)[0], BERLIN.way(1, 5)[:1]
    after, minutes = BERLIN.next_hops(5, closed)
    assert closed[0] in open_roads
    assert closed[0] not in after
    assert np.isfinite(minutes).all(), "also from the closed road itself a way leads there"
    everything, never = BERLIN.next_hops(5, range(46))
    assert everything[46 + 1] == 46 + 1
    assert np.isinf(never[46 + 1])


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("free_flow_minutes", 3, 0.0, "free_flow_minutes, row 3: expected above 0"),
        ("load_vehicles", 45, -1.0, "load_vehicles, row 45"),
        ("load_vehicles", 5, np.nan, "load_vehicles, row 5"),
        ("junction_xy", 2, np.inf, "junction_xy, row 2"),
        ("tail", 0, 16, r"tail, row 0: expected a junction, 0\.\.15"),
        ("tail", 0, 5, "ends at junction"),
        ("transitions", 7, [0, 56], r"transitions, row 7: expected a location, 0\.\.55"),
        ("transitions", 7, [4, 4], "leads to itself"),
        ("transitions", 7, [50, 51], "joined without a road"),
        ("demand", 1, [0, 1, 5], "facility 1 is no 'work'"),
        ("demand", 1, [0, 99, 5], "there is no facility 99"),
        ("demand", 1, [0, 5, 0], "trips must be above 0"),
    ],
)
def test_broken_tables_name_the_row(name: str, row: int, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(name, row, value)


def test_a_facility_that_cannot_be_reached_is_named() -> None:
    kept = BERLIN.transitions[BERLIN.transitions[:, 1] != 46 + 4]
    with pytest.raises(InputError, match="not strongly connected: 1 of 56 are cut off, the first is facility 4"):
        replace(BERLIN, transitions=kept)


def test_roads_alone_must_be_connected() -> None:
    kept = BERLIN.transitions[(BERLIN.transitions[:, 1] != 0) | (BERLIN.transitions[:, 0] >= 46)]
    with pytest.raises(InputError, match="roads are not strongly connected"):
        replace(BERLIN, transitions=kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_minutes": 0.0}, "step_minutes must be above 0"),
        ({"work_end_minute": 100.0}, "working hours must lie within the day"),
        ({"right_reward": -9.0}, "right_reward must be above"),
        ({"demand": np.empty((0, 3))}, "nobody travels"),
        ({"kinds": ("home",) * 9 + ("shop",)}, "facility 9 is a 'shop'"),
    ],
)
def test_what_no_day_could_be_played_on(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(BERLIN, **change)


TEXT = format_scenario(BERLIN)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 1 << 70), st.floats(), st.text(max_size=3), st.just([]))


@settings(max_examples=150, deadline=None)
@given(path=st.lists(st.integers(0, 30), min_size=1, max_size=3), value=VALUES)
def test_hostile_files_are_scenarios_or_refused(path: list[int], value: Any) -> None:
    tree = json.loads(TEXT)
    place: Any = tree
    for step in path[:-1]:
        keys = list(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else []
        if not len(keys) or not isinstance(place[keys[step % len(keys)]], dict | list):
            break
        place = place[keys[step % len(keys)]]
    keys = list(place) if isinstance(place, dict) else range(len(place))
    place[keys[path[-1] % len(keys)]] = value
    with contextlib.suppress(InputError):
        parse_scenario(json.dumps(tree))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "bm3il-scenario", "version": 2}', "[" * 100_000])
def test_what_is_no_scenario_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_scenario(text)
