"""What an operator sees of a real run whose processes are stopped, killed and started again."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.test_faults import DEADLINE_SECONDS, REPLAYED, alive, descendants, iterations, start, wait_for

FOR_EVER = ["--mode", "async", "--actors", "2", "--steps", "100000000", *REPLAYED]

pytestmark = pytest.mark.processes


def workers(process: subprocess.Popen[str], role: str) -> list[psutil.Process]:
    """All processes of a role of a run, without their guards."""
    found = []
    for child in alive(descendants(process)):
        command = child.cmdline()
        if "launch.worker" in command and role in command and "launch.lifeline" not in command:
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
