"""How a world differs from the one that its scenario describes: options of `berlin` that change no shape.

`closed=22,23`: nobody can enter these roads; who is on one may stay or leave.   `capacity=22:0.5,23:2`: factors on the
load that a road holds.   `demand=1.2`: so many times as many agents of each type, rounded, at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.protocol.errors import InputError

EXAMPLES = {"closed": "closed=22,23", "capacity": "capacity=22:0.5,23:2"}
MAX_DEMAND = 1_000


@dataclass(frozen=True)
class Changes:
    """The options, read. closed: roads, in order.   capacity: (road, factor) in order, without those that are 1."""

    closed: tuple[int, ...]
    capacity: tuple[tuple[int, float], ...]
    demand: float

    @classmethod
    def parse(cls, scenario: Scenario, closed: str, capacity: str, demand: float) -> Changes:
        """Raises InputError for what cannot be read, roads that there are not, and numbers that are not above 0."""
        roads = {_road(scenario, "closed", closed, part) for part in closed.split(",") if closed}
        factors: dict[int, float] = {}
        for part in capacity.split(",") if capacity else ():
            number, _, factor = part.partition(":")
            road = _road(scenario, "capacity", capacity, number)
            if road in factors:
                raise InputError(f"capacity: road {road} is named twice")
            factors[road] = _factor(road, factor)
        if not 0 < demand <= MAX_DEMAND:
            raise InputError(f"demand must be above 0, and at most {MAX_DEMAND}, got {demand:g}")
        in_order = sorted((road, factor) for road, factor in factors.items() if factor != 1)
        return cls(tuple(sorted(roads)), tuple(in_order), float(demand))

    @property
    def options(self) -> str:
        """The options as they stand behind others in a name: empty, or `&closed=…`."""
        values = {
            "closed": ",".join(map(str, self.closed)),
            "capacity": ",".join(f"{road}:{plain_text(factor)}" for road, factor in self.capacity),
            "demand": "" if self.demand == 1 else plain_text(self.demand),
        }
        return "".join(f"&{name}={value}" for name, value in values.items() if value)

    def crowd(self, scenario: Scenario, types: int, agents: int) -> list[tuple[int, int, int]]:
        """(home, work, agents) of each type, as `Scenario.agent_types`, with the demand of this world.

        Raises InputError if the closed roads leave no way between somebody's home and work, there or back.
        """
        commuters = scenario.agent_types(types, agents)
        # With all roads open there is a way: a scenario is strongly connected.
        for home, work, _ in commuters if self.closed else ():
            self._check_way(scenario, home, work, f"home{home}-work{work}")
            self._check_way(scenario, work, home, f"home{home}-work{work}")
        # Not `round`, which takes 2.5 to 2 and 3.5 to 4.
        return [(home, work, max(1, math.floor(count * self.demand + 0.5))) for home, work, count in commuters]

    def allowed(self, scenario: Scenario) -> np.ndarray:
        """[K, K] bool, as `Scenario.allowed`."""
        if not self.closed:
            return scenario.allowed
        closed = list(self.closed)
        allowed = scenario.allowed.copy()
        allowed[:, closed] = False
        allowed[closed, closed] = True
        return allowed

    def load_factors(self, scenario: Scenario) -> np.ndarray:
        """[R]."""
        factors = np.ones(scenario.num_roads)
        for road, factor in self.capacity:
            factors[road] = factor
        return factors

    def _check_way(self, scenario: Scenario, origin: int, destination: int, type_name: str) -> None:
        here = scenario.num_roads + origin
        if scenario.next_hops(destination, self.closed)[0][here] == here:
            ends = [f"{scenario.kinds[facility]} {facility}" for facility in (origin, destination)]
            raise InputError(
                f"nobody could get from {ends[0]} to {ends[1]} (type '{type_name}'): closed="
                f"{','.join(map(str, self.closed))} leaves no way; close fewer roads"
            )


def _road(scenario: Scenario, option: str, text: str, part: str) -> int:
    try:
        road = int(part)
    except ValueError as error:
        raise InputError(f"{option}: expected numbers of roads, as in {EXAMPLES[option]}, got '{text}'") from error
    if not 0 <= road < scenario.num_roads:
        raise InputError(f"{option}: there is no road {road}; the roads are 0..{scenario.num_roads - 1}")
    return road


def _factor(road: int, text: str) -> float:
    try:
        factor = float(text)
    except ValueError as error:
        raise InputError(f"capacity: expected a factor for road {road}, as in {road}:0.5, got '{text}'") from error
    if not 0 < factor < math.inf:
        raise InputError(f"capacity: the factor of road {road} must be a number above 0, got {factor:g}")
    return factor


def plain_text(number: float) -> str:
    """The shortest text that is read as the same number."""
    return np.format_float_positional(number, trim="-")
