"""`events.jsonl`: what happened to a run, and when, one JSON object a line; written by one process, read by anybody."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bm3il.launch.cli import COMMAND
from bm3il.launch.config import Config
from bm3il.launch.outcome import Outcome
from bm3il.protocol.messages import Event
from bm3il.protocol.telemetry import EVENT_TEXT
from bm3il.protocol.version import version

log = logging.getLogger(__name__)

EVENTS = "events.jsonl"
NAME = 64
"""Characters of a process's name, and of what happened to it."""
TAIL_BYTES = 1 << 16
SAID = ("restored", "rewind")
"""Events that are said to whoever looks on, too: what is on the screen is done again."""


class EventLog:
    """Appends to the file of a run. A disk that takes no more costs events, and is logged once; nothing is raised.

    say: is told what people shall see of the events of others.
    """

    def __init__(self, folder: Path, process: str, say: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._process, self._say = folder / EVENTS, process, say
        self._start, self._warned = time.time(), False
        _end_last_line(self._path)

    def add(self, what: str, text: str, process: str = "", **facts: Any) -> None:
        """Of this process or another one, now; `facts` are for programs."""
        self._write(time.time(), what, process or self._process, text, facts)

    def take(self, events: Iterable[Event]) -> None:
        """What processes have told."""
        for event in events:
            process, text = event.process[:NAME], event.text[:EVENT_TEXT]
            self._write(event.at, event.what[:NAME], process, text, {})
            if event.what in SAID:
                self._say(f"{process} {text}")

    def start(self, config: Config, resumed: bool) -> None:
        """A launcher has begun."""
        how = "resumed" if resumed else "started"
        text = f"bm3il {version()} {how}: {config.algorithm} on {config.environment}, seed {config.seed}, {config.mode}"
        # The arguments of this process need not be what somebody typed: the first of several nodes has others.
        self.add("start", text, version=version(), command=os.environ.get(COMMAND, shlex.join(sys.argv)))

    def end(self, outcome: Outcome) -> None:
        """It ends."""
        text = f"{outcome.status}: {outcome.text}" if outcome.text else outcome.status
        self.add("end", text, status=outcome.status, exit_code=outcome.code)

    def _write(self, at: float, what: str, process: str, text: str, facts: dict[str, Any]) -> None:
        now = time.time()
        when = datetime.fromtimestamp(at if 0 <= at <= now else now, timezone.utc)  # what was told has happened
        line = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "seconds": round(when.timestamp() - self._start, 3),
            "event": what,
            "process": process,
            "text": text,
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | facts) + "\n")
        except OSError as error:
            if not self._warned:
                log.warning("cannot write %s: %s; events are lost", self._path, error.strerror)
            self._warned = True


def read_events(folder: Path, last: int) -> list[dict[str, Any]]:
    """The last events of a run whose lines were written whole; [] if there are none."""
    try:
        with (folder / EVENTS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"time", "event", "process", "text"} <= event.keys():
            events.append(event)
    return events[-last:]


def _end_last_line(path: Path) -> None:
    """A launcher that was killed while it wrote shall not spoil the first line of the next."""
    try:
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")
    except OSError:  # it is not there yet, or will be found not writable
        pass
