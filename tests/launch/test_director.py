"""What the director hears may be anything."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from launch import status as status_command
from launch.config import load_preset
from launch.director import Director
from launch.progress import Progress
from launch.topology import Node, Plan, Process, ipc_addresses
from protocol.channels import Client
from protocol.messages import Done, Sender, Status
from protocol.telemetry import Telemetry


@pytest.fixture
def director(tmp_path: Path) -> Iterator[Director]:
    config = load_preset("rover_tower_8")
    nodes, processes = (Node("here"), Node("there")), (Process("learner", 0, 0),)
    plan = Plan("run", str(tmp_path), config.to_yaml(), "", nodes, processes, ipc_addresses(tmp_path, processes))
    telemetry = Telemetry("supervisor", 0, Sender("run", "supervisor-0"))
    director = Director(plan, telemetry)
    yield director
    director.close()
    telemetry.close()


def tell(director: Director, folder: Path, name: str, status: Status) -> None:
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
    director._written = 0.0
    director.pump()
    assert json.loads((tmp_path / "processes.json").read_text())["learner-0"]["stage"] == "[/x]"
    assert status_command.print_status(tmp_path) == 0
    assert "[/x]" in capsys.readouterr().out
