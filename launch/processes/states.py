"""What a process is doing, judged from its heartbeat: the one rule for the live view, `bm3il status` and Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from bm3il.protocol.messages import Status
from bm3il.protocol.telemetry import IDLE, WAIT

SILENT_SECONDS = 10.0
"""Ten heartbeats: fewer could be a busy machine. A wait as long is named, too."""
STUCK_SECONDS = 60.0
NAMES = ("starting", "alive", "idle", "starved", "stuck", "dead")
TROUBLES = NAMES[3:]


@dataclass(frozen=True)
class State:
    """One of NAMES, and of a trouble what is the matter, to be read after the process's name, and for how long it has
    been so."""

    name: str
    why: str = ""
    seconds: float = 0.0

    @property
    def troubled(self) -> bool:
        """Whether somebody should hear of it."""
        return self.name in TROUBLES


def judge(status: Status | None, silent_seconds: float, patience_seconds: float = SILENT_SECONDS) -> State:
    """`dead` is not heard; `starved` waits for others, for longer than `patience_seconds`; `stuck` does not get on with
    its own work; `starting` was not heard yet; `idle` has done all that it was asked for; all others are `alive`.

    silent_seconds: since the status came; if there is none, since the start of the run.
    """
    if status is None and silent_seconds > STUCK_SECONDS:
        return State("dead", f"has never been heard, for {silent_seconds:.0f} s since the start", silent_seconds)
    if status is None:
        return State("starting")
    if silent_seconds > SILENT_SECONDS:
        return State(
            "dead", f"has not been heard for {silent_seconds:.0f} s; it was in '{status.stage}'", silent_seconds
        )
    inside = status.values.get("stage_seconds", 0.0)
    if status.stage == IDLE:
        return State("idle" if inside > SILENT_SECONDS else "alive")
    if status.stage.startswith(WAIT):
        if inside > max(SILENT_SECONDS, patience_seconds):
            return State("starved", f"has been in '{status.stage}' for {inside:.0f} s: it waits for others", inside)
    # A supervisor has no stages: it stays in the first one for ever.
    elif inside > STUCK_SECONDS and status.role != "supervisor":
        return State("stuck", f"has been in '{status.stage}' for {inside:.0f} s", inside)
    return State("alive")
