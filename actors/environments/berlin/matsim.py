"""MATSim networks and home-work-home plans (https://www.matsim.org, DTDs network_v1 and population_v4 to v6)."""

from __future__ import annotations

import gzip
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.protocol.errors import InputError

MAX_UNPACKED_BYTES = 1 << 31
"""Compressed, as these files are, anything can be a few kilobytes."""


def read_matsim(network: Path, plans: Path) -> RawNetwork:
    """Read `network.xml[.gz]`, and the first home and work of every person in the plans.

    Raises InputError, naming the file and the element, for what is not such a file.
    """
    names: dict[str, int] = {}
    xy, links, hours = [], [], 1.0
    for element in _elements(network, ("node", "link", "links")):
        if element.tag == "node":
            if _text(element, "id", network) in names:
                raise InputError(f"{network}: node '{element.get('id')}' is there twice")
            names[_text(element, "id", network)] = len(names)
            xy.append((_number(element, "x", network), _number(element, "y", network)))
        elif element.tag == "link":
            ends = [_text(element, end, network) for end in ("from", "to")]
            if unknown := [end for end in ends if end not in names]:
                raise InputError(f"{network}: link '{element.get('id')}' joins the unknown node '{unknown[0]}'")
            seconds = _number(element, "length", network) / max(_number(element, "freespeed", network), 1e-9)
            links.append((names[ends[0]], names[ends[1]], seconds / 60, _number(element, "capacity", network)))
        else:
            hours = _period_hours(element.get("capperiod", "01:00:00"), network)
    homes, works = _commuters(plans)
    table = np.array(links, np.float64).reshape(-1, 4)
    return RawNetwork(
        source=f"{network.name} and {plans.name}",
        node_names=tuple(names),
        node_xy=np.array(xy, np.float64).reshape(-1, 2),
        tail=table[:, 0].astype(int),
        head=table[:, 1].astype(int),
        minutes=table[:, 2],
        capacity=table[:, 3] / hours,
        home_xy=homes,
        work_xy=works,
        trips=np.ones(len(homes)),
        through=np.ones(len(names), bool),
    )


def _commuters(plans: Path) -> tuple[np.ndarray, np.ndarray]:
    homes: list[tuple[float, float]] = []
    works: list[tuple[float, float]] = []
    for person in _elements(plans, ("person",)):
        all_plans = person.findall("plan")
        plan = next((p for p in all_plans if p.get("selected") == "yes"), all_plans[0] if all_plans else None)
        stops = [] if plan is None else [*plan.iter("act"), *plan.iter("activity")]
        home = next((stop for stop in stops if (stop.get("type") or "").startswith("h")), None)
        work = next((stop for stop in stops if (stop.get("type") or "").startswith("w")), None)
        if home is None or work is None:
            continue
        for stop, points in ((home, homes), (work, works)):
            points.append((_number(stop, "x", plans), _number(stop, "y", plans)))
    if not homes:
        raise InputError(f"{plans}: no person has a plan with a home and a work activity")
    return np.array(homes), np.array(works)


class _Limited:
    """A file that refuses to unpack to more than can be meant."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path, self._bytes = file, path, 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._bytes += len(data)
        if self._bytes > MAX_UNPACKED_BYTES:
            raise InputError(f"{self._path}: unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return data


def _elements(path: Path, tags: tuple[str, ...]) -> Iterator[Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            root = None
            for event, element in ElementTree.iterparse(_Limited(file, path), events=("start", "end")):
                root = element if root is None else root
                if event == "start" and element.tag == "links" and "links" in tags:
                    yield element
                elif event == "end" and element.tag in tags and element.tag != "links":
                    yield element
                    if element.tag == "person":
                        root.clear()
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: expected a MATSim XML file: {error}") from error


def _text(element: Any, key: str, path: Path) -> str:
    value = element.get(key)
    if value is None:
        raise InputError(f"{path}: {element.tag} '{element.get('id', '?')}' has no '{key}'")
    return str(value)


def _number(element: Any, key: str, path: Path) -> float:
    value = _text(element, key, path)
    try:
        return float(value)
    except ValueError as error:
        name = f"{element.tag} '{element.get('id', '?')}'"
        raise InputError(f"{path}: {name}: {key} must be a number, got '{value}'") from error


def _period_hours(text: str, path: Path) -> float:
    try:
        hours, minutes, seconds = (float(part) for part in (*text.split(":"), "0", "0")[:3])
    except ValueError as error:
        raise InputError(f"{path}: capperiod must be HH:MM:SS, got '{text}'") from error
    total = hours + minutes / 60 + seconds / 3600
    if not total > 0:
        raise InputError(f"{path}: capperiod must be above 0, got '{text}'")
    return total
