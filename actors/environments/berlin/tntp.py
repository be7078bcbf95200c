"""TNTP files: networks, nodes and trip tables of the TransportationNetworks collection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import numpy as np

from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.protocol.errors import InputError

MAX_FILE_BYTES = 1 << 28
CAPACITY, FREE_FLOW_TIME = 2, 4
"""Columns of a network file, after the nodes that a link begins and ends at."""


def read_tntp(network: Path, trips: Path, nodes: Path | None, minutes_per_unit: float = 1.0) -> RawNetwork:
    """Read `*_net.tntp`, `*_trips.tntp` and `*_node.tntp`; without the last one, a layout is computed.

    Who travels from zone A to zone B lives in A and works in B. minutes_per_unit: of the free-flow times, whose unit
    these files do not tell. Raises InputError, naming file and line, for what is not such a file.
    """
    metadata, rows = _network_rows(network)
    numbers = sorted({int(node) for row in rows for node in row[:2]})
    index = {number: position for position, number in enumerate(numbers)}
    first_through = int(metadata.get("FIRST THRU NODE", 1))
    tail, head = ([index[int(row[end])] for row in rows] for end in (0, 1))
    xy = _coordinates(nodes, index) if nodes else _layout(len(numbers), tail, head)
    demand = [(index[a], index[b], n) for a, b, n in _trips(trips) if a != b and n > 0 and a in index and b in index]
    table = np.array(demand, np.float64).reshape(-1, 3)
    return RawNetwork(
        source=f"{network.name} and {trips.name}",
        node_names=tuple(map(str, numbers)),
        node_xy=xy,
        tail=np.array(tail),
        head=np.array(head),
        minutes=np.array([row[FREE_FLOW_TIME] for row in rows]) * minutes_per_unit,
        capacity=np.array([row[CAPACITY] for row in rows]),
        home_xy=xy[table[:, 0].astype(int)],
        work_xy=xy[table[:, 1].astype(int)],
        trips=table[:, 2],
        through=np.array([number >= first_through for number in numbers]),
    )


def _network_rows(path: Path) -> tuple[dict[str, float], list[list[float]]]:
    metadata: dict[str, float] = {}
    rows = []
    for number, line in _lines(path):
        if tag := re.match(r"<([A-Z ]+)>\s*([\d.]*)", line):
            if tag[2]:
                metadata[tag[1].strip()] = float(tag[2])
            continue
        fields = line.rstrip("; \t").split()
        try:
            values = [float(field) for field in fields]
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected numbers, found '{line[:60]}'") from error
        if len(values) <= FREE_FLOW_TIME:
            raise InputError(f"{path}, line {number}: expected at least 5 columns, found {len(values)}")
        if values[FREE_FLOW_TIME] < 0 or values[CAPACITY] <= 0:
            raise InputError(f"{path}, line {number}: expected a time ≥ 0 and a capacity > 0")
        rows.append(values)
    if not rows:
        raise InputError(f"{path}: there is no link")
    return metadata, rows


def _coordinates(path: Path, index: dict[int, int]) -> np.ndarray:
    xy = np.full((len(index), 2), np.nan)
    for number, line in _lines(path):
        fields = line.rstrip("; \t").split()
        try:
            node, x, y = int(fields[0]), float(fields[1]), float(fields[2])
        except (ValueError, IndexError) as error:
            if fields and not fields[0].isdigit():  # the heading
                continue
            raise InputError(f"{path}, line {number}: expected node, x and y, found '{line[:60]}'") from error
        if node in index:
            xy[index[node]] = x, y
    missing = [name for name, position in index.items() if not np.isfinite(xy[position]).all()]
    if missing:
        raise InputError(f"{path}: {len(missing)} nodes of the network have no coordinates, the first is {missing[0]}")
    return xy


def _layout(nodes: int, tail: list[int], head: list[int]) -> np.ndarray:
    graph = nx.Graph(zip(tail, head, strict=True))
    graph.add_nodes_from(range(nodes))
    places = nx.spring_layout(graph, seed=0)
    return np.array([places[node] for node in range(nodes)])


def _trips(path: Path) -> Iterator[tuple[int, int, float]]:
    origin = None
    for number, line in _lines(path):
        if line.startswith("<"):
            continue
        if found := re.match(r"Origin\s+(\d+)", line):
            origin = int(found[1])
            continue
        for part in filter(None, (part.strip() for part in line.split(";"))):
            found = re.fullmatch(r"(\d+)\s*:\s*([-+.\deE]+)", part)
            if not found or origin is None:
                raise InputError(f"{path}, line {number}: expected 'destination : trips', found '{part[:40]}'")
            yield origin, int(found[1]), float(found[2])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are neither empty nor a comment."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                line = line.strip()
                if line and not line.startswith("~"):
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
