"""What `bm3il status` tells of each process."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from bm3il.launch import result, status
from bm3il.launch.config import load_preset
from bm3il.launch.events import EventLog
from bm3il.launch.locks import locked
from bm3il.launch.outcome import Outcome
from bm3il.launch.processes.states import judge
from bm3il.launch.status import print_list, print_status
from bm3il.protocol.errors import InputError
from bm3il.protocol.messages import Status


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
    assert judge(None, 50).name == "starting"


def test_who_is_not_heard_for_long_does_not_start() -> None:
    assert judge(None, 70).name == "dead"


RUN = "a_run_with_a_name_as_long_as_such_names_are_20261127-091233"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that has done 120 of 250 iterations, the last ones at two a second."""
    folder = tmp_path / RUN
    (folder / "checkpoints" / "00000100").mkdir(parents=True)
    (folder / "config.yaml").write_text(replace(load_preset("rover_tower_8"), steps=200_000).to_yaml())
    lines = [
        {"iteration": i, "env_steps": 800 * i, "wall_seconds": 1000.0 + i / 2, "reward": None} for i in range(1, 121)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 121, "env')
    (folder / "curve.csv").write_text("iteration,env_steps,return_mean,normalized_return\n118,94400,97.25,\n")
    shown = {
        "node": 1,
        "state": "starved",
        "stage": "wait_for_particles",
        "stage_seconds": 3725.2,
        "policy_version": 117,
        "restarts": 2,
    }
    others = {"learner-0": shown | {"policy_version": 120.0}, "reward-server-0": shown | {"policy_version": None}}
    (folder / "processes.json").write_text(json.dumps({"actor-1234": shown} | others))
    target = {"targets": ["10.0.0.1:31999"], "labels": {"process": "actor-1234"}}
    (folder / "targets.json").write_text(json.dumps([target]))
    log = EventLog(folder, "supervisor-0")
    for number in range(10):
        log.add(
            "restart",
            f"{number} was killed; starting it again ({9 * 'many words'})",
            "actor-3",
        )
    for number in range(6):  # they come all the time, and hide nothing
        log.add("checkpoint", f"checkpoint of iteration {number}", "learner-0")
    monkeypatch.setattr(status, "is_running", lambda folder: folder.name == RUN)
    return folder


def test_every_process_is_shown_within_eighty_columns(
    folder: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_status(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (cells,) = [line.split() for line in lines if line.startswith("actor-1234")]
    assert cells == ["actor-1234", "1", "starved", "wait_for_particles", "1:02:05", "117", "3", "2"]
    (cells,) = [line.split() for line in lines if line.startswith("reward-server-0")]
    assert cells == ["reward-server-0", "1", "starved", "wait_for_particles", "1:02:05", "2"]


def test_a_status_says_how_far_the_run_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(folder) == 0
    text = capsys.readouterr().out
    assert "running: iteration 120 of 250, 1:05 left\n96,000 of 200,000 steps, 1,600 steps/s\n" in text
    assert "last evaluation: iteration 118, return 97.25\n" in text
    assert "last checkpoint: iteration 100, 0:0" in text
    assert [f"{number} was killed" in text for number in range(10)] == [False, False, *[True] * 8]


def test_a_run_that_has_begun_is_in_its_first_iteration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that went back there."""
    (folder / "log.jsonl").unlink()
    (folder / "checkpoints" / "00000100").rename(folder / "checkpoints" / "00000000")
    assert print_status(folder) == 0
    assert "\nrunning: in the first iteration\n" in capsys.readouterr().out
    (folder / "checkpoints" / "00000000").rmdir()
    assert print_status(folder) == 0
    assert "\nrunning: before the first iteration\n" in capsys.readouterr().out


def test_an_actor_that_was_heard_after_the_learner_is_not_ahead_of_it(folder: Path) -> None:
    told = json.loads((folder / "processes.json").read_text())
    told["learner-0"]["policy_version"] = told["actor-1234"]["policy_version"] - 1
    (folder / "processes.json").write_text(json.dumps(told))
    assert status.describe(folder)["processes"]["actor-1234"]["lag"] == 0


def test_a_status_says_why_a_run_has_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if its disk had no room for a result, and in whole, however long it is."""
    why = "learner-0: cannot write " + "a_long_folder/" * 9 + "log.jsonl: No space left on device"
    EventLog(folder, "supervisor-0").end(Outcome(2, why))
    monkeypatch.setattr(status, "is_running", lambda _: False)
    assert print_status(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "failed: iteration 120 of 250" in lines
    assert why in lines
    assert lines[-1] == f"go on with: bm3il resume {folder}"


def test_a_run_whose_episodes_end_early_is_never_beyond_its_iterations(folder: Path) -> None:
    with (folder / "log.jsonl").open("w") as file:
        file.write(json.dumps({"iteration": 9, "env_steps": 230_000, "wall_seconds": 9.0}) + "\n")
    told = status.describe(folder)
    assert (told["iteration"], told["iterations"], told["seconds_left"]) == (9, 9, None)


def test_a_list_says_why_a_run_has_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    EventLog(folder, "supervisor-0").end(Outcome(2, "learner-0: No space left on device"))
    monkeypatch.setattr(status, "is_running", lambda _: False)
    assert print_list(folder.parent) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  learner-0: No space left on device"


FAILED = {"status": "failed", "error": "of an old start", "ended": "2024-01-01T00:00:00+00:00", "return_mean": 1.5}


@pytest.mark.parametrize(("held", "state"), [(True, "running"), (False, "killed")])
def test_the_result_of_an_earlier_start_tells_nothing_of_the_present_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: bool, state: str
) -> None:
    (folder / "result.json").write_text(json.dumps(FAILED | {"resume": "bm3il resume it"}))
    monkeypatch.undo()
    with locked(folder) if held else nullcontext():
        if not held:
            (folder / "events.jsonl").unlink()
            told = status.describe(folder)
            assert (told["state"], told["reason"]) == ("failed", "of an old start")
            EventLog(folder, "supervisor-0").start(load_preset("rover_tower_8"), resumed=True)
        told = status.describe(folder)
        assert (told["state"], told["reason"], told["result"], told["return_mean"]) == (state, "", {}, 97.25)
        assert print_status(folder) == 0
        assert "old start" not in (text := capsys.readouterr().out)
        assert "go on with" not in text


@pytest.mark.parametrize(("steps", "state"), [(200_000, "finished"), (100_000, "killed")])
def test_a_run_that_shall_play_more_steps_is_not_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, state: str
) -> None:
    monkeypatch.setattr(result, "is_running", lambda _: False)
    monkeypatch.setattr(status, "is_running", lambda _: False)
    (folder / "result.json").write_text(json.dumps({"status": "finished", "steps": steps}))
    assert status.describe(folder)["state"] == state
    EventLog(folder, "supervisor-0").start(load_preset("rover_tower_8"), resumed=True)
    EventLog(folder, "supervisor-0").end(Outcome(2, "no GPU"))
    told = status.describe(folder)
    assert (told["state"], told["reason"]) == ((state, "") if state == "finished" else ("failed", "no GPU"))


def test_a_status_for_programs_says_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(folder, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["iteration"], told["iterations"], told["seconds_left"]) == ("running", 120, 250, 65)
    assert (
        told["processes"]["actor-1234"] | {"lag": 3, "metrics": "http://10.0.0.1:31999/metrics"}
        == (told["processes"]["actor-1234"])
    )
    assert told["evaluation"]["normalized_return"] is None
    assert told["checkpoint"]["iteration"] == 100
    assert len(told["events"]) == 16
    assert told["config"]["steps"] == 200_000


def test_nothing_is_cut_where_no_terminal_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = f"berlin?{'&'.join(f'option{number}=12345' for number in range(20))}"
    (folder / "config.yaml").write_text(replace(load_preset("berlin"), environment=environment).to_yaml())
    assert print_status(folder) == 0
    assert f"actor-3: 9 was killed; starting it again ({9 * 'many words'})\n" in capsys.readouterr().out
    assert print_list(folder.parent) == 0
    assert capsys.readouterr().out.endswith(f"bm3il on {environment}\n")


def test_a_list_names_every_run_and_is_spoiled_by_none(
    folder: Path, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folder.parent
    for number, (name, status_of) in enumerate([("done", "finished"), ("cut", "interrupted"), ("bad", "failed")]):
        (runs / name).mkdir()
        (runs / name / "config.yaml").write_text(load_preset("berlin").to_yaml())
        (runs / name / "result.json").write_text(json.dumps({"status": status_of, "return_mean": 12.345}))
        os.utime(runs / name / "config.yaml", (number, number))
    (runs / "torn").mkdir()
    (runs / "torn" / "config.yaml").write_text("steps: [")
    os.utime(runs / "torn" / "config.yaml", (9, 9))
    (runs / "killed").mkdir()
    (runs / "killed" / "config.yaml").write_text(load_preset("berlin").to_yaml())
    os.utime(runs / "killed" / "config.yaml", (10, 10))
    (runs / "no-run").mkdir()
    (runs / ".targets").mkdir()
    (runs / "a-file").touch()
    assert print_list(runs, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["state"]) for row in rows] == [
        (RUN, "running"),
        ("killed", "killed"),
        ("torn", "broken"),
        ("bad", "failed"),
        ("cut", "interrupted"),
        ("done", "finished"),
    ]
    assert "is not YAML" in rows[2]["error"]
    assert rows[3]["return_mean"] == 12.345
    assert print_list(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[lines.index("torn") + 1].split()[0] == "broken"
    assert lines[lines.index(RUN) + 1].split()[:5] == ["running", "120", "of", "250", "97.2"]
    with pytest.raises(InputError, match="is no folder of runs"):
        print_list(runs / "nowhere")


def test_an_empty_list_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_list(tmp_path) == 0
    assert capsys.readouterr().out == f"no runs and no studies in {tmp_path}\n"
    assert print_list(tmp_path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_list_has_a_row_of_each_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def study(name: str, *states: str) -> Path:
        (tmp_path / name).mkdir()
        told = {"runs": [{"run": str(number), "status": state} for number, state in enumerate(states)]}
        (tmp_path / name / "study.json").write_text(json.dumps(told))
        return tmp_path / name

    study("done", "finished", "finished")
    study("left", "finished", "running", "waiting")  # and killed
    study("torn").joinpath("study.json").write_text('{"runs": [')
    (tmp_path / "left" / "study.yaml").touch()
    busy = study("busy", "finished", "failed", "running")
    with locked(busy):
        assert print_list(tmp_path, as_json=True) == 0
        rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
        assert print_list(tmp_path) == 0
        lines = capsys.readouterr().out.splitlines()
    assert {name: row["state"] for name, row in rows.items()} == {
        "done": "finished",
        "left": "interrupted",
        "torn": "broken",
        "busy": "running",
    }
    assert rows["left"]["study"] == {"runs": 3, "finished": 1, "interrupted": 1, "waiting": 1}
    told = lines[lines.index("busy") + 1]
    assert told.split()[:5] == ["running", "1", "of", "3", "runs"]
    assert told.endswith(f"  study, 1 failed, 1 running: bm3il list {busy}")
