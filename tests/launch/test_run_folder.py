from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import run, run_folder
from launch.config import Config, load_preset
from launch.outcome import Outcome, attempt
from protocol.errors import DeadlineError, InputError, NumericalError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(load_preset("rover_tower_8"), run="mine", runs_folder=str(tmp_path / "runs"))


def test_a_new_folder_holds_the_configuration(config: Config) -> None:
    folder = run_folder.create(config)
    assert run_folder.open_existing(folder) == config


def test_runs_that_start_in_one_second_have_names_of_their_own(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    names = []
    for _ in range(3):
        named = run_folder.named(replace(config, run=""))
        run_folder.create(named)
        names.append(named.run.partition("seed0-")[2])
    assert names == ["now", "now-2", "now-3"]


def test_no_space_leaves_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(InputError, match="has 1 MiB free"):
        run_folder.create(config)
    assert not Path(config.runs_folder, "mine").exists()


def test_two_launchers_cannot_have_one_run(config: Config) -> None:
    folder = run_folder.create(config)
    assert not run_folder.is_running(folder)
    with run_folder.locked(folder):
        assert run_folder.is_running(folder)
        with pytest.raises(InputError, match="being run by another process"), run_folder.locked(folder):
            pass
    assert not run_folder.is_running(folder)


def test_names_tell_the_runs_apart(config: Config) -> None:
    assert run_folder.named(config).run == "mine"
    assert run_folder.named(replace(config, run="", seed=3)).run.startswith("rover_tower_8-bm3il-seed3-2")


def test_the_conclusion_completes_the_result(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "result.json").write_text(json.dumps({"env_steps": 5, "status": "interrupted"}))
    run_folder.conclude(folder, config, Outcome(1, "actor-0 died"))
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["error"]) == ("failed", 1, "actor-0 died")
    assert (result["env_steps"], result["mode"], result["algorithm"]) == (5, "lockstep", "bm3il")
    run_folder.conclude(folder, config, Outcome(0))
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert "error" not in result


def test_another_configuration_is_refused_on_resume_and_shown(config: Config) -> None:
    folder = run_folder.create(config)
    with pytest.raises(InputError, match="steps: 60000 then, steps: 7 now"):
        run.resume(folder, replace(config, steps=7))


def test_serial_mode_has_one_node(config: Config) -> None:
    with pytest.raises(InputError, match="one process"):
        run.check(replace(config, mode="serial", nodes=2))


def test_a_run_whose_learner_was_killed_tells_how_far_it_had_come(config: Config) -> None:
    folder = run_folder.create(config)
    lines = [{"iteration": n, "env_steps": 100 * n, "wall_seconds": 2.5 * n} for n in (1, 2)]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 3, "env_'  # it was killed while it wrote
    (folder / "log.jsonl").write_text(log)
    (folder / "curve.csv").write_text("iteration,return_mean,return_stderr,normalized_return\n1,5.5,0.5,\n")
    result = run_folder.conclude(folder, config, Outcome(130))
    assert result["status"] == "interrupted"
    assert (result["iterations"], result["env_steps"], result["wall_seconds"]) == (2, 200, 5.0)
    assert (result["return_mean"], result["return_stderr"]) == (5.5, 0.5)
    assert "normalized_return" not in result


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"iteration": 1}\n'])
def test_a_run_that_did_not_come_far_tells_nothing_of_it(config: Config, text: str) -> None:
    folder = run_folder.create(config)
    (folder / "log.jsonl").write_text(text)
    assert "iterations" not in run_folder.conclude(folder, config, Outcome(1, "died"))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("bad"), 2, "bad"),
        (NumericalError("critic loss"), 3, "critic loss"),
        (DeadlineError("no chunk"), 4, "no chunk"),
        (OSError(28, "No space left on device", "x.csv"), 2, "cannot write x.csv: No space left on device"),
    ],
)
def test_errors_that_a_restart_cannot_cure_become_an_outcome(error: Exception, code: int, text: str) -> None:
    def work() -> str:
        raise error

    outcome = attempt(work)
    assert outcome.code == code
    assert text in outcome.text
    assert outcome.status == "failed"


def test_other_errors_are_crashes() -> None:
    def work() -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        attempt(work)
    assert attempt(lambda: "interrupted") == Outcome(130)
    assert attempt(lambda: None) == Outcome(0)
