"""TNTP files: networks, nodes and trip tables of the TransportationNetworks collection."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np

from bm3il.actors.environments.berlin.packed import unpacked
from bm3il.actors.environments.berlin.raw_network import RawNetwork, left_out
from bm3il.protocol.errors import InputError

MAX_FILE_BYTES = 1 << 28
TAG = re.compile(r"<([^<>]*)>\s*(\S*)")
LINKS = {"init node": 0, "term node": 1, "capacity": 2, "free flow time": 4}
NODES = {"node": 0, "x": 1, "y": 2}
"""Columns that are read, and where they are in files without a heading."""
HEADINGS = {
    "init node": r"(?:init|from|tail)(?: node)?",
    "term node": r"(?:term|to|head)(?: node)?",
    "capacity": r"capacity|cap",
    "free flow time": r"(?:free ?flow )?(?:travel )?time|fftt?|t0",
    "node": r"node(?: id)?|id",
    "x": r"x ?coord|x|lon|longitude",
    "y": r"y ?coord|y|lat|latitude",
    "another": r"link(?: id| type)?|type|length|b|power|speed(?: limit)?|toll|lanes",
}
"""What columns are called, without case, underscores and units in brackets."""
HEADING = re.compile(
    "|".join(f"(?P<{name.replace(' ', '_')}>(?:{words})(?!\\S))" for name, words in HEADINGS.items()) + r"|\S+"
)


def read_tntp(network: Path, trips: Path, nodes: Path | None, minutes_per_unit: float = 1.0) -> RawNetwork:
    """Read `*_net.tntp`, `*_trips.tntp` and `*_node.tntp`; without the last one, a layout is computed.

    Who travels from zone A to zone B lives in A and works in B. minutes_per_unit: of the free-flow times, whose unit
    these files do not tell. Raises InputError, naming file and line, for what is not such a file.
    """
    if not 0 < minutes_per_unit < math.inf:
        raise InputError(f"--minutes-per-unit must be above 0, got {minutes_per_unit}")
    links = _read_links(network)
    numbers = sorted({node for link in links.rows for node in link[:2]})
    index = {number: position for position, number in enumerate(numbers)}
    if links.first_through > numbers[-1]:
        raise InputError(
            f"{network}: ways may lead through nodes from {links.first_through} on (FIRST THRU NODE), "
            f"and the last node is {numbers[-1]}"
        )
    tail, head = ([index[int(row[end])] for row in links.rows] for end in (0, 1))
    xy = _coordinates(nodes, index) if nodes else _layout(len(numbers), tail, head)
    demand, notes = _demand(trips, index)
    made_up = () if nodes else ("no file of nodes (NAME_node.tntp): their places are made up",)
    return RawNetwork(
        source=f"{network.name} and {trips.name}",
        node_names=tuple(map(str, numbers)),
        node_xy=xy,
        tail=np.array(tail),
        head=np.array(head),
        minutes=np.array([row[3] for row in links.rows]) * minutes_per_unit,
        capacity=np.array([row[2] for row in links.rows]),
        home_xy=xy[demand[:, 0].astype(int)],
        work_xy=xy[demand[:, 1].astype(int)],
        trips=demand[:, 2],
        through=np.array([number >= links.first_through for number in numbers]),
        notes=(*links.notes, *made_up, *notes),
        unit_told=False,
    )


@dataclass(frozen=True)
class _Links:
    """rows: init node, term node, capacity, free-flow time.   first_through: ways lead through nodes from it on."""

    rows: list[tuple[int, int, float, float]]
    first_through: int
    notes: tuple[str, ...]


def _read_links(path: Path) -> _Links:
    tags, table = _table(path, LINKS)
    rows, closed = list[tuple[int, int, float, float]](), Counter[str]()
    for where, (init, term, capacity, time) in table:
        ends = _whole(init, "init node", where), _whole(term, "term node", where)
        numbers = _number(capacity, "capacity", where), _number(time, "free flow time", where)
        if min(numbers) < 0:
            raise InputError(f"{where}: expected a time ≥ 0 and a capacity ≥ 0, found {time} and {capacity}")
        if numbers[0] > 0:
            rows.append((*ends, *numbers))
        else:
            closed["of capacity 0"] += 1
    if not rows:
        raise InputError(f"{path}: there is no link{''.join(f'; {note}' for note in left_out(closed))}")
    where, first_through = tags.get("FIRST THRU NODE", ("", ""))
    told = tags.get("NUMBER OF LINKS", ("", ""))[1]
    notes = [f"{path.name} promises {told} links and holds {len(table)}"] if told not in ("", str(len(table))) else []
    return _Links(rows, _whole(first_through or "1", "FIRST THRU NODE", where), (*left_out(closed), *notes))


def _coordinates(path: Path, index: Mapping[int, int]) -> np.ndarray:
    xy = np.full((len(index), 2), np.nan)
    for where, (node, x, y) in _table(path, NODES)[1]:
        if (number := _whole(node, "node", where)) in index:
            xy[index[number]] = _number(x, "x", where), _number(y, "y", where)
    missing = [name for name, position in index.items() if not np.isfinite(xy[position]).all()]
    if missing:
        raise InputError(f"{path}: {len(missing)} nodes of the network have no coordinates, the first is {missing[0]}")
    return xy


def _layout(nodes: int, tail: list[int], head: list[int]) -> np.ndarray:
    graph = nx.Graph(zip(tail, head, strict=True))
    graph.add_nodes_from(range(nodes))
    places = nx.spring_layout(graph, seed=0)
    return np.array([places[node] for node in range(nodes)])


def _demand(path: Path, index: Mapping[int, int]) -> tuple[np.ndarray, list[str]]:
    """[pairs, 3] numbers of nodes and trips between them, and notes on those that go nowhere."""
    table, lost = list[tuple[int, int, float]](), dict[int, float]()
    for a, b, trips in _trips(path):
        if a == b or trips == 0:
            continue
        if a in index and b in index:
            table.append((index[a], index[b], trips))
        else:
            unknown = b if a in index else a
            lost[unknown] = lost.get(unknown, 0) + trips
    where = f"from or to nodes without links, the first is {min(lost)}" if lost else ""
    notes = [f"left out: {sum(lost.values()):g} trips {where}"] if lost else []
    return np.array(table, np.float64).reshape(-1, 3), notes


def _trips(path: Path) -> Iterator[tuple[int, int, float]]:
    origin = None
    for where, line in _lines(path):
        if line.startswith(("<", "~")):
            continue
        if found := re.match(r"origin\b\s*(\S*)(.*)", line, re.IGNORECASE):
            origin, line = _whole(found[1], "origin", where), found[2]
        for part in filter(None, (part.strip() for part in line.split(";"))):
            destination, colon, number = (text.strip() for text in part.partition(":"))
            if not colon or origin is None:
                raise InputError(f"{where}: expected 'destination : trips' of an origin, found '{part[:40]}'")
            trips = _number(number, "trips", where)
            if trips < 0:
                raise InputError(f"{where}: expected trips ≥ 0, found '{part[:40]}'")
            yield origin, _whole(destination, "destination", where), trips


def _table(path: Path, wanted: Mapping[str, int]) -> tuple[dict[str, tuple[str, str]], list[tuple[str, list[str]]]]:
    """Tags and what stands behind them, and the wanted columns of all rows; each with where it is."""
    tags, rows, columns = dict[str, tuple[str, str]](), list[tuple[str, list[str]]](), wanted
    for where, line in _lines(path):
        if tag := TAG.match(line):
            tags[tag[1].strip().upper()] = where, tag[2]
        elif not rows and (heading := _heading(line, wanted, where)):
            columns = heading
        elif not line.startswith("~") and (rows or re.search(r"\d", line)):
            fields = line.rstrip("; \t").split()
            if len(fields) <= max(columns.values()):
                raise InputError(f"{where}: expected at least {max(columns.values()) + 1} columns, found '{line[:60]}'")
            rows.append((where, [fields[place] for place in columns.values()]))
    return tags, rows


def _heading(line: str, wanted: Mapping[str, int], where: str) -> dict[str, int] | None:
    """Where the wanted columns are, if a line is a heading: it names the first two, and has few words besides.

    A column that is not named is where it is without a heading. Raises InputError if another one is there.
    """
    text = re.sub(r"\([^)]*\)|\[[^]]*\]|[~;,]", " ", line).replace("_", " ").lower()
    found = [(match.lastgroup or "").replace("_", " ") for match in HEADING.finditer(text)]
    if not {*list(wanted)[:2]} <= {*found} or found.count("") > len(found) / 3:
        return None
    for name, place in wanted.items():
        if name not in found and any(found[place : place + 1]):
            raise InputError(f"{where}: the heading has no column '{name}', found '{line[:80]}'")
    return {name: found.index(name) if name in found else place for name, place in wanted.items()}


def _number(text: str, what: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: expected a number as {what}, found '{text[:40]}'")
    return value


def _whole(text: str, what: str, where: str) -> int:
    """Node numbers are written as `7` and as `7.0`."""
    value = _number(text, what, where)
    if value != int(value):
        raise InputError(f"{where}: expected a whole number as {what}, found '{text[:40]}'")
    return int(value)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not empty, each with where it is."""
    with unpacked(path, MAX_FILE_BYTES) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace"), start=1):
            if line := line.strip():
                yield f"{path}, line {number}", line
