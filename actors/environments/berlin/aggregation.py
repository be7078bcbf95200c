"""From a road network of any size to a scenario of few roads and facilities.

1. Junctions: centres of where people live and work (k-means on cells, so that the outer parts get some, too), each
   moved to a large junction nearby. 2. Zones: every node belongs to the junction with the shortest way there and back.
3. Roads join junctions whose zones are joined by links both ways: first the spanning tree that carries most trips,
then a second road for dead ends, then by trips, where pairs whose fastest way runs through a third junction come last.
A road has the time of the real fastest way, and the capacity of all links that cross from zone to zone. 4. Facilities
are the junctions with the least person-weighted distance to homes and works (greedy start, then swaps).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from bm3il.actors.environments.berlin.raw_network import SMALLEST_MINUTES, RawNetwork
from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.protocol.errors import InputError

# Seed and redundancy as in the script that aggregated the scenarios that ship (design: build_berlin.py).
SEED = 2020
CELLS_ACROSS = 40
NEAR_NODES = 40
ROADS_PER_JUNCTION = 3
REDUNDANT, REDUNDANT_WEIGHT = 0.97, 0.02
TYPICAL_LOAD_AGENTS = 0.6
"""What a median road holds, unless a flow scale is given: as in the calibrated Berlin."""


@dataclass(frozen=True)
class Hours:
    """The day of a scenario, and how much agents are in each other's way. flow_scale 0: see `TYPICAL_LOAD_AGENTS`."""

    step_minutes: float = 10.0
    steps: int = 100
    day_start_minute: float = 300.0
    work_start_minute: float = 480.0
    work_end_minute: float = 1020.0
    vehicles_per_agent: float = 100.0
    flow_scale: float = 0.0
    right_reward: float = 5.8
    wrong_reward: float = -4.1


@dataclass(frozen=True)
class _Roads:
    """Junctions and the roads between them."""

    names: tuple[str, ...]
    xy: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    minutes: np.ndarray
    capacity: np.ndarray


def aggregate(raw: RawNetwork, name: str, roads: int, facilities: int, hours: Hours) -> Scenario:
    """A scenario of so many roads (an even number, in pairs of directions) and facilities; 0 roads: links as they are.

    Raises InputError if the network is too small for it.
    """
    net = _as_it_is(raw) if roads == 0 else _aggregated(raw, roads, facilities)
    kinds, junction = _facilities(raw, net, facilities)
    homes, works = junction[: kinds.count("home")], junction[kinds.count("home") :]
    home = cdist(raw.home_xy, net.xy[homes]).argmin(axis=1)
    work = cdist(raw.work_xy, net.xy[works]).argmin(axis=1) + len(homes)
    pairs: Counter[tuple[int, int]] = Counter()
    for key, trips in zip(zip(home.tolist(), work.tolist(), strict=True), raw.trips, strict=True):
        pairs[key] += trips
    load = net.minutes / 60 * net.capacity
    scale = hours.flow_scale or TYPICAL_LOAD_AGENTS * hours.vehicles_per_agent / float(np.median(load))
    return Scenario(
        **{**vars(hours), "flow_scale": scale},
        name=name,
        source=f"aggregated from {raw.source}",
        junction_names=net.names,
        junction_xy=net.xy,
        tail=net.tail,
        head=net.head,
        free_flow_minutes=net.minutes,
        load_vehicles=load,
        kinds=kinds,
        facility_names=tuple(net.names[j] for j in junction),
        facility_junction=junction,
        facility_xy=net.xy[junction],
        transitions=_transitions(net, junction),
        demand=np.array([(*pair, trips) for pair, trips in pairs.most_common()]),
    )


def _as_it_is(raw: RawNetwork) -> _Roads:
    keep = raw.largest_component()
    number = np.cumsum(keep) - 1
    links = keep[raw.tail] & keep[raw.head] & (raw.tail != raw.head)
    names = tuple(np.array(raw.node_names)[keep].tolist())
    ends = number[raw.tail[links]], number[raw.head[links]]
    minutes = np.maximum(raw.minutes[links], SMALLEST_MINUTES)  # a link of no length takes no time
    return _Roads(names, raw.node_xy[keep], *ends, minutes, raw.capacity[links])


def _aggregated(raw: RawNetwork, roads: int, facilities: int) -> _Roads:
    """As many roads as asked for, between as few junctions as are joined by so many."""
    fewest = _fewest_junctions(roads, facilities)
    if roads % 2 or roads < 2 * fewest:
        raise InputError(
            f"expected an even number of roads, at least {2 * fewest} with {facilities} facilities: {roads}"
        )
    usable = int(raw.largest_component().sum())
    if usable < facilities:
        raise InputError(
            f"{raw.source}: {usable} of {len(raw.node_names)} nodes can be reached from each other, "
            f"too few for {facilities} facilities"
        )
    for junctions in range(fewest, min(roads // 2, usable) + 1):
        zones = _zones(raw, junctions)
        if zones.pairs >= roads // 2:
            return _joined(raw, zones, roads)
    most = _most_roads(raw, facilities, min(roads // 2, usable))
    advice = f"at most {most} --roads go with {facilities}" if most else f"{facilities} are too many"
    raise InputError(
        f"{raw.source}: no choice of junctions is joined by {roads} roads: {advice} --facilities; "
        "--roads 0 takes all links as they are"
    )


def _fewest_junctions(roads: int, facilities: int) -> int:
    return max(facilities, round(roads / ROADS_PER_JUNCTION))


def _most_roads(raw: RawNetwork, facilities: int, most_junctions: int) -> int:
    """The largest number of roads between at most so many junctions that is not refused; 0 if there is none."""
    most = 0
    for junctions in range(most_junctions, max(facilities, 2) - 1, -1):
        if _fewest_junctions(most + 2, facilities) > junctions:
            break
        for roads in range(2 * junctions, 2 * _zones(raw, junctions).pairs + 1, 2):
            if _fewest_junctions(roads, facilities) <= junctions:
                most = max(most, roads)
    return most


@dataclass(frozen=True)
class _Zones:
    """Junctions, and what joins the zones around them.

    hubs: [J] nodes.   minutes: [J, J] of the fastest ways.   capacity: [J, J] of all links that cross.
    flow: [J, J] trips that cross.   neighbours: zones that links join both ways; weights are what a road is worth.
    """

    hubs: np.ndarray
    minutes: np.ndarray
    capacity: np.ndarray
    flow: np.ndarray
    neighbours: nx.Graph

    @property
    def pairs(self) -> int:
        """How many roads, in each direction, can be made of them: none if they are not all connected."""
        return int(self.neighbours.number_of_edges()) if nx.is_connected(self.neighbours) else 0


def _zones(raw: RawNetwork, junctions: int) -> _Zones:
    graph = raw.graph()
    hubs = _junctions(raw, junctions)
    away, before = dijkstra(graph, indices=hubs, return_predecessors=True)
    zone = (away + dijkstra(graph.T.tocsr(), indices=hubs)).argmin(axis=0)
    capacity, links = np.zeros((2, junctions, junctions))
    crossing = (zone[raw.tail] != zone[raw.head]) & raw.through[raw.tail] & raw.through[raw.head]
    places = zone[raw.tail[crossing]], zone[raw.head[crossing]]
    np.add.at(capacity, places, raw.capacity[crossing])
    np.add.at(links, places, 1)
    flow, minutes = _flows(raw, hubs, zone, before), away[:, hubs]
    return _Zones(hubs, minutes, capacity, flow, _neighbours(minutes, links, flow))


def _joined(raw: RawNetwork, zones: _Zones, roads: int) -> _Roads:
    pairs = _chosen(zones.neighbours, zones.flow, roads // 2)
    tail = np.array([end for a, b in pairs for end in (a, b)])
    head = np.array([end for a, b in pairs for end in (b, a)])
    names = tuple(raw.node_names[hub] for hub in zones.hubs)
    minutes = np.maximum(zones.minutes[tail, head], SMALLEST_MINUTES)
    return _Roads(names, raw.node_xy[zones.hubs], tail, head, minutes, zones.capacity[tail, head])


def _junctions(raw: RawNetwork, count: int) -> np.ndarray:
    """[count] nodes, all different."""
    usable = np.flatnonzero(raw.largest_component())
    points, weights = np.concatenate([raw.home_xy, raw.work_xy]), np.tile(raw.trips, 2)
    cell_size = max(np.ptp(points, axis=0).max() / CELLS_ACROSS, 1e-9)
    _, cell = np.unique(np.floor(points / cell_size), axis=0, return_inverse=True)
    totals = np.bincount(cell.ravel(), weights)
    centre = np.stack([np.bincount(cell.ravel(), weights * points[:, d]) / totals for d in (0, 1)], axis=1)
    repeats = np.ceil(np.sqrt(totals / totals.min())).clip(max=100).astype(int)
    if len(centre) > count:
        centre = kmeans2(np.repeat(centre, repeats, axis=0), count, iter=60, minit="++", seed=SEED, missing="warn")[0]
    size = np.bincount(raw.tail, raw.capacity, len(raw.node_names)) + np.bincount(
        raw.head, raw.capacity, len(raw.node_names)
    )
    tree, chosen = cKDTree(raw.node_xy[usable]), list[int]()
    for point in centre[:count]:
        distance, near = tree.query(point, min(NEAR_NODES, len(usable)))
        distance, near = np.atleast_1d(distance), usable[np.atleast_1d(near)]
        score = size[near] * np.exp(-distance / max(distance.mean(), 1e-9))
        score[np.isin(near, chosen)] = -1
        if score.max() > 0:
            chosen.append(int(near[score.argmax()]))
    for node in usable[np.argsort(-size[usable], kind="stable")]:
        if len(chosen) < count and node not in chosen:
            chosen.append(int(node))
    return np.array(chosen)


def _flows(raw: RawNetwork, hubs: np.ndarray, zone: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[J, J] trips that cross from zone to zone, there and back, on the fastest ways between the zones' junctions."""
    tree = cKDTree(raw.node_xy)
    trips = np.zeros((len(hubs), len(hubs)))
    np.add.at(trips, (zone[tree.query(raw.home_xy)[1]], zone[tree.query(raw.work_xy)[1]]), raw.trips)
    trips += trips.T
    flow = np.zeros_like(trips)
    for origin, destination in np.argwhere(trips):
        way = [hubs[destination]]
        while way[-1] != hubs[origin] and before[origin, way[-1]] >= 0:
            way.append(before[origin, way[-1]])
        zones = zone[way[::-1]]
        step = zones[:-1] != zones[1:]
        np.add.at(flow, (zones[:-1][step], zones[1:][step]), trips[origin, destination])
    return flow


def _neighbours(minutes: np.ndarray, links: np.ndarray, flow: np.ndarray) -> nx.Graph:
    """Junctions, joined where links lead both ways."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(minutes)))
    for a, b in np.argwhere(np.triu((links > 0) & (links.T > 0), 1)).tolist():
        via = (minutes[a] + minutes[:, b]), (minutes[b] + minutes[:, a])
        others = np.delete(np.stack(via), [a, b], axis=1).min(axis=1, initial=np.inf)
        redundant = max(minutes[a, b] / others[0], minutes[b, a] / others[1]) >= REDUNDANT
        trips = flow[a, b] + flow[b, a] + 1e-6
        graph.add_edge(a, b, weight=trips * (REDUNDANT_WEIGHT if redundant else 1))
    return graph


def _chosen(graph: nx.Graph, flow: np.ndarray, count: int) -> list[tuple[int, int]]:
    """`count` of the pairs of neighbours, to be joined by a road in each direction."""
    chosen = {tuple(sorted(edge)) for edge in nx.maximum_spanning_edges(graph, weight="weight", data=False)}
    by_weight = sorted(graph.edges(data="weight"), key=lambda edge: -edge[2])
    candidates = [tuple(sorted(edge[:2])) for edge in by_weight]
    for junction in sorted(graph, key=lambda j: -flow[j].sum()):
        if sum(junction in pair for pair in chosen) == 1 and len(chosen) < count:
            chosen |= set([pair for pair in candidates if junction in pair and pair not in chosen][:1])
    chosen |= set([pair for pair in candidates if pair not in chosen][: count - len(chosen)])
    return sorted(chosen)


def _facilities(raw: RawNetwork, net: _Roads, count: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Kinds, homes first, and junctions, all different."""
    if not 2 <= count <= len(net.names):
        raise InputError(f"expected 2..{len(net.names)} facilities for as many junctions, got {count}")
    wanted = {"home": count // 2, "work": count - count // 2}
    cost = {
        kind: cdist(points, net.xy) * raw.trips[:, None]
        for kind, points in (("home", raw.home_xy), ("work", raw.work_xy))
    }
    chosen: dict[str, list[int]] = {"home": [], "work": []}

    def total(kind: str, junctions: list[int]) -> float:
        return float(cost[kind][:, junctions].min(axis=1).sum())

    def free() -> list[int]:
        return [j for j in range(len(net.names)) if j not in (*chosen["home"], *chosen["work"])]

    for _ in range(max(wanted.values())):
        for kind in wanted:
            if len(chosen[kind]) < wanted[kind]:
                chosen[kind].append(min(free(), key=lambda j, kind=kind: total(kind, [*chosen[kind], j])))  # type: ignore[misc]
    improved = True
    while improved:
        improved = False
        for kind, junctions in chosen.items():
            for place in range(len(junctions)):
                best = total(kind, junctions)
                for other in free():
                    tried = [*junctions[:place], other, *junctions[place + 1 :]]
                    if (value := total(kind, tried)) < best * (1 - 1e-9):
                        best, junctions[place], improved = value, other, True
    kinds = ("home",) * wanted["home"] + ("work",) * wanted["work"]
    return kinds, np.array([*chosen["home"], *chosen["work"]])


def _transitions(net: _Roads, facilities: np.ndarray) -> np.ndarray:
    """No turning back on a road, unless there is no other way on; anywhere, if roads would not be connected else."""
    follows = net.head[:, None] == net.tail
    back = follows & (net.tail[:, None] == net.head)
    exits = np.bincount(net.tail, minlength=len(net.names))
    onward = follows & ~(back & (exits[net.head] > 1)[:, None])
    if connected_components(csr_array(onward), directed=True, connection="strong")[0] > 1:
        onward = follows
    moves = [np.argwhere(onward)]
    for place, junction in enumerate(facilities, start=len(net.tail)):
        arriving, leaving = np.flatnonzero(net.head == junction), np.flatnonzero(net.tail == junction)
        moves.append(np.stack([arriving, np.full(len(arriving), place)], axis=1))
        moves.append(np.stack([np.full(len(leaving), place), leaving], axis=1))
    return np.concatenate(moves)
