"""What an operator sees of a real run whose processes are stopped, killed and started again."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bm3il.launch.events import read_events
from tests.launch.test_faults import DEADLINE_SECONDS, REPLAYED, alive, descendants, iterations, start, wait_for

FOR_EVER = ["--mode", "async", "--actors", "2", "--steps", "100000000", *REPLAYED]

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


def workers(process: subprocess.Popen[str], role: str) -> list[psutil.Process]:
    """All processes of a role of a run, without their guards."""
    found = []
    for child in alive(descendants(process)):
        command = child.cmdline()
        works = "bm3il.launch.processes.worker" in command and "bm3il.launch.processes.lifeline" not in command
        if works and role in command:
            found.append(child)
    return found


def states(folder: Path) -> dict[str, str]:
    """As the director wrote them last."""
    told = json.loads((folder / "runs" / "run" / "processes.json").read_text())
    return {name: process["state"] for name, process in told.items()}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An async run at work, in tmp_path/runs/run; it is ended in the end."""
    process = start(tmp_path, "run", *FOR_EVER)
    wait_for(lambda: iterations(tmp_path, "run") >= 12, process)
    yield process
    for child in descendants(process):
        child.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_SECONDS)


def test_a_learner_without_chunks_and_actors_without_credit_are_starved(
    tmp_path: Path, run: subprocess.Popen[str]
) -> None:
    for stopped, starved in (("actor", "learner"), ("learner", "actor")):
        victims = workers(run, stopped)
        hungry = [f"{starved}-{index}" for index in range(len(workers(run, starved)))]
        for victim in victims:
            victim.send_signal(signal.SIGSTOP)
        wait_for(lambda: {states(tmp_path)[name] for name in hungry} == {"starved"}, run)  # noqa: B023
        assert states(tmp_path)[f"{stopped}-0"] == "dead"
        for victim in victims:
            victim.send_signal(signal.SIGCONT)
        wait_for(lambda: not {"starved", "dead"} & set(states(tmp_path).values()), run)


def test_the_night_can_be_read_from_its_events(tmp_path: Path) -> None:
    """An actor killed, the reward server stopped for a while, the learner killed, and the end asked for."""
    process, folder = start(tmp_path, "run", *FOR_EVER), tmp_path / "runs" / "run"
    wait_for(lambda: iterations(tmp_path, "run") >= 12, process)

    def told(*wanted: tuple[str, str, str]) -> bool:
        """Whether these (event, process, beginning of the text) are there in this order, among others."""
        found = iter(read_events(folder, 1000))
        return all(
            any((e["event"], e["process"]) == (what, who) and e["text"].startswith(text) for e in found)
            for what, who, text in wanted
        )

    workers(process, "actor")[0].kill()
    night = [("start", "supervisor-0", "bm3il"), ("processes", "supervisor-0", "started learner-0, evaluator-0, ")]
    night += [("checkpoint", "learner-0", "checkpoint of iteration 0")]
    restarts = [("restart", name, "was killed by SIGKILL") for name in ("actor-0", "actor-1")]
    wait_for(lambda: any(told(*night, restart) for restart in restarts), process)
    night += [("back", restart[1], "is heard again, ") for restart in restarts if told(restart)]
    wait_for(lambda: told(*night), process)
    (server,) = workers(process, "reward-server")
    server.send_signal(signal.SIGSTOP)
    night += [("state", "learner-0", "starved: has been in 'wait_for_")]
    silent = ("state", "reward-server-0", "dead: has not been heard for")
    wait_for(lambda: told(*night) and told(silent), process)
    server.send_signal(signal.SIGCONT)
    night += [("state", "learner-0", "alive again for ")]
    wait_for(lambda: told(*night), process)
    workers(process, "learner")[0].kill()
    night += [
        ("restart", "learner-0", "was killed by SIGKILL"),
        ("restored", "learner-0", "goes on from the checkpoint"),
    ]
    wait_for(lambda: told(*night), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECONDS)
    night += [
        ("stop", "supervisor-0", "SIGTERM asks for the end"),
        ("checkpoint", "learner-0", "checkpoint of iteration "),
    ]
    night += [("end", "supervisor-0", "interrupted")]
    assert told(*night), read_events(folder, 1000)
    assert len(read_events(folder, 1000)) < 100
    assert "goes on from the checkpoint" in (folder / "logs" / "learner-0.log").read_text()
    assert all(log.stat().st_size for log in (folder / "logs").iterdir())


def test_a_taken_metrics_port_ends_the_run_at_its_start(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = start(tmp_path, "run", *REPLAYED, "--metrics-port", str(port - 2))
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2, output
    assert f"metrics of evaluator-0 cannot listen on 127.0.0.1:{port}: Address already in use" in output
