"""A road network and its trips as the files of others tell them, before it is made a scenario."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from bm3il.protocol.errors import InputError

SMALLEST_MINUTES = 1e-6
"""Connectors without length: the graph algorithms take 0 for no connection."""
MAX_COORDINATE = 1e12
"""As in a scenario: distances between larger ones overflow."""
MIN_INSIDE, MIN_MOVING = 0.01, 0.01
"""Parts of all ends of trips that lie where the network is, and of all trips that lead from one node to another."""


@dataclass(frozen=True)
class RawNetwork:
    """Nodes, directed links and commuters' trips. Raises InputError, naming the row, for what cannot be a network.

    source: where it comes from, in words.   node_names: [n].   node_xy: [n, 2], any length unit.
    tail, head: [l] node numbers.   minutes: [l] free-flow travel times ≥ 0.   capacity: [l] vehicles per hour > 0.
    home_xy, work_xy: [p, 2] ends of trips, in the unit of the nodes.   trips: [p] > 0.
    through: [n] bool, whether a way may lead through a node (false for zones that trips only begin and end at).
    notes: what of the files was left out or made up, a line each.
    unit_told: whether the files tell the unit of their times.
    """

    source: str
    node_names: tuple[str, ...]
    node_xy: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    minutes: np.ndarray
    capacity: np.ndarray
    home_xy: np.ndarray
    work_xy: np.ndarray
    trips: np.ndarray
    through: np.ndarray
    notes: tuple[str, ...] = ()
    unit_told: bool = True

    def __post_init__(self) -> None:
        checks = {
            "node": (np.abs(self.node_xy) <= MAX_COORDINATE).all(axis=1),
            "link": np.isfinite(self.minutes) & (self.minutes >= 0) & np.isfinite(self.capacity) & (self.capacity > 0),
            "trip": (np.abs([self.home_xy, self.work_xy]) <= MAX_COORDINATE).all(axis=(0, 2)) & (self.trips > 0),
        }
        wanted = {"node": "coordinates", "link": "a time ≥ 0 and a capacity > 0", "trip": "two ends and a number > 0"}
        for what, good in checks.items():
            if not len(good):
                raise InputError(f"{self.source}: there is no {what}")
            if not good.all():
                raise InputError(f"{self.source}: {what} {int(np.argmin(good)) + 1} lacks {wanted[what]}")
        self._check_coordinates()

    def _check_coordinates(self) -> None:
        """People in degrees and roads in metres are each right, and together make trips that lead nowhere."""
        ends = np.stack([self.home_xy, self.work_xy])
        nearest = cKDTree(self.node_xy).query(ends)[1]
        if self.ends_inside() < MIN_INSIDE or (nearest[0] != nearest[1]).mean() < MIN_MOVING:
            raise InputError(
                f"{self.source}: homes and works are at {_extent(ends)}, the network is at {_extent(self.node_xy)}, "
                "and no trip leads along its roads: are both in one coordinate system?"
            )

    def ends_inside(self) -> float:
        """Which part of all homes and works lies where the network is, or near."""
        low, high = self.node_xy.min(axis=0), self.node_xy.max(axis=0)
        margin = (high - low).max() / 10
        ends = np.stack([self.home_xy, self.work_xy])
        return float(((ends >= low - margin) & (ends <= high + margin)).all(axis=2).mean())

    def within(self, radius: float) -> RawNetwork:
        """Only trips with both ends within `radius` (the nodes' unit) of the middle, the median of all works."""
        middle = np.median(self.work_xy, axis=0)
        ends = np.stack([self.home_xy, self.work_xy])
        near = (np.linalg.norm(ends - middle, axis=2) <= radius).all(axis=0)
        if not near.any():
            raise InputError(f"{self.source}: no trip lies within {radius:g} of the middle of all works")
        return replace(self, home_xy=self.home_xy[near], work_xy=self.work_xy[near], trips=self.trips[near])

    def graph(self) -> csr_array:
        """[n, n] minutes of the fastest link between two nodes; links out of zones are those of their own trips."""
        minutes = np.maximum(self.minutes, SMALLEST_MINUTES)
        # One of parallel links is kept, since a sparse matrix would add up their minutes.
        order = np.argsort(-minutes, kind="stable")  # the last one that is written stays
        fastest = dict(zip(zip(self.tail[order].tolist(), self.head[order].tolist(), strict=True), order, strict=True))
        keep = np.array([link for (tail, head), link in fastest.items() if tail != head and self.through[tail]])
        if not keep.size:
            raise InputError(f"{self.source}: no link joins two nodes that ways may lead through")
        shape = (len(self.node_names),) * 2
        return csr_array((minutes[keep], (self.tail[keep], self.head[keep])), shape=shape)

    def largest_component(self) -> np.ndarray:
        """[n] bool: the nodes of the largest part in which everything reaches everything."""
        _, label = connected_components(self.graph(), directed=True, connection="strong")
        return (label == np.bincount(label).argmax()) & self.through


def left_out(links: Counter[str]) -> tuple[str, ...]:
    """A note on links that were left out, by why; none if there were none."""
    return (f"left out: {', '.join(f'{n} links {why}' for why, n in links.most_common())}",) if links else ()


def _extent(xy: np.ndarray) -> str:
    (x, y), (right, top) = xy.reshape(-1, 2).min(axis=0), xy.reshape(-1, 2).max(axis=0)
    return f"x {x:.7g} to {right:.7g}, y {y:.7g} to {top:.7g}"
