"""What does not change in a traffic network, and who drives on it. Needs SUMO's Python packages; imported by
`sumo_server` alone."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import sumolib
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from bm3il.protocol.errors import nearest

CARS, TURN_AROUND = "passenger", "t"
CAR, DEFAULT = "car", "DEFAULT_VEHTYPE"
"""What vehicles of no type are called here, and in SUMO; a `vType` of that name in its files says what they are."""
VEHICLES = 20
"""Random trips, if nobody says how many."""


class Network:
    """Edges that cars may use, by number.

    ids: names.   lengths [R] m.   limits [R] m/s.   middles [R, 2] in 0..1 of the longer side.   headings [R, 2] unit
    vectors.   successors: of each edge the numbers of those that may follow, from left to right.   most: how many of
    them there are, at most.   connected: the numbers of edges from all of which there is a way to all of them.
    leads_to: name → names, of all edges, also those that no car may use.   closed: numbers of edges that nobody may
    enter; they are successors still, so that actions mean what they mean where they are open.
    """

    def __init__(self, path: str, closed: Sequence[str] = ()) -> None:
        """closed: names of edges. Raises ValueError for one that there is not, and for a file without edges for cars;
        and what its parser raises for others."""
        net = sumolib.net.readNet(path)
        edges = [edge for edge in net.getEdges() if not edge.isSpecial() and edge.allows(CARS)]
        if not edges:
            raise ValueError(f"{path}: there is no edge for passenger cars")
        self.ids = [edge.getID() for edge in edges]
        self.leads_to = {
            edge.getID(): {each.getID() for each in edge.getOutgoing()} - set(closed) for edge in net.getEdges()
        }
        self.number = {name: n for n, name in enumerate(self.ids)}
        if lost := next((name for name in closed if name not in self.number), None):
            raise ValueError(f"there is no edge '{lost}' to close; {nearest(lost, self.ids)}")
        self.closed = {self.number[name] for name in closed}
        self.lengths = np.array([edge.getLength() for edge in edges])
        self.limits = np.array([max(edge.getSpeed(), 0.1) for edge in edges])
        ends = np.array([(edge.getFromNode().getCoord()[:2], edge.getToNode().getCoord()[:2]) for edge in edges])
        corner, size = ends.min(axis=(0, 1)), max(float(np.ptp(ends, axis=(0, 1)).max()), 1.0)
        self.middles = (ends.mean(axis=1) - corner) / size
        way = ends[:, 1] - ends[:, 0]
        self.headings = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
        self.successors = [self._successors(n, edge) for n, edge in enumerate(edges)]
        self.most = max(map(len, self.successors))
        pairs = [(n, m) for n, following in enumerate(self.successors) for m in following if m not in self.closed]
        if not pairs:
            raise ValueError(f"{path}: no edge leads to another")
        before, after = np.array(pairs).T
        shape = (len(edges), len(edges))
        # Turned round: one search from a destination finds the ways there from everywhere.
        self._backwards = csr_matrix((self.seconds[after], (after, before)), shape)
        _, label = connected_components(self._backwards, connection="strong")
        self.connected = np.flatnonzero(label == np.bincount(label).argmax())
        self.to = lru_cache(maxsize=4096)(self._to)

    @property
    def seconds(self) -> np.ndarray:
        """[R] of a free ride."""
        return self.lengths / self.limits

    def turn(self, edge: int, following: int) -> tuple[float, float]:
        """Cosine and sine of the angle between two edges; left is positive."""
        (x, y), (u, v) = self.headings[edge], self.headings[following]
        return float(x * u + y * v), float(x * v - y * u)

    def path(self, edge: int, destination: int) -> list[int]:
        """The edges of the fastest free ride, both included."""
        found, rest = [edge], self.to(destination)
        while found[-1] != destination:
            open_ones = [m for m in self.successors[found[-1]] if m not in self.closed]
            found.append(min(open_ones, key=lambda m: self.seconds[m] + rest[m]))
        return found

    def _to(self, destination: int) -> np.ndarray:
        """[R] seconds of the fastest free ride from the end of each edge to the end of the destination; inf: none."""
        return dijkstra(self._backwards, indices=destination)

    def _successors(self, n: int, edge: sumolib.net.edge.Edge) -> list[int]:
        ways = {
            self.number[following.getID()]: {connection.getDirection() for connection in connections}
            for following, connections in edge.getOutgoing().items()
            if following.getID() in self.number
        }
        forward = [m for m, directions in ways.items() if directions != {TURN_AROUND}]
        return sorted(forward or ways, key=lambda m: -np.arctan2(*self.turn(n, m)[::-1]))


@dataclass(frozen=True)
class Trip:
    """From the start of one edge to the end of another, from so many seconds of an episode on.

    way: names of all its edges, if it shall be driven as it was recorded.
    """

    depart: float
    origin: int
    destination: int
    way: tuple[str, ...] = ()


AT_HOME = Trip(np.inf, -1, -1)
"""Of a vehicle that does not drive."""


@dataclass
class Demand:
    """Who drives.

    types: name → attributes of the vehicles, as a `vType` has them.   kinds: of each vehicle, type by type.
    names: of each vehicle, as its file has them; none of those on random trips.   trips: of each vehicle; None: random
    ones.   days: trips of recorded episodes, one after the other, instead.
    """

    types: dict[str, Mapping[str, str]]
    kinds: list[str]
    names: list[str] = field(default_factory=list)
    trips: list[Trip] | None = None
    window: float = field(default=0.0)
    days: Iterator[list[Trip]] | None = None

    def drawn(self, network: Network, random: np.random.Generator) -> list[Trip]:
        """The trips of an episode. Random ones start within the window, of seconds."""
        if self.days is not None:
            return next(self.days)
        if self.trips is not None:
            return self.trips
        found = []
        for _ in self.kinds:
            origin, destination = random.choice(network.connected, 2, replace=False).tolist()
            found.append(Trip(float(random.uniform(0, self.window)), origin, destination))
        return found


def random_demand(network: Network, vehicles: int, window: float) -> Demand:
    """Cars on random trips."""
    if len(network.connected) < 2:
        raise ValueError("no two edges of the network can be reached from each other")
    return Demand({CAR: {}}, [CAR] * (vehicles or VEHICLES), window=window)


def recorded_demand(network: Network, path: str, vehicles: int) -> Demand:
    """The first trips and vehicles of a file of routes, the first of them at second 0.

    Raises ValueError, naming it, for one that the network has no way for, and for a file without any.
    """
    types, found = _read_routes(network, path)
    found = sorted(found[: vehicles or None], key=lambda each: each.kind)
    kinds = [each.kind for each in found]
    return Demand(
        types={kind: types.get(kind, {}) for kind in dict.fromkeys(kinds)},
        kinds=kinds,
        names=[each.name for each in found],
        trips=[replace(each.trip, way=()) for each in found],
    )


def recorded_day(network: Network, path: str, demand: Demand) -> list[Trip]:
    """The trips of the vehicles of `demand` as a file of routes has them, the first at second 0: who has the same name
    there; those on random trips in the order of departure. Vehicles that are not in the file are at home.

    Raises ValueError as `recorded_demand`, and for a vehicle without a way, or that is none of those of `demand`.
    """
    _, found = _read_routes(network, path)
    names = demand.names or [each.name for each in found]
    if len(names) > len(demand.kinds):
        raise ValueError(f"{path}: expected at most {len(demand.kinds)} vehicles, got {len(names)}; see vehicles=")
    number = {name: n for n, name in enumerate(names)}
    day = [AT_HOME] * len(demand.kinds)
    for each in found:
        if each.name not in number:
            raise ValueError(f"{path}: there is no vehicle '{each.name}' in the environment's routes; list it there")
        if not each.trip.way:
            raise ValueError(f"{path}: expected the edges that vehicle {each.name} took, got its ends alone")
        for before, after in pairwise(each.trip.way):
            if after not in network.leads_to.get(before, ()):
                raise ValueError(f"{path}: vehicle {each.name}: in the network, '{before}' does not lead to '{after}'")
        day[number[each.name]] = each.trip
    return day


@dataclass(frozen=True)
class Vehicle:
    """A vehicle or trip of a file of routes."""

    name: str
    kind: str
    trip: Trip


def _read_routes(network: Network, path: str) -> tuple[dict[str, Mapping[str, str]], list[Vehicle]]:
    """Attributes of the types of a file of routes, and its vehicles and trips by departure, the first at second 0."""
    types: dict[str, Mapping[str, str]] = {}
    routes: dict[str, list[str]] = {}
    data = Path(path).read_bytes()
    root = ElementTree.fromstring(gzip.decompress(data) if path.endswith(".gz") else data)
    for each in root.iter():
        if each.tag == "vType":
            types[each.get("id", "")] = dict(each.attrib)
        elif each.tag == "route" and each.get("id"):
            routes[each.get("id", "")] = each.get("edges", "").split()
    default = DEFAULT if CAR in types else CAR
    if DEFAULT in types:
        types[default] = types[DEFAULT]
    called = {None: CAR, DEFAULT: default}
    found = [
        Vehicle(each.get("id", ""), called.get(kind := each.get("type"), str(kind)), _trip(network, each, routes))
        for each in root
        if each.tag in ("trip", "vehicle")
    ]
    if not found:
        raise ValueError(f"{path}: there is no trip and no vehicle in it (flows are not taken)")
    found.sort(key=lambda each: each.trip.depart)
    begin = found[0].trip.depart
    return types, [replace(each, trip=replace(each.trip, depart=each.trip.depart - begin)) for each in found]


def _trip(network: Network, element: ElementTree.Element, routes: Mapping[str, list[str]]) -> Trip:
    name = f"{element.tag} {element.get('id')}"
    way = _way(element, routes)
    ends = (element.get("from"), element.get("to")) if element.tag == "trip" else (way[0], way[-1]) if way else ()
    if len(ends) != 2 or not all(ends):
        raise ValueError(f"{name}: expected edges that it starts and ends on")
    for edge in ends:
        if edge not in network.number:
            raise ValueError(f"{name}: the network has no edge '{edge}' for passenger cars")
        if network.number[edge] in network.closed:
            raise ValueError(f"{name}: expected to start and end on open edges, '{edge}' is closed")
    origin, destination = (network.number[str(edge)] for edge in ends)
    if not np.isfinite(network.to(destination)[origin]):
        raise ValueError(f"{name}: there is no way from {ends[0]} to {ends[1]}")
    try:
        return Trip(float(element.get("depart", "")), origin, destination, tuple(way))
    except ValueError as error:
        raise ValueError(f"{name}: expected seconds as its depart, got {element.get('depart')!r}") from error


def _way(element: ElementTree.Element, routes: Mapping[str, list[str]]) -> list[str]:
    """The edges of a vehicle. One that changed its mind has a distribution of routes, of which it drove the last."""
    inner = element.findall("route") or element.findall("routeDistribution/route")
    return inner[-1].get("edges", "").split() if inner else routes.get(element.get("route", ""), [])


def numbered(kinds: list[str]) -> Iterator[tuple[str, int]]:
    """Each type and how many it has, in order."""
    for kind in dict.fromkeys(kinds):
        yield kind, kinds.count(kind)
