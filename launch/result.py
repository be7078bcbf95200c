"""How a run ended, and how far it came: `result.json`, and the events, log and curve beside it."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import shlex
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bm3il.launch.config import Config
from bm3il.launch.locks import is_running
from bm3il.launch.outcome import CRASHED, FINISHED, INTERRUPTED, Outcome
from bm3il.launch.provenance import provenance
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

log = logging.getLogger(__name__)

TAIL_BYTES = 1 << 20
"""Of a log, in which its last line lies."""
SECOND = len("2026-11-27T14:57:41")


@dataclass(frozen=True)
class Start:
    """One start of a run, which may be one of several: a resume is another. time: seconds since the epoch."""

    run_id: str
    time: float


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json`; of a run that failed and could not write it, what its last event tells; else {}."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _failure(folder)
    return result if isinstance(result, dict) else {}


def present_result(folder: Path, config: Config) -> dict[str, Any]:
    """`read_result` of the run as it stands, else {}: it may be running again, or have been killed since it ended."""
    if is_running(folder):
        return {}
    result = read_result(folder)
    if result.get("status") == "finished":  # it stays whatever came later, unless it shall play more steps
        return result if result.get("steps", config.steps) == config.steps else _failure(folder)
    lines = _lines(folder / "events.jsonl")
    starts = [line for line in lines if line.get("event") == "start"] or lines[:1]
    # To the second, as results tell it.
    began = [str(line.get("time", ""))[:SECOND] for line in starts[-1:]]
    return _failure(folder) if [str(result.get("ended", ""))[:SECOND]] < began else result


def _failure(folder: Path) -> dict[str, Any]:
    """How a run has failed by its last event; {} if that is another one."""
    last: dict[str, Any] = next(reversed(_lines(folder / "events.jsonl")), {})
    if last.get("event") != "end" or last.get("status") != "failed":
        return {}
    far, outcome = reached(folder), Outcome(CRASHED, str(last.get("text", "")).removeprefix("failed: "))
    return far | _ending(folder, outcome, far.get("iterations", 0)) | {"exit_code": last.get("exit_code", CRASHED)}


def concluded(folder: Path, run_id: str) -> dict[str, Any]:
    """`result.json` if this start of the run has written it to its end, else {}."""
    result = read_result(folder)
    return result if "exit_code" in result and result.get("run_id") == run_id else {}


def conclude(
    folder: Path, config: Config, outcome: Outcome, start: Start, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `result.json`: what the learner of this start told in it, if it had the time to, and how the run ended.

    before: what it held at the start. A finished run's result stays if nothing was played since.   Returns the result
    of this start, also if the disk does not take it.
    """
    facts: dict[str, Any] = {
        "environment": config.environment,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "mode": config.mode,
        "nodes": config.nodes,
        "actors": config.actors,
        "steps": config.steps,
    }
    told, far = read_result(folder), reached(folder)
    if told.get("run_id") != start.run_id:
        told = {}
    if outcome.code != FINISHED:  # it tells the return of its last evaluation, as one does whose learner was killed
        told = {key: value for key, value in told.items() if value is not None or key not in far}
    # In this order: what the learner itself told counts more than what its log and its curve end with.
    result = facts | far | told
    result |= {"run_id": start.run_id, "started": _utc(start.time), "ended": _utc(time.time()), **provenance()}
    for key in ("error", "resume"):  # of a first node that has concluded before
        result.pop(key, None)
    result |= _ending(folder, outcome, result.get("iterations", 0))
    stays = (
        before is not None
        and before.get("status") == "finished" != result["status"]
        and result.get("iterations", 0) <= before.get("iterations", 0)
    )
    try:
        write_atomically(folder / "result.json", json.dumps(before if stays else result, indent=1) + "\n")
    except InputError as error:
        log.warning("%s; its events tell how the run ended", error)
        if not stays:  # what is there is of an earlier start
            with contextlib.suppress(OSError):
                (folder / "result.json").unlink(missing_ok=True)
    return result


def _ending(folder: Path, outcome: Outcome, iterations: int) -> dict[str, Any]:
    """How a run ended that had come so far, and the command that goes on."""
    told: dict[str, Any] = {"status": outcome.status, "exit_code": outcome.code}
    if outcome.code != FINISHED and outcome.text:
        told["error"] = outcome.text
    if outcome.code == INTERRUPTED or (outcome.code != FINISHED and iterations):
        told["resume"] = f"bm3il resume {shlex.quote(str(folder))}"
    return told


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def reached(folder: Path) -> dict[str, Any]:
    """How far a run had come whose learner could not say so any more: what its log and its curve end with."""
    found: dict[str, Any] = {}
    with contextlib.suppress(LookupError):
        last = last_logged(folder)
        found = {"iterations": last["iteration"], **{name: last[name] for name in ("env_steps", "wall_seconds")}}
    with contextlib.suppress(LookupError, ValueError, TypeError):
        row = curve_rows(folder)[-1]
        found |= {name: float(row[name]) for name in ("return_mean", "return_stderr", "normalized_return") if row[name]}
    return found


def last_logged(folder: Path) -> dict[str, Any]:
    """The figures of the last iteration in `log.jsonl` whose line was written whole, or {}."""
    return next(reversed(logged(folder)), {})


def logged(folder: Path) -> list[dict[str, Any]]:
    """The figures of the last iterations in `log.jsonl` whose lines were written whole, oldest first."""
    return _lines(folder / "log.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The last JSON objects in a file of one a line, oldest first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            texts = file.read().rpartition(b"\n")[0].splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError):  # the first may have been cut
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def curve_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `curve.csv`, or [] if it cannot be read."""
    try:
        with (folder / "curve.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
