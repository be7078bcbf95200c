"""What the files of a run say of it, for a page. They are claims: what cannot be understood is left out and counted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bm3il.launch.reports.charts import number
from bm3il.launch.result import curve_rows

CLOCK, SECONDS_OF = ("iteration", "env_steps", "wall_seconds"), "seconds_"
"""Of a line of the log, beside the figures; and what the names of the times of its stages begin with."""


@dataclass(frozen=True)
class Columns:
    """Numbers by name, a row for each evaluation or iteration; None where there is none.

    damaged: how many rows could not be read.
    """

    rows: Sequence[Mapping[str, float | None]]
    damaged: int

    @property
    def names(self) -> list[str]:
        """Of the columns that have a number somewhere, in the order in which they come."""
        found = {name: None for row in self.rows for name, value in row.items() if value is not None}
        return list(found)

    def __getitem__(self, name: str) -> list[float | None]:
        return [row.get(name) for row in self.rows]

    def all_of(self, name: str) -> list[float]:
        """With 0 where there is none."""
        return [value or 0.0 for value in self[name]]


@dataclass(frozen=True)
class Happened:
    """A line of `events.jsonl`; `at` in seconds since the epoch."""

    at: float
    what: str
    process: str
    text: str
    facts: Mapping[str, Any]


def read_curve(folder: Path) -> Columns:
    """The evaluations of a run, in the order of their iterations."""
    return _columns([dict(row) for row in curve_rows(folder)], ("iteration", "return_mean"), 0)


def read_log(folder: Path) -> Columns:
    """The iterations of a run."""
    lines, damaged = _objects(folder / "log.jsonl")
    return _columns(lines, ("iteration",), damaged)


def read_all_events(folder: Path) -> tuple[list[Happened], int]:
    """What happened to a run, in the order of time, and how many lines cannot be read."""
    lines, damaged = _objects(folder / "events.jsonl")
    found = list(_happened(lines))
    return sorted(found, key=lambda event: event.at), damaged + len(lines) - len(found)


def _happened(lines: Sequence[Mapping[str, Any]]) -> Iterator[Happened]:
    for line in lines:
        with contextlib.suppress(KeyError, ValueError, AttributeError, OverflowError, OSError):
            at = datetime.fromisoformat(line["time"].replace("Z", "+00:00")).timestamp()
            yield Happened(at, str(line["event"]), str(line["process"]), str(line["text"]), line)


def _columns(rows: Sequence[Mapping[str, Any]], needed: Sequence[str], damaged: int) -> Columns:
    read = [{str(name): number(value) for name, value in row.items()} for row in rows]
    whole = [row for row in read if all(row.get(name) is not None for name in needed)]
    whole.sort(key=lambda row: row["iteration"] or 0.0)
    return Columns(whole, damaged + len(read) - len(whole))


def _objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one a line, and how many lines are none. The last one may just be written."""
    try:
        texts = path.read_bytes().rpartition(b"\n")[0].splitlines()
    except OSError:
        return [], 0
    found = []
    for text in texts:
        # Lists that are nested a thousand deep end in a RecursionError.
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(line := json.loads(text), dict):
                found.append(line)
    return found, len(texts) - len(found)
