"""MATSim networks and home-work-home plans (https://www.matsim.org, DTDs network_v1 and v2, population_v4 to v6)."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.actors.environments.berlin.packed import unpacked
from bm3il.actors.environments.berlin.raw_network import RawNetwork, left_out
from bm3il.protocol.errors import InputError

CAR = "car"
HOME, WORK = ("home", "h"), ("work", "w")
"""Activity types that mean home and work, unless others are named."""
LISTED_TYPES = 12
XY = tuple[float, float]


def read_matsim(
    network: Path, plans: Path, facilities: Path | None, home: Sequence[str] = HOME, work: Sequence[str] = WORK
) -> RawNetwork:
    """Read the roads for cars, and the first home and work of every person's selected plan.

    facilities: says where activities are that name a facility and no place.   home, work: activity types. A type is
    meant if it begins with the words of one of them: `home` means `home_86400`, and not `homeless_shelter`.
    Raises InputError, naming the file and the element, for what is not such a file.
    """
    roads = _read_roads(network)
    homes, works, notes = _commuters(plans, home, work)
    ends = _places([*homes, *works], roads, facilities)
    joined = {end for link in roads.links for end in link[:2]}
    names = [name for name in roads.nodes if name in joined]
    index = {name: number for number, name in enumerate(names)}
    table = np.array([(index[a], index[b], minutes, capacity) for a, b, minutes, capacity in roads.links], np.float64)
    return RawNetwork(
        source=f"{network.name} and {plans.name}",
        node_names=tuple(names),
        node_xy=np.array([roads.nodes[name] for name in names]),
        tail=table[:, 0].astype(int),
        head=table[:, 1].astype(int),
        minutes=table[:, 2],
        capacity=table[:, 3] / roads.hours,
        home_xy=ends[: len(homes)],
        work_xy=ends[len(homes) :],
        trips=np.ones(len(homes)),
        through=np.ones(len(names), bool),
        notes=(*roads.notes, *notes),
    )


@dataclass(frozen=True)
class _Roads:
    """nodes: where they are.   links: the nodes, minutes and capacity of those that a car can take.

    middles: of all links, by name.   hours: that capacities are for.   notes: what was left out.
    """

    nodes: dict[str, XY]
    links: list[tuple[str, str, float, float]]
    middles: dict[str, XY]
    hours: float
    notes: tuple[str, ...]


def _read_roads(path: Path) -> _Roads:
    nodes, middles, hours = dict[str, XY](), dict[str, XY](), 1.0
    links, closed = list[tuple[str, str, float, float]](), Counter[str]()
    for element in _elements(path, ("node", "link", "links")):
        what = f"{path}: {element.tag} '{element.get('id', '?')}'"
        if element.tag == "node":
            name = _text(element.attrib, "id", what)
            if name in nodes:
                raise InputError(f"{what} is there twice")
            nodes[name] = (_number(element.attrib, "x", what), _number(element.attrib, "y", what))
        elif element.tag == "link":
            a, b = (_text(element.attrib, end, what) for end in ("from", "to"))
            if unknown := [end for end in (a, b) if end not in nodes]:
                raise InputError(f"{what} joins the unknown node '{unknown[0]}'")
            middles[element.get("id", "?")] = (nodes[a][0] + nodes[b][0]) / 2, (nodes[a][1] + nodes[b][1]) / 2
            road = _road(element.attrib, what)
            if isinstance(road, str):
                closed[road] += 1
                continue
            # Of roads alone: where no car goes, nobody needs to know the place.
            if lost := [end for end in (a, b) if not all(map(math.isfinite, nodes[end]))]:
                raise InputError(f"{path}: node '{lost[0]}' needs x and y that are finite, got {nodes[lost[0]]}")
            links.append((a, b, *road))
        else:
            hours = _period_hours(element.get("capperiod", "01:00:00"), path)
    if not links:
        raise InputError(f"{path}: there is no link for cars{''.join(f'; {note}' for note in left_out(closed))}")
    return _Roads(nodes, links, middles, hours, left_out(closed))


def _road(link: Mapping[str, str], what: str) -> tuple[float, float] | str:
    """Minutes and capacity, or why no car can take it."""
    modes = sorted({mode.strip().lower() for mode in link.get("modes", CAR).split(",")})
    if CAR not in modes:
        return f"for {' and '.join(modes)}"
    length, speed, capacity = (_number(link, key, what) for key in ("length", "freespeed", "capacity"))
    if not all(0 <= value < math.inf for value in (length, speed, capacity)):
        raise InputError(f"{what}: expected a length, freespeed and capacity ≥ 0, got {length}, {speed}, {capacity}")
    return (length / speed / 60, capacity) if speed and capacity else "of freespeed or capacity 0"


@dataclass(frozen=True)
class _Stop:
    """An activity. what: file, person and kind, for errors.   told: where it is said to be."""

    what: str
    told: Mapping[str, str]


def _commuters(plans: Path, home: Sequence[str], work: Sequence[str]) -> tuple[list[_Stop], list[_Stop], list[str]]:
    """Homes, works, and notes on who was left out."""
    homes, works = list[_Stop](), list[_Stop]()
    wanted = {"home": [_words(name) for name in home], "work": [_words(name) for name in work]}
    people, types = 0, Counter[str]()
    for person in _elements(plans, ("person",)):
        people += 1
        all_plans = person.findall("plan")
        plan = next((p for p in all_plans if p.get("selected") == "yes"), all_plans[0] if all_plans else None)
        stops = [] if plan is None else [*plan.iter("act"), *plan.iter("activity")]
        types.update(stop.get("type", "") for stop in stops)
        found = {}
        for kind, names in wanted.items():
            if (first := next((stop for stop in stops if _means(stop.get("type", ""), names)), None)) is not None:
                found[kind] = _Stop(f"{plans}: person '{person.get('id', '?')}': {kind}", first.attrib)
        if len(found) == len(wanted):
            homes.append(found["home"])
            works.append(found["work"])
    if not homes:
        listed = ", ".join(f"{name} ({count})" for name, count in types.most_common(LISTED_TYPES))
        raise InputError(
            f"{plans}: nobody has a plan with a home ({', '.join(home)}) and a work ({', '.join(work)}) activity; "
            f"found: {listed or 'no activity'}; name the types with --home and --work"
        )
    without = people - len(homes)
    return homes, works, [f"left out: {without} of {people} people, without a home or a work"] if without else []


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", text.casefold())


def _means(activity_type: str, names: list[list[str]]) -> bool:
    words = _words(activity_type)
    return any(name and words[: len(name)] == name for name in names)


def _places(stops: list[_Stop], roads: _Roads, facilities: Path | None) -> np.ndarray:
    """[stops, 2]: their own x and y, or those of their facility, or the middle of their link."""
    wanted = {stop.told["facility"] for stop in stops if "x" not in stop.told and "facility" in stop.told}
    known = _facility_places(facilities, wanted, roads) if facilities and wanted else {}
    xy = np.empty((len(stops), 2))
    for row, stop in enumerate(stops):
        place: XY | None
        if "x" in stop.told or "y" in stop.told:
            place = _number(stop.told, "x", stop.what), _number(stop.told, "y", stop.what)
        else:
            place = known.get(stop.told.get("facility", "")) or roads.middles.get(stop.told.get("link", ""))
        if place is None or not all(map(math.isfinite, place)):
            told = ", ".join(f"{key}='{stop.told[key]}'" for key in ("x", "y", "facility", "link") if key in stop.told)
            raise InputError(
                f"{stop.what}: expected x and y, or a facility (of a facilities.xml in the folder) or a link that is "
                f"known, got {told or 'none of them'}"
            )
        xy[row] = place
    return xy


def _facility_places(path: Path, wanted: set[str], roads: _Roads) -> dict[str, XY]:
    places = {}
    for element in _elements(path, ("facility",)):
        name, link = element.get("id", ""), element.get("linkId", "")
        if name in wanted and "x" in element.attrib:
            what = f"{path}: facility '{name}'"
            places[name] = _number(element.attrib, "x", what), _number(element.attrib, "y", what)
        elif name in wanted and link in roads.middles:
            places[name] = roads.middles[link]
    return places


def _elements(path: Path, tags: tuple[str, ...]) -> Iterator[Any]:
    with unpacked(path) as file:
        try:
            root = None
            for event, element in ElementTree.iterparse(file, events=("start", "end")):
                root = element if root is None else root
                if event == "start" and element.tag == "links" and "links" in tags:
                    yield element
                elif event == "end" and element.tag in tags and element.tag != "links":
                    yield element
                    if element.tag in ("person", "facility"):
                        # What was read would stay below the root, and so in memory, until the end of the file.
                        root.clear()
        except ElementTree.ParseError as error:
            raise InputError(f"{path}: expected a MATSim XML file: {error}") from error


def _text(attributes: Mapping[str, str], key: str, what: str) -> str:
    if key not in attributes:
        raise InputError(f"{what} has no '{key}'")
    return attributes[key]


def _number(attributes: Mapping[str, str], key: str, what: str) -> float:
    value = _text(attributes, key, what)
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"{what}: {key} must be a number, got '{value}'") from error


def _period_hours(text: str, path: Path) -> float:
    try:
        hours, minutes, seconds = (float(part) for part in (*text.split(":"), "0", "0")[:3])
    except ValueError as error:
        raise InputError(f"{path}: capperiod must be HH:MM:SS, got '{text}'") from error
    total = hours + minutes / 60 + seconds / 3600
    if not total > 0:
        raise InputError(f"{path}: capperiod must be above 0, got '{text}'")
    return total
