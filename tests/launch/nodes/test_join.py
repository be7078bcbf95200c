"""Actors that come to an async run, and leave it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bm3il.launch.config import load_preset
from bm3il.launch.events import read_events
from bm3il.launch.nodes.join import join, read_ticket, ticket
from bm3il.launch.outcome import Outcome
from bm3il.launch.processes import director
from bm3il.launch.topology import Node, Plan, ipc_addresses, processes_of
from bm3il.protocol.channels import Server
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import Keys
from bm3il.protocol.messages import Done, Sender
from tests.launch.test_faults import DEADLINE_SECONDS, alive, descendants, iterations, result_of, start, wait_for


def plan_of(folder: Path, mode: str) -> Plan:
    config = replace(load_preset("rover_tower_8"), mode=mode, actors=1)
    Keys.create().save(folder / "keys.json")
    keys_file = str(folder / "keys.json")
    processes = processes_of(config)
    addresses = ipc_addresses(folder, processes)
    return Plan("run", str(folder), config.to_yaml(), "", (Node("here"),), processes, addresses, keys_file)


def test_a_ticket_is_its_owners_and_has_no_secret_of_the_servers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "async")
    path = tmp_path / "join.json"
    with ticket(plan):
        assert path.stat().st_mode & 0o777 == 0o600
        read, keys = read_ticket(path)
        assert read == plan
        assert keys is not None
        assert keys.server_secret == ""
        path.chmod(0o644)
        with pytest.raises(InputError, match="chmod 600"):
            read_ticket(path)
    assert not path.exists()
    with ticket(plan_of(tmp_path, "lockstep")):
        assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {}, "keys": ""}', '{"plan": 3, "keys": 4}'])
def test_what_is_no_ticket_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "join.json"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(InputError, match="is not the join"):
        read_ticket(path)


class Actors:
    """Those of a supervisor, of whom none is ever started."""

    outcome: Outcome | None = None

    def __init__(self, *_: object) -> None:
        self.began = time.monotonic()

    def start(self) -> None: ...

    def stop_all(self, *_: object) -> None: ...

    def watch(self) -> Outcome | None:
        return self.outcome if time.monotonic() - self.began > 2 else None


@pytest.mark.parametrize(
    ("answered", "outcome", "code", "told"),
    [
        (False, None, 4, "nobody answered at ipc://"),
        (False, Outcome(4, "actor-1: no weights"), 4, "nobody answered at ipc://"),
        (True, Outcome(2, "actor-1: cannot read town.xml"), 2, "actor-1: cannot read town.xml"),
    ],
)
def test_who_cannot_join_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answered: bool,
    outcome: Outcome | None,
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr(director, "Supervisor", type("Theirs", (Actors,), {"outcome": outcome}))
    plan = plan_of(tmp_path, "async")
    learner = replace(plan.config.learner, deadline_seconds=30.0 if answered else 3.0)
    plan = replace(plan, config_yaml=replace(plan.config, learner=learner).to_yaml(), keys_file="")
    ended = threading.Event()

    def answer() -> None:
        server = Server(plan.control, Sender("run", "supervisor-0"), lambda _: {}, lambda _: None)
        while not ended.is_set():
            for request in server.poll(0.05):
                server.answer(request, Done(""))
        server.close()

    thread = threading.Thread(target=answer)
    if answered:
        thread.start()
    try:
        with ticket(plan):
            assert join(tmp_path / "join.json", 1) == code
    finally:
        ended.set()
        if answered:
            thread.join()
    output = capsys.readouterr()
    assert output.err.startswith(f"bm3il: {told}")
    assert "left" not in output.out


LEARNER = ["bm3il.launch.processes.worker", "learner", "0"]
REST_SECONDS = 240.0
"""For the rest of a run that is not disturbed any more; it has a tenth of a core where other tests run beside it."""


def started(folder: Path) -> list[bool]:
    """Of every actor of a run, whether it has loaded what it needs: before, it is ended without a farewell."""
    told = json.loads((folder / "processes.json").read_text())
    return [process["stage"] != "start" for name, process in told.items() if name.startswith("actor")]


@pytest.mark.processes
def test_actors_come_and_go_without_harm(tmp_path: Path) -> None:
    process = start(tmp_path, "run", "--mode", "async", "--actors", "1", "--steps", "8000")
    folder = tmp_path / "runs" / "run"
    wait_for(lambda: iterations(tmp_path, "run") >= 3, process)
    commands = [(child, child.cmdline()) for child in alive(descendants(process))]
    (learner,) = (child for child, command in commands if command[-3:] == LEARNER and "guard" not in command)
    learner.suspend()  # else the run could be over before they are there
    command = [sys.executable, "-m", "bm3il.launch.cli", "join", str(folder / "join.json"), "--actors", "2"]
    joined = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    roles = lambda: [t["labels"]["role"] for t in json.loads((folder / "targets.json").read_text())]  # noqa: E731
    wait_for(lambda: roles().count("actor") == 3, process)
    wait_for(lambda: started(folder) == [True] * 3, process)
    learner.resume()
    processes, began = descendants(joined), iterations(tmp_path, "run")
    wait_for(lambda: iterations(tmp_path, "run") > began + 2, process)
    joined.send_signal(signal.SIGINT)
    output, _ = joined.communicate(timeout=DEADLINE_SECONDS)
    assert (joined.returncode, output.splitlines()[-1]) == (0, "left"), output
    assert not alive(processes)
    began, asked = iterations(tmp_path, "run"), time.monotonic()
    if process.poll() is None:
        wait_for(lambda: process.poll() is not None or iterations(tmp_path, "run") > began + 2, process)
        assert time.monotonic() - asked < DEADLINE_SECONDS
    output, _ = process.communicate(timeout=REST_SECONDS)
    assert process.returncode == 0, output
    assert (result_of(tmp_path, "run")["status"], result_of(tmp_path, "run")["env_steps"]) == ("finished", 8_000)
    told = [(event["event"], event["text"]) for event in read_events(folder, 1000)]
    assert told.count(("left", "it was told to")) == 2
    assert "without" not in dict(told)
    assert not (folder / "join.json").exists()
