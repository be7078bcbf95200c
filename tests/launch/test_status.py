"""What `bm3il status` tells of each process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import status
from launch.config import load_preset
from launch.states import judge
from launch.status import print_status
from protocol.messages import Status


def told(role: str, stage: str, seconds: float) -> Status:
    return Status(role, 0, 0, 1, stage, "", {"stage_seconds": seconds})


@pytest.mark.parametrize(
    ("role", "stage", "seconds", "silent", "expected"),
    [
        ("actor", "collect", 5, 0.5, "alive"),
        ("actor", "collect", 90, 0.5, "stuck"),
        ("actor", "wait_for_weights", 30, 0.5, "starved"),
        ("learner", "between", 5, 0.5, "alive"),
        ("actor", "collect", 5, 30, "dead"),
        ("actor", "wait_for_credit", 9, 0.5, "alive"),
        ("actor", "wait_for_credit", 11, 0.5, "starved"),
        ("evaluator", "wait_for_weights", 30, 0.5, "starved"),
        ("evaluator", "idle", 30, 0.5, "idle"),
        ("evaluator", "evaluate", 64, 0.5, "stuck"),
        ("reward-server", "idle", 300, 0.5, "idle"),
        ("reward-server", "update", 61, 0.5, "stuck"),
        ("learner", "wait_for_particles", 30, 0.5, "starved"),
        ("supervisor", "start", 300, 0.5, "alive"),
        ("actor", "wait_for_weights", 30, 11, "dead"),
    ],
)
def test_what_a_process_is_doing(role: str, stage: str, seconds: float, silent: float, expected: str) -> None:
    state = judge(told(role, stage, seconds), silent)
    assert state.name == expected
    assert state.troubled == (expected in ("starved", "stuck", "dead"))
    if state.troubled:
        assert stage in state.why


def test_in_lockstep_who_waits_for_a_turn_is_not_starved() -> None:
    assert judge(told("actor", "wait_for_weights", 30), 0.5, patience_seconds=34).name == "alive"
    assert judge(told("actor", "wait_for_weights", 40), 0.5, patience_seconds=34).name == "starved"


def test_who_was_never_heard_is_not_dead() -> None:
    assert judge(None, 100).name == "not heard yet"


def test_every_process_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(load_preset("rover_tower_8").to_yaml())
    shown = {
        "node": 1,
        "state": "starved",
        "stage": "collect",
        "stage_seconds": 3.2,
        "policy_version": 7,
        "restarts": 2,
    }
    (tmp_path / "processes.json").write_text(
        json.dumps(
            {
                "actor-0": shown,
                "actor-1": shown | {"policy_version": None},
                "learner-0": shown | {"policy_version": 12.0},
            }
        )
    )
    monkeypatch.setattr(status, "is_running", lambda folder: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert print_status(tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "actor-" in line]
    assert len(lines) == 2
    cells = [cell.strip() for cell in lines[0].split("│")[1:]]
    assert cells[1:8] == ["1", "starved", "collect", "3 s", "7", "5", "2"]
    assert [cell.strip() for cell in lines[1].split("│")][6:8] == ["", ""]
