from __future__ import annotations

import errno
import json
import platform
import socket
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bm3il.launch import provenance, run_folder
from bm3il.launch.config import Config, load_preset
from bm3il.launch.events import EventLog
from bm3il.launch.outcome import Outcome
from bm3il.launch.result import Start, conclude, concluded, read_result
from bm3il.protocol import files

START = Start("r", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(load_preset("rover_tower_8"), run="mine", runs_folder=str(tmp_path / "runs"))


def test_a_result_says_by_what_it_was_made(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder.create(config)
    result = conclude(folder, config, Outcome(0), START)
    assert (result["version"], result["torch"]) == (metadata.version("bm3il"), torch.__version__)
    assert (result["python"], result["host"]) == (platform.python_version(), socket.gethostname())
    assert result["started"] == "1970-01-01T00:00:00+00:00" < result["ended"]
    source, git = provenance.SOURCE, ["git", "-C", str(tmp_path)]
    if (source / ".git").exists():
        show = ["git", "-C", str(source), "rev-parse", "HEAD"]
        head = subprocess.run(show, capture_output=True, text=True, check=True)
        assert result["commit"].removesuffix("-dirty") == head.stdout.strip()
    assert provenance.commit(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.commit(tmp_path) is None  # it has no commit yet
    results = tmp_path / provenance.RESULTS / "worlds.json"
    results.parent.mkdir(parents=True)
    page = tmp_path / "docs" / "figures.md"
    page.parent.mkdir()
    for path in (tmp_path / "a", results, page):
        path.write_text("a")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, *who, "add", "."], check=True)
    subprocess.run([*git, *who, "commit", "-q", "-m", "a"], check=True)
    clean = provenance.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    results.write_text("b")
    page.write_text("b")
    assert provenance.commit(tmp_path) == clean  # rows of runs are added there while others go on
    (tmp_path / "a").write_text("b")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"
    (tmp_path / "within").mkdir()
    assert provenance.commit(tmp_path / "within") is None  # of something else
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(tmp_path) is None


def test_a_finished_result_stays_until_there_is_another(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "result.json").write_text(json.dumps({"run_id": "r", "iterations": 2, "return_mean": 5}))
    before = conclude(folder, config, Outcome(0), START)
    (folder / "log.jsonl").write_text('{"iteration": 2, "env_steps": 200, "wall_seconds": 1}\n')
    again = Start("again", 1.0)
    failed = conclude(folder, config, Outcome(2, "refused"), again, before)
    assert (failed["status"], failed["error"]) == ("failed", "refused")
    assert read_result(folder) == before
    assert not concluded(folder, "again")
    (folder / "log.jsonl").write_text('{"iteration": 3, "env_steps": 300, "wall_seconds": 1}\n')
    conclude(folder, config, Outcome(130), again, before)
    result = concluded(folder, "again")
    assert (result["status"], result["iterations"]) == ("interrupted", 3)
    assert "return_mean" not in result  # it was the finished run's


def test_a_disk_that_takes_no_result_does_not_hide_how_the_run_failed(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_folder.create(config)
    (folder / "log.jsonl").write_text('{"iteration": 4, "env_steps": 400, "wall_seconds": 2}\n')
    (folder / "result.json").write_text(json.dumps({"status": "interrupted", "run_id": "before"}))
    outcome = Outcome(2, "learner-0: cannot write log.jsonl: No space left on device")
    EventLog(folder, "supervisor-0").end(outcome)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "result.json")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_whole", full)
        told = conclude(folder, config, outcome, START)
    assert "cannot write" in caplog.text
    result = read_result(folder)
    known = ("status", "exit_code", "error", "iterations", "resume")
    assert [result[name] for name in known] == [told[name] for name in known]
    assert (result["status"], result["error"]) == ("failed", outcome.text)
    EventLog(folder, "supervisor-0").start(config, resumed=True)
    assert read_result(folder) == {}, "it was started again, and killed"
    EventLog(folder, "supervisor-0").end(Outcome(0))
    assert read_result(folder) == {}, "who has removed the result of a finished run does not want it"


def test_an_interrupted_run_tells_how_to_go_on(config: Config) -> None:
    config = replace(config, run="my run")
    folder = run_folder.create(config)
    result = conclude(folder, config, Outcome(130), START)
    assert result["resume"] == f"bm3il resume '{folder}'"
    assert "resume" not in conclude(folder, config, Outcome(2, "bad"), START)
    assert "resume" not in conclude(folder, config, Outcome(0), START)


def test_the_conclusion_completes_the_result(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "result.json").write_text(json.dumps({"run_id": "r", "env_steps": 5, "status": "interrupted"}))
    conclude(folder, config, Outcome(1, "actor-0 died"), START)
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["error"]) == ("failed", 1, "actor-0 died")
    assert (result["env_steps"], result["mode"], result["algorithm"]) == (5, "lockstep", "bm3il")
    conclude(folder, config, Outcome(0), START)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert "error" not in result


def test_a_run_whose_learner_was_killed_tells_how_far_it_had_come(config: Config) -> None:
    folder = run_folder.create(config)
    lines = [{"iteration": n, "env_steps": 100 * n, "wall_seconds": 2.5 * n} for n in (1, 2)]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 3, "env_'  # it was killed while it wrote
    (folder / "log.jsonl").write_text(log)
    (folder / "curve.csv").write_text("iteration,return_mean,return_stderr,normalized_return\n1,5.5,0.5,\n")
    result = conclude(folder, config, Outcome(130), START)
    assert result["status"] == "interrupted"
    assert (result["iterations"], result["env_steps"], result["wall_seconds"]) == (2, 200, 5.0)
    assert (result["return_mean"], result["return_stderr"]) == (5.5, 0.5)
    assert "normalized_return" not in result


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"iteration": 1}\n'])
def test_a_run_that_did_not_come_far_tells_nothing_of_it(config: Config, text: str) -> None:
    folder = run_folder.create(config)
    (folder / "log.jsonl").write_text(text)
    assert "iterations" not in conclude(folder, config, Outcome(1, "died"), START)
