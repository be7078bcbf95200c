"""What happened to a run: on a time line, and as a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from bm3il.launch.processes.states import TROUBLES
from bm3il.launch.reports.charts import Moment, Timeline, clock, timeline
from bm3il.launch.reports.recorded import Happened
from bm3il.launch.status import ROUTINE

MOST_LANES, MOST_EVENTS = 20, 500
FAULTS, MENDED, CROWD = ("restart", "rewind", "node_lost", "without"), ("back", "restored"), ("joined", "left")


@dataclass(frozen=True)
class Entry:
    """An event in a list: when in UTC, how long after the first one, how it is marked."""

    time: str
    after: str
    kind: str
    event: Happened


def timelines(events: Sequence[Happened]) -> dict[str, Timeline]:
    """Of the processes to which something happened that is no routine, else of all."""
    moments = list(_moments(events))
    lanes = sorted({m.lane for m in moments if m.kind != "progress"} or {m.lane for m in moments}, key=_rank)
    shown = lanes[:MOST_LANES]
    return {name: timeline(moments, shown, name == "wide") for name in ("wide", "narrow")} if shown else {}


def _rank(process: str) -> tuple[int, str, int]:
    role, _, index = process.rpartition("-")
    order = ("supervisor", "learner", "reward-server", "evaluator")
    return (
        order.index(role) if role in order else len(order),
        role,
        # The name comes from a file: Python refuses to convert thousands of digits.
        int(index) if index.isascii() and index.isdigit() and len(index) < 10 else 0,
    )


def _moments(events: Sequence[Happened]) -> Iterator[Moment]:
    """Points, and a span from a state of trouble to the next state of that process."""
    begin, end = (events[0].at, events[-1].at) if events else (0.0, 0.0)
    for position, event in enumerate(events):
        x = event.at - begin
        state = event.facts.get("state")
        if event.what == "state" and state in TROUBLES:
            later = (e.at for e in events[position + 1 :] if e.what == "state" and e.process == event.process)
            yield Moment(event.process, x, "trouble", event.text, next(later, end) - begin)
        else:
            yield Moment(event.process, x, kind_of(event), f"{event.what}: {event.text}")


def kind_of(event: Happened) -> str:
    """How the page marks an event: `fault`, `trouble`, `mended`, `crowd`, `progress` or `life`."""
    if event.what in FAULTS or (event.what == "end" and event.facts.get("status") == "failed"):
        return "fault"
    if event.what == "state":
        return "trouble" if event.facts.get("state") in TROUBLES else "mended"
    kinds = {"mended": MENDED, "crowd": CROWD, "progress": ROUTINE}
    return next((kind for kind, names in kinds.items() if event.what in names), "life")


def listed(events: Sequence[Happened]) -> list[Entry]:
    """The last events that are no routine, in the order of time."""
    notable = [event for event in events if event.what not in ROUTINE][-MOST_EVENTS:]
    return [
        Entry(
            datetime.fromtimestamp(event.at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
            clock(event.at - events[0].at),
            kind_of(event),
            event,
        )
        for event in notable
    ]
