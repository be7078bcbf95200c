"""One simulation of SUMO, in which vehicles choose the next edge. libsumo holds one per process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libsumo
import numpy as np

from bm3il.protocol.adapters.sumo_network import AT_HOME, DEFAULT, Demand, Network, Trip

STAY, ARRIVED = 0, 10.0
"""The action of those who have nothing to decide; what an arrival is worth, in minutes on the way."""
TAKEN_NONE = -1
OWN, GOAL, AHEAD = 7, 4, 6
"""Numbers that a vehicle sees of itself, of its destination, and of each edge that may follow."""
MOST_MINUTES = 10.0
"""Longer delays look alike."""
TELEPORT_SECONDS = 120
SET = {
    "vClass": libsumo.vehicletype.setVehicleClass,
    "length": lambda name, value: libsumo.vehicletype.setLength(name, float(value)),
    "maxSpeed": lambda name, value: libsumo.vehicletype.setMaxSpeed(name, float(value)),
    "accel": lambda name, value: libsumo.vehicletype.setAccel(name, float(value)),
    "decel": lambda name, value: libsumo.vehicletype.setDecel(name, float(value)),
    "sigma": lambda name, value: libsumo.vehicletype.setImperfection(name, float(value)),
}
"""Attributes of a `vType` that count here."""


@dataclass
class View:
    """What the N vehicles see, get and may do: [N, O] and [N] float32, [N, A] and [N] bool; and whether all is over.

    taken: [N] float32, what vehicles on recorded ways do next; TAKEN_NONE if that is no action.
    """

    seen: np.ndarray
    taken: np.ndarray
    rewards: np.ndarray
    masks: np.ndarray
    active: np.ndarray
    ended: bool

    @classmethod
    def empty(cls, network: Network, vehicles: int) -> View:
        return cls(
            seen=np.zeros((vehicles, OWN + GOAL + AHEAD * network.most), np.float32),
            taken=np.zeros(vehicles, np.float32),
            rewards=np.zeros(vehicles, np.float32),
            masks=np.ones((vehicles, 1 + network.most), bool),
            active=np.zeros(vehicles, bool),
            ended=False,
        )

    def tobytes(self) -> bytes:
        """Floats before bits."""
        arrays = (self.seen, self.taken, self.rewards, self.masks, self.active, np.array([self.ended]))
        return b"".join(array.tobytes() for array in arrays)

    @classmethod
    def of(cls, network: Network, vehicles: int, data: bytes) -> View:
        """The inverse of `tobytes`."""
        found, first = cls.empty(network, vehicles), 0
        for name in ("seen", "taken", "rewards", "masks", "active"):
            array = getattr(found, name)
            array[...] = np.frombuffer(data, array.dtype, array.size, first).reshape(array.shape)
            first += array.nbytes
        found.ended = bool(data[first])
        return found


class World:
    """A network with N vehicles, named by their numbers.

    A vehicle is always on the fastest free way to its destination. Where an edge ends within a step, it chooses which
    one shall follow, and from there the way is planned anew. One on a recorded way keeps to that, whatever it is told.
    """

    def __init__(self, network: Network, path: str, demand: Demand, interval: int) -> None:
        """interval: seconds of a step."""
        self._network, self._path, self._demand, self._interval = network, path, demand, interval
        self._running = False
        self._ride_seconds: dict[int, float] = {}

    def reset(self, seed: int) -> View:
        """Begin anew."""
        options = ["-n", self._path, "--seed", str(seed % 2**31), "--time-to-teleport", str(TELEPORT_SECONDS)]
        options += ["--step-length", "1", "--no-step-log", "true", "--no-warnings", "true"]
        if self._running:
            libsumo.load(options)
        else:
            libsumo.start(["sumo", *options])
        self._running = True
        for kind in self._demand.types:  # all of them before one is changed, which may be the default itself
            if kind != DEFAULT:
                libsumo.vehicletype.copy(DEFAULT, kind)
        for kind, attributes in self._demand.types.items():
            for name, value in attributes.items():
                if name in SET:
                    SET[name](kind, value)
        self._trips = self._demand.drawn(self._network, np.random.default_rng(seed))
        self._edges = np.full(len(self._trips), -1)
        self._arrived, self._deciding = np.zeros((2, len(self._trips)), bool)
        for n, (kind, trip) in enumerate(zip(self._demand.kinds, self._trips, strict=True)):
            if trip is AT_HOME:
                self._arrived[n] = True
            else:
                self._add(n, kind, trip)
        libsumo.simulationStep()  # those who depart at once are there
        return self._view(np.zeros(len(self._trips)))

    def step(self, actions: Sequence[int]) -> View:
        """One interval. actions: of each vehicle that decides, 1 + the number of the successor; of others anything."""
        for n in np.flatnonzero(self._deciding).tolist():
            self._turn(n, actions[n] - 1)
        seconds = np.zeros(len(self._trips))
        for _ in range(self._interval):
            libsumo.simulationStep()
            driving = [int(name) for name in libsumo.vehicle.getIDList()]
            seconds[driving] += 1
            arrived = [int(name) for name in libsumo.simulation.getArrivedIDList()]
            self._arrived[arrived] = True
            seconds[arrived] -= ARRIVED * 60
        return self._view(-seconds / 60)

    def _add(self, n: int, kind: str, trip: Trip) -> None:
        edges = trip.way or [self._network.ids[edge] for edge in self._network.path(trip.origin, trip.destination)]
        libsumo.route.add(str(n), edges)
        libsumo.vehicle.add(str(n), str(n), typeID=kind, depart=str(trip.depart))

    def _turn(self, n: int, choice: int) -> None:
        edge, following, trip = self._edges[n], self._network.successors[self._edges[n]], self._trips[n]
        if trip.way:
            return
        way = self._network.path(following[choice], trip.destination)
        libsumo.vehicle.setRoute(str(n), [self._network.ids[each] for each in (edge, *way)])

    def _view(self, rewards: np.ndarray) -> View:
        view = View.empty(self._network, len(self._trips))
        view.rewards[:] = rewards
        view.ended = bool(self._arrived.all())
        self._ride_seconds = {}
        self._deciding[:] = False
        for name in libsumo.vehicle.getIDList():
            n, edge = int(name), self._network.number.get(libsumo.vehicle.getRoadID(name))
            if edge is not None:
                self._edges[n] = edge
            if self._edges[n] >= 0:
                view.active[n] = True
                self._see(view, n, name, between=edge is None)
        return view

    def _see(self, view: View, n: int, name: str, between: bool) -> None:
        """What a vehicle sees and may do; between: two edges, on a junction."""
        net, edge, goal = self._network, self._edges[n], self._trips[n].destination
        place = net.lengths[edge] if between else libsumo.vehicle.getLanePosition(name)
        near = place + self._interval * net.limits[edge] >= net.lengths[edge]
        decides = near and not between and edge != goal
        rest = net.to(goal)
        line = net.middles[goal] - net.middles[edge]
        speed = libsumo.vehicle.getSpeed(name) / net.limits[edge]
        view.seen[n, :OWN] = [*net.middles[edge], *net.headings[edge], place / net.lengths[edge], speed, decides]
        view.seen[n, OWN : OWN + GOAL] = [*line, np.hypot(*line), min(rest[edge] / 60, MOST_MINUTES)]
        self._deciding[n] = decides
        view.masks[n] = False
        view.masks[n, STAY] = not decides
        delays = [
            np.inf if following in net.closed else self._seconds(following) + rest[following]
            for following in net.successors[edge]
        ]
        best = min(delays, default=0.0)
        for k, following in enumerate(net.successors[edge]):
            if np.isfinite(delays[k]):
                view.masks[n, 1 + k] = decides
                first = OWN + GOAL + AHEAD * k
                delay = min((delays[k] - best) / 60, MOST_MINUTES)
                full = libsumo.edge.getLastStepOccupancy(net.ids[following])
                slow = 1 - min(net.seconds[following] / self._seconds(following), 1)
                view.seen[n, first : first + AHEAD] = [1, delay, full, slow, *net.turn(edge, following)]
        if decides and (way := self._trips[n].way):
            after = net.number.get(way[libsumo.vehicle.getRouteIndex(name) + 1])
            choice = 1 + net.successors[edge].index(after) if after in net.successors[edge] else STAY
            view.taken[n] = choice if view.masks[n, choice] else TAKEN_NONE

    def _seconds(self, edge: int) -> float:
        """That a ride takes now; asked once a step."""
        if edge not in self._ride_seconds:
            now = libsumo.edge.getTraveltime(self._network.ids[edge])
            self._ride_seconds[edge] = float(np.clip(now, self._network.seconds[edge], 60 * MOST_MINUTES))
        return self._ride_seconds[edge]
