"""A commuting scenario: roads and facilities, who lives and works where, and the hours of a day.

Locations are numbered roads first: 0..R−1 are the roads, R..R+F−1 the facilities, K = R + F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from bm3il.protocol.errors import InputError

MAX_LOCATIONS = 20_000
KINDS = ("home", "work")
MIN_ROADS_OF_TRIP = 2
"""Home-work pairs that share a road only do not interact; a pair with fewer roads between is no type."""


@dataclass(frozen=True)
class Scenario:
    """Roads, facilities, demand and hours. Raises InputError, naming the row, for what no day could be played on.

    step_minutes: Δ.   steps: of a day, that starts at `day_start_minute` after midnight.
    work_start_minute, work_end_minute: when one should be at work; otherwise at home.
    vehicles_per_agent, flow_scale: a road whose load is `load_vehicles` holds load · flow_scale / vehicles_per_agent
        agents before it slows down.   right_reward, wrong_reward: per step and agent.
    junction_xy: [J, 2] for the map.   tail, head: [R] junctions of the roads.   free_flow_minutes: [R], T₀.
    load_vehicles: [R] vehicles on the road at capacity flow and free speed.
    kinds: [F] "home" or "work".   facility_junction: [F].   facility_xy: [F, 2].
    transitions: [Z, 2] location → next location; staying is always possible and not listed.
    demand: [P, 3] facility numbers (0..F−1) of home and work, and trips, most important first.
    """

    name: str
    source: str
    step_minutes: float
    steps: int
    day_start_minute: float
    work_start_minute: float
    work_end_minute: float
    vehicles_per_agent: float
    flow_scale: float
    right_reward: float
    wrong_reward: float
    junction_names: tuple[str, ...]
    junction_xy: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    free_flow_minutes: np.ndarray
    load_vehicles: np.ndarray
    kinds: tuple[str, ...]
    facility_names: tuple[str, ...]
    facility_junction: np.ndarray
    facility_xy: np.ndarray
    transitions: np.ndarray
    demand: np.ndarray

    def __post_init__(self) -> None:
        # In this order: later ones index by what earlier ones have checked.
        for check in (_check_hours, _check_tables, _check_transitions, _check_connections):
            if problem := check(self):
                raise InputError(f"scenario '{self.name}': {problem}")

    @property
    def num_roads(self) -> int:
        """R."""
        return len(self.tail)

    @property
    def num_facilities(self) -> int:
        """F."""
        return len(self.kinds)

    @property
    def num_locations(self) -> int:
        """K = R + F."""
        return self.num_roads + self.num_facilities

    @property
    def load_agents(self) -> np.ndarray:
        """[R] agents on a road at capacity flow and free speed."""
        return self.load_vehicles * self.flow_scale / self.vehicles_per_agent

    @cached_property
    def allowed(self) -> np.ndarray:
        """[K, K] bool: whether the second location is a possible next one of the first (staying is)."""
        allowed = np.eye(self.num_locations, dtype=bool)
        allowed[self.transitions[:, 0], self.transitions[:, 1]] = True
        return allowed

    def trip_minutes(self, facility: int) -> tuple[np.ndarray, np.ndarray]:
        """Free-flow minutes [K] from a facility to every location without passing through another facility, and the
        location before it on the fastest way, −1 where there is none."""
        others = self.num_roads + np.setdiff1d(np.arange(self.num_facilities), [facility])
        move = self.transitions[~np.isin(self.transitions[:, 0], others)]
        minutes = np.append(self.free_flow_minutes, np.full(self.num_facilities, 1e-9))  # 0 would be no connection
        graph = csr_array((minutes[move[:, 1]], move.T), shape=(self.num_locations,) * 2)
        distance, before = dijkstra(graph, indices=self.num_roads + facility, return_predecessors=True)
        return distance, np.maximum(before, -1)

    def way(self, home: int, work: int) -> list[int]:
        """The roads of the fastest free-flow way between two facilities. Raises InputError if there is none."""
        before, location, roads = self.trip_minutes(home)[1], self.num_roads + work, []
        while (location := int(before[location])) >= 0 and location < self.num_roads:
            roads.append(location)
        if location < 0:
            raise InputError(f"scenario '{self.name}': facility {work} cannot be reached from facility {home}")
        return roads[::-1]

    def next_hops(self, facility: int, closed: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The next location [K] of every location on the fastest free-flow way to a facility, and the minutes [K] on
        its roads; itself and infinity where no way leads there. Nobody enters `closed` roads.

        Other facilities are passed only where roads alone do not lead there, as if that took longer than any way.
        """
        target = self.num_roads + facility
        move = self.transitions[~np.isin(self.transitions[:, 1], closed)]
        minutes = np.append(self.free_flow_minutes, np.full(self.num_facilities, 1 + self.free_flow_minutes.sum()))
        minutes[target] = 1e-9  # 0 would be no connection
        backward = csr_array((minutes[move[:, 1]], move[:, ::-1].T), shape=(self.num_locations,) * 2)
        distance, after = dijkstra(backward, indices=target, return_predecessors=True)
        return np.where(after < 0, np.arange(self.num_locations), after), distance

    def commutes(self) -> list[tuple[int, ...]]:
        """(home, work, trips) of the home-work pairs that can be types: those whose way has at least two roads."""
        return [tuple(row) for row in self.demand.astype(int) if len(self.way(row[0], row[1])) >= MIN_ROADS_OF_TRIP]

    def median_trip_minutes(self) -> float:
        """Half of all trips take at most so many minutes on empty roads."""
        pairs = self.demand[:, :2].astype(int)
        reach = {home: self.trip_minutes(home)[0] for home in set(pairs[:, 0].tolist())}
        minutes = np.array([reach[home][self.num_roads + work] for home, work in pairs.tolist()])
        order = np.argsort(minutes, kind="stable")
        so_far = np.cumsum(self.demand[order, 2])
        return float(minutes[order[np.searchsorted(so_far, so_far[-1] / 2)]])

    def agent_types(self, types: int, agents: int) -> list[tuple[int, int, int]]:
        """(home, work, agents) of the `types` most important home-work pairs, facility numbers 0..F−1.

        Pairs whose way has at least two roads; first those that bring in a home and a work facility that no earlier
        one has, then by trips. Agents in proportion to trips by largest remainder, at least 2 of a type if possible.
        Raises InputError if there are not so many pairs, or fewer agents than types.
        """
        pairs = self.commutes()
        if not 1 <= types <= len(pairs):
            raise InputError(f"scenario '{self.name}' has 1..{len(pairs)} agent types, asked for {types}")
        if agents < types:
            raise InputError(f"scenario '{self.name}': {agents} agents cannot make {types} types; ask for more agents")
        chosen: list[tuple[int, ...]] = []
        for pair in pairs:
            homes, works = {c[0] for c in chosen}, {c[1] for c in chosen}
            if len(chosen) < types and pair[0] not in homes and pair[1] not in works:
                chosen.append(pair)
        chosen += [pair for pair in pairs if pair not in chosen][: types - len(chosen)]
        least = 2 if agents >= 2 * types else 1
        trips = np.array([pair[2] for pair in chosen], np.float64)
        share = trips / trips.sum() * (agents - least * types)
        counts = np.floor(share).astype(int) + least
        # Stable: of equal shares the first pairs get the agents that are left, on every processor.
        counts[np.argsort(np.floor(share) - share, kind="stable")[: agents - counts.sum()]] += 1
        return [(pair[0], pair[1], int(count)) for pair, count in zip(chosen, counts, strict=True)]


def _check_hours(scenario: Scenario) -> str | None:
    positive = ("step_minutes", "steps", "vehicles_per_agent", "flow_scale")
    finite = ("day_start_minute", "work_start_minute", "work_end_minute", "right_reward", "wrong_reward")
    for name in (*positive, *finite):
        value = getattr(scenario, name)
        if not math.isfinite(value) or (name in positive and value <= 0):
            return f"{name} must be {'above 0' if name in positive else 'a finite number'}, got {value}"
    end = scenario.day_start_minute + scenario.steps * scenario.step_minutes
    if not scenario.day_start_minute < scenario.work_start_minute < scenario.work_end_minute < end:
        return f"working hours must lie within the day, minutes {scenario.day_start_minute:g} to {end:g}"
    if scenario.right_reward <= scenario.wrong_reward:
        return "right_reward must be above wrong_reward"
    return None


def _check_tables(scenario: Scenario) -> str | None:
    junctions, roads, facilities = len(scenario.junction_names), scenario.num_roads, scenario.num_facilities
    if not (roads and facilities and roads + facilities <= MAX_LOCATIONS):
        return f"expected roads and facilities, at most {MAX_LOCATIONS} together, got {roads} and {facilities}"
    shapes = {
        "junction_xy": (junctions, 2),
        **dict.fromkeys(("head", "free_flow_minutes", "load_vehicles"), (roads,)),
        "facility_names": (facilities,),
        "facility_junction": (facilities,),
        "facility_xy": (facilities, 2),
        "transitions": (len(scenario.transitions), 2),
        "demand": (len(scenario.demand), 3),
    }
    for name, shape in shapes.items():
        found = np.shape(getattr(scenario, name))
        if found != shape:
            return f"{name}: expected {list(shape)}, found {list(found)}"
    limits = {
        # Limits are inclusive: the smallest number above 0.
        "free_flow_minutes": (math.ulp(0.0), 1e6, "above 0"),
        "load_vehicles": (math.ulp(0.0), 1e12, "above 0"),
        **dict.fromkeys(("junction_xy", "facility_xy"), (-1e12, 1e12, "finite")),
        **dict.fromkeys(("tail", "head", "facility_junction"), (0, junctions - 1, f"a junction, 0..{junctions - 1}")),
        "transitions": (0, roads + facilities - 1, f"a location, 0..{roads + facilities - 1}"),
    }
    for name, (lowest, highest, what) in limits.items():
        values = np.asarray(getattr(scenario, name))
        wrong = ~((values >= lowest) & (values <= highest))
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            return f"{name}, row {row}: expected {what}, found {values[row]}"
    if unknown := [kind for kind in scenario.kinds if kind not in KINDS]:
        return f"facility {scenario.kinds.index(unknown[0])} is a '{unknown[0]}', expected one of {', '.join(KINDS)}"
    return _check_demand(scenario)


def _check_demand(scenario: Scenario) -> str | None:
    for row, (home, work, trips) in enumerate(scenario.demand):
        for number, kind in ((home, "home"), (work, "work")):
            if not (0 <= number < scenario.num_facilities and number == int(number)):
                return f"demand, row {row}: there is no facility {number}"
            if scenario.kinds[int(number)] != kind:
                return f"demand, row {row}: facility {int(number)} is no '{kind}'"
        if not 0 < trips < math.inf:
            return f"demand, row {row}: trips must be above 0, found {trips}"
    return None if len(scenario.demand) else "nobody travels: the demand is empty"


def _check_transitions(scenario: Scenario) -> str | None:
    """Whoever leaves a location comes out at the junction where the next one begins."""
    entry = np.concatenate([scenario.tail, scenario.facility_junction])
    exit = np.concatenate([scenario.head, scenario.facility_junction])
    for row, (here, there) in enumerate(scenario.transitions):
        if here == there:
            return f"transitions, row {row}: location {here} leads to itself (staying is not listed)"
        if min(here, there) >= scenario.num_roads:
            return f"transitions, row {row}: facilities {here} and {there} are joined without a road"
        if exit[here] != entry[there]:
            return (
                f"transitions, row {row}: location {here} ends at junction {exit[here]}, "
                f"but location {there} begins at junction {entry[there]}"
            )
    return None


def _check_connections(scenario: Scenario) -> str | None:
    """Every location can be reached from every other one, also by roads alone."""
    for name, size in (("roads", scenario.num_roads), ("locations", scenario.num_locations)):
        graph = csr_array(scenario.allowed[:size, :size])
        count, label = connected_components(graph, directed=True, connection="strong")
        if count > 1:
            largest = np.bincount(label).argmax()
            outside = np.flatnonzero(label != largest)
            first = outside[0]
            what = f"road {first}" if first < scenario.num_roads else f"facility {first - scenario.num_roads}"
            return f"{name} are not strongly connected: {len(outside)} of {size} are cut off, the first is {what}"
    return None
