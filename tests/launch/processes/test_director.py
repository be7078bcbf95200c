"""What the director hears may be anything."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bm3il.launch import status as status_command
from bm3il.launch.config import load_preset
from bm3il.launch.events import read_events
from bm3il.launch.processes.director import LOST_NODE_SECONDS, Director
from bm3il.launch.processes.states import State
from bm3il.launch.progress import Progress
from bm3il.launch.topology import Node, Plan, Process, ipc_addresses
from bm3il.protocol.channels import Client
from bm3il.protocol.errors import InputError
from bm3il.protocol.messages import Done, Event, Sender, Status
from bm3il.protocol.telemetry import END, Telemetry


@pytest.fixture
def director(tmp_path: Path) -> Iterator[Director]:
    config = load_preset("rover_tower_8")
    nodes, processes = (Node("here"), Node("there")), (Process("learner", 0, 0), Process("actor", 0, 1))
    plan = Plan("run", str(tmp_path), config.to_yaml(), "", nodes, processes, ipc_addresses(tmp_path, processes))
    telemetry = Telemetry("supervisor", 0, Sender("run", "supervisor-0"))
    director = Director(plan, telemetry)
    yield director
    director.close()
    telemetry.close()


def tell(director: Director, folder: Path, name: str, status: Status | Event) -> None:
    client = Client(f"ipc://{folder}/control-0", Sender("run", name), lambda body: {}, lambda cause: None)
    ticket, deadline = client.submit(status), time.monotonic() + 10
    while (answer := client.take(ticket)) is None:
        assert time.monotonic() < deadline
        director.pump(0.01)
        client.pump(0.01)
    assert isinstance(answer.body, Done)
    client.close()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_status_of_no_numbers_and_with_markup_is_shown(director: Director, tmp_path: Path, terminal: bool) -> None:
    values = {
        "iteration": 1.0,
        "steps": 1e308,
        "steps_per_second": 1e-5,
        "return_mean": float("nan"),
        "exit_code": float("nan"),
        "stage_seconds": float("inf"),
    }
    tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "[/x] a stage", "", values))
    tell(director, tmp_path, "supervisor-1", Status("supervisor", 1, 0, 1, "[/x]", "", values))
    assert director.remote_outcome() is None
    text = io.StringIO()
    progress = Progress(Console(file=text, force_terminal=terminal, width=200))
    progress.show(director.statuses["learner-0"], [*director.worries(), "[/x] a worry"])
    progress.close()
    assert "[/x] a worry" in text.getvalue()


def test_a_stage_is_no_markup(
    tmp_path: Path, director: Director, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(load_preset("rover_tower_8").to_yaml())
    monkeypatch.setattr(status_command, "is_running", lambda folder: True)
    tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "[/x]", "", {}))
    director._looked = 0.0
    director.pump()
    assert json.loads((tmp_path / "processes.json").read_text())["learner-0"]["stage"] == "[/x]"
    assert status_command.print_status(tmp_path) == 0
    assert "[/x]" in capsys.readouterr().out


def test_events_of_the_run_are_written_down_and_a_stranger_s_are_not(director: Director, tmp_path: Path) -> None:
    tell(director, tmp_path, "learner-0", Event("best", "learner-0", "return 3", time.time() - 5))
    tell(director, tmp_path, "supervisor-1", Event("restart", "actor-7", "was killed", time.time()))
    tell(director, tmp_path, "learner-77", Event("best", "learner-77", "return 1e9", time.time()))
    events = read_events(tmp_path, 9)
    assert [(e["event"], e["process"]) for e in events] == [("best", "learner-0"), ("restart", "actor-7")]
    assert events[0]["seconds"] < 0 <= events[1]["seconds"]


def test_a_full_disk_is_told_once(
    director: Director, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise InputError("cannot write processes.json: No space left on device")

    monkeypatch.setattr("bm3il.launch.processes.director.write_atomically", full)
    for _ in range(3):
        director._looked = 0.0
        tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "collect", "127.0.0.1:81", {}))
    assert caplog.messages == ["cannot write processes.json: No space left on device"]


def test_a_trouble_is_told_once_until_it_is_over_for_good(director: Director, tmp_path: Path) -> None:
    def look(stage_seconds: float, now: float) -> None:
        values = {"stage_seconds": stage_seconds}
        director.statuses["learner-0"] = Status("learner", 0, 0, 1, "wait_for_chunks", "", values)
        director._heard["learner-0"] = time.monotonic()
        director._tell_troubles(director.states(), now)

    for now in range(0, 200, 15):  # starved for 5 of every 15 s
        look(1, now)
        look(12, now + 5)
        look(1, now + 6)
    look(1, 240)
    events = [e for e in read_events(tmp_path, 9) if e["process"] == "learner-0"]
    assert [(e["event"], e["state"]) for e in events] == [("state", "starved"), ("state", "alive")]
    assert events[0]["text"] == "starved: has been in 'wait_for_chunks' for 12 s: it waits for others"


@pytest.mark.parametrize(
    ("values", "starved"),
    [({}, []), ({"cloning_iterations": 40.0}, []), ({"iteration": 1.0}, ["actor-0"])],
)
def test_who_waits_for_the_learner_s_first_policy_is_in_no_trouble(
    director: Director, tmp_path: Path, values: dict[str, float], starved: list[str]
) -> None:
    waits = {"stage_seconds": 30.0}
    tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "update", "", values))
    tell(director, tmp_path, "actor-0", Status("actor", 0, 0, 1, "wait_for_weights", "", waits))
    assert [name for name, state in director.states().items() if state.troubled] == starved
    tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "wait_for_particles", "", values | waits))
    assert director.states()["learner-0"].name == "starved", "what the learner itself waits for is missing"


def test_who_is_heard_again_was_away_since_its_last_sign(director: Director, tmp_path: Path) -> None:
    """A process that was stopped tells of a long wait when it goes on: it waited for nobody."""
    states = [
        (100.0, State("dead", "has not been heard for 11 s", 11.0)),
        (140.0, State("starved", "has been in 'wait_for_credit' for 51 s", 51.0)),
        (141.0, State("alive")),
        (152.0, State("alive")),
    ]
    for now, state in states:
        director._tell_troubles({"actor-1": state}, now)
    assert [e["text"] for e in read_events(tmp_path, 9)] == [
        "dead: has not been heard for 11 s",
        "starved: heard again, 51 s after its last sign",
        "alive again for 12 s, after 51 s of trouble",
    ]


@pytest.mark.parametrize("says_so", [False, True])
def test_an_actor_that_joined_and_left_is_told_and_forgotten(tmp_path: Path, says_so: bool) -> None:
    config = replace(load_preset("rover_tower_8"), mode="async")
    processes = (Process("learner", 0, 0),)
    plan = Plan("run", str(tmp_path), config.to_yaml(), "", (Node("a"),), processes, ipc_addresses(tmp_path, processes))
    telemetry = Telemetry("supervisor", 0, Sender("run", "supervisor-0"))
    director = Director(plan, telemetry)
    try:
        tell(director, tmp_path, "actor-1234", Status("actor", 1234, 1, 1, "collect", "10.0.0.7:81", {}))
        assert "actor-1234" in director.states()
        if says_so:
            tell(director, tmp_path, "actor-1234", Status("actor", 1234, 1, 1, END, "10.0.0.7:81", {}))
        else:
            director._look(time.monotonic() + LOST_NODE_SECONDS + 1)
        assert "actor-1234" not in director.states()
        events = [e for e in read_events(tmp_path, 9) if e["process"] == "actor-1234"]
        assert [e["event"] for e in events if e["event"] != "back"] == ["joined", "left"]  # each `tell` is a new sender
        assert "10.0.0.7" in events[0]["text"]
    finally:
        director.close()
        telemetry.close()


def test_a_process_that_is_heard_again_is_back(director: Director, tmp_path: Path) -> None:
    for _ in range(2):  # each with another incarnation
        tell(director, tmp_path, "learner-0", Status("learner", 0, 0, 1, "collect", "", {}))
    (back,) = [e for e in read_events(tmp_path, 9) if e["event"] == "back"]
    assert back["process"] == "learner-0"
    assert back["text"].startswith("is heard again, 0 s after its last sign")


@pytest.mark.parametrize("at", ["while it writes", "between"])
def test_a_pause_of_the_director_itself_loses_no_node(
    director: Director, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Else a disk that stalls makes it take over what other nodes are doing."""
    clock = SimpleNamespace(offset=0.0)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + clock.offset)
    tell(director, tmp_path, "supervisor-1", Status("supervisor", 1, 1, 1, "start", "", {}))

    def stall(*_: object) -> None:
        clock.offset += 2 * LOST_NODE_SECONDS

    if at == "between":
        stall()
    else:
        monkeypatch.setattr("bm3il.launch.processes.director.write_atomically", stall)
        director._looked = 0.0
        director.pump()
        monkeypatch.undo()
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + clock.offset)
    assert director.lost_nodes() == []
    director.pump()
    assert director.lost_nodes() == []
    for _ in range(10):  # it listens now, and hears nothing
        clock.offset += LOST_NODE_SECONDS / 8
        director.pump()
    assert director.lost_nodes() == [1]


def test_a_lost_node_is_told_once(director: Director, tmp_path: Path) -> None:
    assert director.lost_nodes() == [], "who was never heard is not lost"
    tell(director, tmp_path, "supervisor-1", Status("supervisor", 1, 0, 1, "", "", {}))
    assert director.lost_nodes() == []
    director._heard["supervisor-1"] -= LOST_NODE_SECONDS + 1
    assert director.lost_nodes() == [1]
    assert director.lost_nodes() == []
