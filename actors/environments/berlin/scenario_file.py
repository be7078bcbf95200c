"""Scenarios as files: JSON, tables as columns.

{"format": "bm3il-scenario", "version": 1, "name": …, "source": …, "step_minutes": …, …,
 "junctions": {"name": […], "x": […], "y": […]},
 "roads": {"tail": […], "head": […], "free_flow_minutes": […], "load_vehicles": […]},
 "facilities": {"kind": ["home" | "work", …], "name": […], "junction": […], "x": […], "y": […]},
 "transitions": {"from": […], "to": […]},
 "demand": {"home": […], "work": […], "trips": […]}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.protocol.errors import InputError, unknown_name

FORMAT, VERSION = "bm3il-scenario", 1
MAX_FILE_BYTES = 1 << 26
SUFFIX = ".json"
TEXTS = ("name", "source")
NUMBERS = (
    *("step_minutes", "steps", "day_start_minute", "work_start_minute", "work_end_minute"),
    *("vehicles_per_agent", "flow_scale", "right_reward", "wrong_reward"),
)


def shipped_scenarios() -> list[str]:
    """The names of the scenarios that come with the package."""
    folder = resources.files(__package__).joinpath("scenarios")
    return sorted(file.name.removesuffix(SUFFIX) for file in folder.iterdir() if file.name.endswith(SUFFIX))


def load_scenario(name_or_path: str) -> Scenario:
    """A scenario that comes with the package, or a file of one. Raises InputError, naming the file."""
    if not name_or_path.endswith(SUFFIX):
        if name_or_path not in shipped_scenarios():
            raise unknown_name("scenario", name_or_path, shipped_scenarios())
        folder = resources.files(__package__).joinpath("scenarios")
        return parse_scenario(folder.joinpath(name_or_path + SUFFIX).read_text(encoding="utf-8"))
    path = Path(name_or_path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"it is larger than {MAX_FILE_BYTES} bytes")
        return parse_scenario(path.read_text(encoding="utf-8"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the scenario {path}: {error}; `bm3il scenario import` makes one") from error


def format_scenario(scenario: Scenario) -> str:
    """The text of a scenario file, a table or number on each line."""
    value: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    value |= {key: getattr(scenario, key) for key in (*TEXTS, *NUMBERS)}
    facilities = {"junction": scenario.facility_junction, **_points(scenario.facility_xy)}
    roads = ("tail", "head", "free_flow_minutes", "load_vehicles")
    home, work, trips = scenario.demand.T
    tables: dict[str, dict[str, Any]] = {
        "junctions": {"name": scenario.junction_names, **_points(scenario.junction_xy)},
        "roads": {name: getattr(scenario, name) for name in roads},
        "facilities": {"kind": scenario.kinds, "name": scenario.facility_names, **facilities},
        "transitions": dict(zip(("from", "to"), scenario.transitions.T, strict=True)),
        "demand": {"home": home.astype(int), "work": work.astype(int), "trips": trips},
    }
    value |= {name: {key: np.asarray(c).tolist() for key, c in table.items()} for name, table in tables.items()}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(part)}" for key, part in value.items()) + "\n}\n"


def parse_scenario(text: str) -> Scenario:
    """The inverse of `format_scenario`, for untrusted text. Raises InputError."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"expected JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f'expected a scenario, an object with "format": "{FORMAT}"')
    if value.get("version") != VERSION:
        raise InputError(f"expected version {VERSION} of the format, found {value.get('version')!r}")
    plain: dict[str, Any] = {key: _single(value, key, str) for key in TEXTS}
    plain |= {key: _single(value, key, int if key == "steps" else float) for key in NUMBERS}
    junctions, roads, facilities, transitions, demand = (
        _Table(value, name) for name in ("junctions", "roads", "facilities", "transitions", "demand")
    )
    return Scenario(
        **plain,
        junction_names=junctions.texts("name"),
        junction_xy=junctions.matrix("x", "y"),
        tail=roads.integers("tail"),
        head=roads.integers("head"),
        free_flow_minutes=roads.numbers("free_flow_minutes"),
        load_vehicles=roads.numbers("load_vehicles"),
        kinds=facilities.texts("kind"),
        facility_names=facilities.texts("name"),
        facility_junction=facilities.integers("junction"),
        facility_xy=facilities.matrix("x", "y"),
        transitions=np.stack([transitions.integers("from"), transitions.integers("to")], axis=1),
        demand=demand.matrix("home", "work", "trips"),
    )


class _Table:
    """A table of an untrusted file: columns of one length."""

    def __init__(self, value: Mapping[str, Any], name: str) -> None:
        self._name, self._columns = name, value.get(name)
        if not isinstance(self._columns, dict):
            raise InputError(f"the table '{name}' is missing")
        lengths = {len(c) if isinstance(c, list) else -1 for c in self._columns.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise InputError(f"table '{name}': expected columns of one length")

    def texts(self, column: str) -> tuple[str, ...]:
        return tuple(self._values(column, str, "text"))

    def integers(self, column: str) -> np.ndarray:
        values = self._values(column, int, "an integer")
        # JSON's integers have no limit, int64 has.
        if any(abs(value) > 1 << 62 for value in values):
            raise InputError(f"table '{self._name}', column '{column}': a number is too large")
        return np.array(values, np.int64)

    def numbers(self, column: str) -> np.ndarray:
        try:
            return np.array(self._values(column, (int, float), "a number"), np.float64)
        except OverflowError as error:
            raise InputError(f"table '{self._name}', column '{column}': a number is too large") from error

    def matrix(self, *columns: str) -> np.ndarray:
        return np.stack([self.numbers(column) for column in columns], axis=1)

    def _values(self, column: str, kind: type | tuple[type, ...], what: str) -> list[Any]:
        assert isinstance(self._columns, dict)
        if column not in self._columns:
            raise InputError(f"table '{self._name}': the column '{column}' is missing")
        for row, value in enumerate(self._columns[column]):
            # To Python JSON's `true` is an integer.
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"table '{self._name}', column '{column}', row {row}: expected {what}, got {value!r}")
        return self._columns[column]


def _single(value: Mapping[str, Any], key: str, kind: type) -> Any:
    found = value.get(key)
    kinds = (int, float) if kind is float else kind
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise InputError(f"'{key}' must be {kind.__name__}, got {found!r}")
    return found


def _points(xy: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": xy[:, 0], "y": xy[:, 1]}
