"""What happened to a run, line by line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from bm3il.launch.config import Config
from bm3il.launch.events import EVENTS, EventLog, read_events
from bm3il.launch.outcome import Outcome
from bm3il.protocol.messages import Event
from tests.launch.test_faults import DEADLINE_SECONDS, SMALL


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def test_every_line_says_when_what_and_to_whom(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "supervisor-0")
    log.start(Config(seed=7), resumed=False)
    log.add("restart", "was killed by SIGKILL", "actor-3")
    log.end(Outcome(4, "no chunk"))
    start, restart, end = lines(tmp_path)
    for line in (start, restart, end):
        assert [*line][:5] == ["time", "seconds", "event", "process", "text"]
        assert datetime.fromisoformat(str(line["time"]).replace("Z", "+00:00")).tzinfo is not None
    assert (start["event"], start["process"]) == ("start", "supervisor-0")
    assert "seed 7" in str(start["text"])
    assert {"version", "command"} <= start.keys()
    assert (restart["process"], restart["text"]) == ("actor-3", "was killed by SIGKILL")
    assert (end["status"], end["exit_code"], end["text"]) == ("failed", 4, "failed: no chunk")


@pytest.mark.parametrize("at", [math.nan, math.inf, -1e300, 1e300])
def test_an_event_of_no_time_is_of_now(tmp_path: Path, at: float) -> None:
    EventLog(tmp_path, "supervisor-0").take([Event("best\n{", "learner-0\n", "a\nb" * 9000, at)])
    (line,) = lines(tmp_path)
    assert abs(float(str(line["seconds"]))) < 60
    assert len(str(line["text"])) <= 1000


def test_a_disk_that_takes_no_more_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path, "supervisor-0")
    (tmp_path / EVENTS).mkdir()
    for _ in range(3):
        log.add("best", "nobody will know")
    assert len(caplog.records) == 1


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    EventLog(tmp_path, "supervisor-0").add("stop", "SIGTERM")
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"time": "20')
    EventLog(tmp_path, "supervisor-0").add("start", "again")
    assert [event["event"] for event in read_events(tmp_path, 5)] == ["stop", "start"]
    assert [event["event"] for event in read_events(tmp_path, 1)] == ["start"]
    assert read_events(tmp_path / "nowhere", 5) == []


def test_what_is_done_again_is_said_to_whoever_looks_on(tmp_path: Path) -> None:
    said: list[str] = []
    told = [("restored", "goes on from 3"), ("best", "return 7"), ("rewind", "goes back from 5")]
    EventLog(tmp_path, "supervisor-0", said.append).take([Event(what, "learner-0", text, 1.0) for what, text in told])
    assert said == ["learner-0 goes on from 3", "learner-0 goes back from 5"]
    assert [line["event"] for line in lines(tmp_path)] == ["restored", "best", "rewind"]


def test_a_serial_run_tells_its_events_too(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bm3il.launch.cli",
        "train",
        "--run",
        "run",
        *SMALL,
        "--mode",
        "serial",
        "--steps",
        "300",
    ]
    done = subprocess.run(command, cwd=tmp_path, timeout=DEADLINE_SECONDS, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    events = lines(tmp_path / "runs" / "run")
    assert [e["event"] for e in events if e["event"] != "best"] == [
        "start",
        "checkpoint",
        "checkpoint",
        "evaluated",
        "end",
    ]
    assert str(events[0]["command"]).startswith("bm3il train --run run")
    assert any(str(event["text"]).startswith("checkpoint of iteration 3") for event in events)
