"""Berlin changed: closed roads, other capacities, more or fewer agents."""

from __future__ import annotations

import numpy as np
import pytest

from bm3il.actors.environments.berlin.environment import Berlin, berlin_of
from bm3il.actors.environments.berlin.scenario_file import load_scenario
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

BASE = "berlin?scenario=berlin46&types=10&agents=50&sight=near"
COUNTS = [8, 5, 5, 4, 2, 8, 7, 4, 4, 3]
ALL_ROADS = ",".join(map(str, range(46)))
INTO_ALEXANDERPLATZ = ",".join(
    str(road) for road, place in load_scenario("berlin46").transitions.tolist() if place == 46 + 1 and road < 46
)


def berlin(options: str, days: int = 1) -> Berlin:
    return berlin_of(make_environment(f"{BASE}&{options}", days))


def locations(trajectories_observations: list[np.ndarray]) -> np.ndarray:
    """[T + 1, E, N]."""
    return np.concatenate(trajectories_observations, axis=2)[..., :56].argmax(axis=-1)


def test_nobody_enters_a_closed_road_and_who_is_on_one_may_leave() -> None:
    world = berlin("closed=22,23&slip=0.5", 20)
    played = rollout(make_environment(f"{BASE}&closed=22,23&slip=0.5", 20), UniformPolicy(world.spec), 0)
    entered = np.unique(locations(played.observations))
    assert not {22, 23} & set(entered.tolist())
    assert len(entered) > 40
    world.reset(0)
    inside = world.show(np.full((20, 50), 22), 10)
    may = np.flatnonzero(inside.action_masks[0][0, 0])
    assert set(may) == set(np.flatnonzero(world.scenario.allowed[22])) - {23}
    step = world.step([np.full((20, t.count), 22) for t in world.spec.types])  # staying is allowed
    assert (np.concatenate(step.observations, axis=1)[..., 22] == 1).all()


def test_only_closed_roads_are_missing_from_the_masks() -> None:
    world = berlin("closed=22,23")
    differs = world.allowed != world.scenario.allowed
    assert set(np.flatnonzero(differs.any(axis=0))) == {22, 23}
    assert not world.allowed[differs].any()


def test_capacity_is_a_factor_on_the_load() -> None:
    plain, changed = berlin("closed=22"), berlin("capacity=23:2,22:0.5&scenario=berlin46")
    np.testing.assert_allclose(changed.load_agents[[22, 23]] / plain.load_agents[[22, 23]], [0.5, 2])
    others = np.delete(np.arange(46), [22, 23])
    np.testing.assert_array_equal(changed.load_agents[others], plain.load_agents[others])
    crowd = np.full((1, 50), 22)
    chances = []
    for world in (plain, changed):
        world.reset(0)
        world.show(crowd, 3)
        chances.append(world.leave_chance[0, 22])
    minutes = [1 / (1 - (1 - chance) ** (1 / plain.scenario.step_minutes)) for chance in chances]
    assert minutes[1] / minutes[0] == pytest.approx(2, rel=1e-3), "half the load: twice as slow"


@pytest.mark.parametrize(
    ("demand", "counts"),
    [
        (1.2, [10, 6, 6, 5, 2, 10, 8, 5, 5, 4]),
        (0.5, [4, 3, 3, 2, 1, 4, 4, 2, 2, 2]),
        (0.01, [1] * 10),
        (3, [3 * count for count in COUNTS]),
    ],
)
def test_demand_keeps_proportions(demand: float, counts: list[int]) -> None:
    spec = berlin(f"demand={demand}").spec
    assert [t.count for t in spec.types] == counts
    assert [t.name for t in spec.types] == [t.name for t in berlin("closed=22").spec.types]


def test_a_facility_looks_as_full_as_its_people_are_many() -> None:
    """Twice the people at home look twice as full: the number means the same as in the world that is changed."""
    seen = []
    for options in ("demand=1", "demand=2"):
        world = berlin(options)
        now = world.reset(0)
        seen.append(now.observations[0][0, 0, 56:112])
        assert seen[-1][world.home[0]] == pytest.approx((world.home == world.home[0]).sum() / 50)
    np.testing.assert_allclose(seen[1][46:], 2 * seen[0][46:])


@pytest.mark.parametrize(
    ("options", "name", "is_changed"),
    [
        ("", "", False),
        ("&closed=40,9,40", "&closed=9,40", True),
        ("&capacity=23:2.0,22:.5&demand=1.20", "&capacity=22:0.5,23:2&demand=1.2", True),
        ("&slip=0.05&demand=2&closed=9", "&closed=9&demand=2&slip=0.05", True),
        ("&capacity=22:1&demand=1&slip=0", "", False),
        ("&capacity=22:1&demand=1&slip=0.5", "&slip=0.5", True),
    ],
)
def test_the_name_is_canonical_and_makes_it_again(options: str, name: str, is_changed: bool) -> None:
    spec = make_environment(BASE + options, 1).spec
    assert spec.name == BASE + name
    assert spec.changes == (BASE if is_changed else "")
    assert make_environment(spec.name, 1).spec == spec
    assert make_environment(BASE, 1).spec.difference(spec, counts=False) is None


@pytest.mark.parametrize("variant", ["tight", "incidents", "shifts", "demand"])
def test_variants_are_changes_too(variant: str) -> None:
    name = f"berlin?scenario=berlin46-{variant}&types=5&agents=50&flow_scale=0.05&closed=22&slip=0.1"
    spec = make_environment(name, 2).spec
    assert spec.name == name
    assert spec.changes == "berlin?scenario=berlin46&types=5&agents=50&flow_scale=0.05"
    assert make_environment(spec.changes, 1).spec.difference(spec) is None


@pytest.mark.parametrize(
    "options", ["&closed=22,23&capacity=3:0.5&demand=1.3&slip=0.1", "&closed=1", "&demand=0.01", "&capacity=0:1e-3"]
)
def test_it_keeps_the_contract(options: str) -> None:
    assert check_environment(BASE + options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("closed=46", r"closed: there is no road 46; the roads are 0\.\.45"),
        ("closed=-1", "there is no road -1"),
        ("closed=22;23", "closed: expected numbers of roads, as in closed=22,23, got '22;23'"),
        ("closed=22,", "got '22,'"),
        ("closed=", "expected a value"),
        (f"closed={ALL_ROADS}", r"nobody could get from home 1 to work 5 \(type 'home1-work5'\)"),
        (f"closed={INTO_ALEXANDERPLATZ}", r"nobody could get from work 5 to home 1 \(type 'home1-work5'\)"),
        ("capacity=22:0", "the factor of road 22 must be a number above 0, got 0"),
        ("capacity=22:-1", "must be a number above 0"),
        ("capacity=22:nan", "must be a number above 0"),
        ("capacity=22:inf", "must be a number above 0"),
        ("capacity=22", "expected a factor for road 22, as in 22:0.5, got ''"),
        ("capacity=x:1", "capacity: expected numbers of roads, as in capacity=22:0.5,23:2, got 'x:1'"),
        ("capacity=46:1", "capacity: there is no road 46"),
        ("capacity=22:2,22:3", "road 22 is named twice"),
        ("demand=0", "demand must be above 0"),
        ("demand=-1", "demand must be above 0"),
        ("demand=nan", "demand must be above 0"),
        ("demand=1e300", "at most 1000"),
        ("demand=more", "expected a number, got 'more'"),
        ("close=22", "did you mean closed"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        make_environment(f"{BASE}&{options}", 1)
    assert "\n" not in str(raised.value)
