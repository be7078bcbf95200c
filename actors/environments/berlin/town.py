"""A small town as two tables, in the form of the SynthTown that the paper's first author published.

    locations.csv     index,name,kind,roadload_vehicles,free_flow_minutes     kind: facility or road
    transitions.csv   from_index,to_index,kind                                kind: stay or move

The first facility is the home of everybody, the second their work. There are no coordinates: junctions are what the
moves tell of them, and are drawn in columns by how many roads away from home they are.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, shortest_path

from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.protocol.errors import InputError

LOCATIONS, TRANSITIONS = "locations.csv", "transitions.csv"
DAY_MINUTES = 1440
WORK_HOURS = (9 * 60.0, 17 * 60.0)
REWARDS = (1.0, -1.0)


def read_town(folder: Path, flow_scale: float = 1.0) -> Scenario:
    """The scenario of a folder with the two tables: a day of minutes, each agent one vehicle.

    Locations keep their order among roads and among facilities; see `town_order`. Raises InputError, naming the row.
    """
    rows = _read(folder / LOCATIONS, ("index", "name", "kind", "roadload_vehicles", "free_flow_minutes"))
    order, roads = town_order(folder)
    if len(order) - roads < 2:
        raise InputError(f"{LOCATIONS}: expected a home and a work facility, found {len(order) - roads} facilities")
    place = {old: new for new, old in enumerate(order)}
    moves = [(place[a], place[b]) for a, b in _moves(folder, place)]
    tail, head = _junctions(len(order), roads, moves)
    facilities = len(order) - roads
    values = [[_number(rows[i], key, i) for i in order[:roads]] for key in ("free_flow_minutes", "roadload_vehicles")]
    xy = _columns(tail, head, roads)
    return Scenario(
        name=folder.name,
        source=f"tables {LOCATIONS} and {TRANSITIONS} in {folder.name}",
        step_minutes=1.0,
        steps=DAY_MINUTES,
        day_start_minute=0.0,
        work_start_minute=WORK_HOURS[0],
        work_end_minute=WORK_HOURS[1],
        vehicles_per_agent=1.0,
        flow_scale=flow_scale,
        right_reward=REWARDS[0],
        wrong_reward=REWARDS[1],
        junction_names=tuple(f"junction {j}" for j in range(len(xy))),
        junction_xy=xy,
        tail=tail[:roads],
        head=head[:roads],
        free_flow_minutes=np.array(values[0]),
        load_vehicles=np.array(values[1]),
        kinds=("home", *("work" for _ in range(facilities - 1))),
        facility_names=tuple(rows[i]["name"] for i in order[roads:]),
        facility_junction=tail[roads:],
        facility_xy=xy[tail[roads:]] + [0.0, 0.4],
        transitions=np.array(moves, np.int64).reshape(-1, 2),
        demand=np.array([[0.0, 1.0, 1.0]]),
    )


def town_order(folder: Path) -> tuple[list[int], int]:
    """The table's numbers of all locations in the order of the scenario, roads first, and how many are roads."""
    rows = _read(folder / LOCATIONS, ("index", "name", "kind"))
    for number, row in enumerate(rows):
        if row["index"] != str(number) or row["kind"] not in ("road", "facility"):
            raise InputError(f"{LOCATIONS}, row {number}: expected index {number} of a road or a facility, got {row}")
    roads = [i for i, row in enumerate(rows) if row["kind"] == "road"]
    return roads + [i for i, row in enumerate(rows) if row["kind"] == "facility"], len(roads)


def _moves(folder: Path, place: dict[int, int]) -> list[tuple[int, int]]:
    moves = []
    for number, row in enumerate(_read(folder / TRANSITIONS, ("from_index", "to_index", "kind"))):
        try:
            ends = int(row["from_index"]), int(row["to_index"])
        except ValueError:
            ends = -1, -1
        if not all(end in place for end in ends):
            raise InputError(f"{TRANSITIONS}, row {number}: expected two of 0..{len(place) - 1}, got {row}")
        if row["kind"] == "move":
            moves.append(ends)
    return moves


def _junctions(locations: int, roads: int, moves: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Entry and exit junction of each location: a move's end and beginning are one; of a facility both are."""
    same = [(a + locations, b) for a, b in moves] + [(f, f + locations) for f in range(roads, locations)]
    graph = coo_array((np.ones(len(same)), np.array(same).T), shape=(2 * locations,) * 2)
    label = connected_components(graph, directed=False)[1]
    return label[:locations], label[locations:]


def _columns(tail: np.ndarray, head: np.ndarray, roads: int) -> np.ndarray:
    """[J, 2] places for junctions without coordinates: columns by roads from the first facility."""
    size = int(max(tail.max(), head.max())) + 1
    graph = coo_array((np.ones(roads), (tail[:roads], head[:roads])), shape=(size, size)).tocsr()
    distance = shortest_path(graph, unweighted=True, indices=tail[roads])
    x = np.where(np.isfinite(distance), distance, -1.0)
    y = np.zeros(size)
    for column in np.unique(x):
        members = np.flatnonzero(x == column)
        y[members] = np.arange(len(members)) - (len(members) - 1) / 2
    return np.stack([x, y], axis=1)


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        # Spreadsheets write a byte-order mark, which would be part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise InputError(f"{path}: expected a table with the columns {', '.join(columns)}")
    return rows


def _number(row: dict[str, str], key: str, number: int) -> float:
    try:
        value = float(row[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{LOCATIONS}, row {number}: {key} must be a number, got '{row[key]}'")
    return value
