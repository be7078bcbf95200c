from __future__ import annotations

import errno
import json
import platform
import shutil
import socket
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bm3il.launch import provenance, run, run_folder
from bm3il.launch.config import Config, load_preset
from bm3il.launch.events import EventLog
from bm3il.launch.outcome import Outcome, attempt
from bm3il.protocol.errors import DeadlineError, InputError, NumericalError

START = run_folder.Start("r", 0.0)


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


def test_a_folder_that_is_no_run_yet_is_not_in_the_way(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed while it is made leaves nothing that a study or a run of this name would trip over."""
    folder, seen = Path(config.runs_folder, config.run), []
    write = run_folder.write_atomically

    def look(path: Path, text: str) -> None:
        write(path, text)
        seen.append(folder.exists())

    monkeypatch.setattr(run_folder, "write_atomically", look)
    run_folder.create(config)
    assert seen == [False]
    assert [path.name for path in folder.parent.iterdir()] == [config.run]


def test_of_two_that_make_one_folder_the_first_has_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.runs_folder, config.run)
    write = run_folder.write_atomically

    def overtaken(path: Path, text: str) -> None:
        folder.mkdir()
        (folder / "config.yaml").write_text("another's")
        write(path, text)

    monkeypatch.setattr(run_folder, "write_atomically", overtaken)
    with pytest.raises(run_folder.RunExistsError):
        run_folder.create(config)
    assert (folder / "config.yaml").read_text() == "another's"
    assert [path.name for path in folder.parent.iterdir()] == [config.run], "nothing hidden is left"


def test_a_run_that_ended_at_its_start_does_not_keep_its_name(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "logs").mkdir()
    (folder / "checkpoints" / "00000000").mkdir(parents=True)
    run_folder.conclude(folder, config, Outcome(2, "no such thing"), START)
    assert run_folder.open_existing(run_folder.create(replace(config, seed=5))).seed == 5
    assert not (folder / "result.json").exists()
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("worth", ["log.jsonl", "checkpoints/00000010/checkpoint.json", "notes.txt"])
def test_what_is_worth_keeping_stays(config: Config, worth: str) -> None:
    folder = run_folder.create(config)
    (folder / worth).parent.mkdir(parents=True, exist_ok=True)
    (folder / worth).write_text("something")
    with pytest.raises(InputError, match="exists; take another --run, or `bm3il resume"):
        run_folder.create(config)
    assert (folder / worth).exists()


def test_a_run_that_has_just_begun_stays(config: Config) -> None:
    folder = run_folder.create(config)
    with run_folder.locked(folder), pytest.raises(InputError, match="exists"):
        run_folder.create(config)
    assert run_folder.open_existing(folder) == config


def test_a_result_says_by_what_it_was_made(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder.create(config)
    result = run_folder.conclude(folder, config, Outcome(0), START)
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
    before = run_folder.conclude(folder, config, Outcome(0), START)
    (folder / "log.jsonl").write_text('{"iteration": 2, "env_steps": 200, "wall_seconds": 1}\n')
    again = run_folder.Start("again", 1.0)
    failed = run_folder.conclude(folder, config, Outcome(2, "refused"), again, before)
    assert (failed["status"], failed["error"]) == ("failed", "refused")
    assert run_folder.read_result(folder) == before
    assert not run_folder.concluded(folder, "again")
    (folder / "log.jsonl").write_text('{"iteration": 3, "env_steps": 300, "wall_seconds": 1}\n')
    run_folder.conclude(folder, config, Outcome(130), again, before)
    result = run_folder.concluded(folder, "again")
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
        patched.setattr(run_folder, "write_whole", full)
        told = run_folder.conclude(folder, config, outcome, START)
    assert "cannot write" in caplog.text
    result = run_folder.read_result(folder)
    known = ("status", "exit_code", "error", "iterations", "resume")
    assert [result[name] for name in known] == [told[name] for name in known]
    assert (result["status"], result["error"]) == ("failed", outcome.text)
    EventLog(folder, "supervisor-0").start(config, resumed=True)
    assert run_folder.read_result(folder) == {}, "it was started again, and killed"
    EventLog(folder, "supervisor-0").end(Outcome(0))
    assert run_folder.read_result(folder) == {}, "who has removed the result of a finished run does not want it"


def test_an_interrupted_run_tells_how_to_go_on(config: Config) -> None:
    config = replace(config, run="my run")
    folder = run_folder.create(config)
    result = run_folder.conclude(folder, config, Outcome(130), START)
    assert result["resume"] == f"bm3il resume '{folder}'"
    assert "resume" not in run_folder.conclude(folder, config, Outcome(2, "bad"), START)
    assert "resume" not in run_folder.conclude(folder, config, Outcome(0), START)


def test_two_launchers_cannot_have_one_run(config: Config) -> None:
    folder = run_folder.create(config)
    assert not run_folder.is_running(folder)
    assert not (folder / ".lock").exists(), "who only looks leaves nothing behind"
    with run_folder.locked(folder):
        assert run_folder.is_running(folder)
        with pytest.raises(InputError, match="being run by another process"), run_folder.locked(folder):
            pass
    assert not run_folder.is_running(folder)


@pytest.mark.parametrize("name", [".a", "a/b", "a\0", "a\n#SBATCH --account=b", "a\tb", "a\x1b[31m"])
def test_a_name_is_one_plain_word_of_a_path(config: Config, name: str) -> None:
    with pytest.raises(InputError, match="plain folder name") as error:
        run_folder.named(replace(config, run=name))
    assert str(error.value).isprintable()


def test_names_tell_the_runs_apart(config: Config) -> None:
    assert run_folder.named(config).run == "mine"
    assert run_folder.named(replace(config, run="", seed=3)).run.startswith("rover_tower_8-bm3il-seed3-2")


def test_the_conclusion_completes_the_result(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "result.json").write_text(json.dumps({"run_id": "r", "env_steps": 5, "status": "interrupted"}))
    run_folder.conclude(folder, config, Outcome(1, "actor-0 died"), START)
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["error"]) == ("failed", 1, "actor-0 died")
    assert (result["env_steps"], result["mode"], result["algorithm"]) == (5, "lockstep", "bm3il")
    run_folder.conclude(folder, config, Outcome(0), START)
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
    result = run_folder.conclude(folder, config, Outcome(130), START)
    assert result["status"] == "interrupted"
    assert (result["iterations"], result["env_steps"], result["wall_seconds"]) == (2, 200, 5.0)
    assert (result["return_mean"], result["return_stderr"]) == (5.5, 0.5)
    assert "normalized_return" not in result


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"iteration": 1}\n'])
def test_a_run_that_did_not_come_far_tells_nothing_of_it(config: Config, text: str) -> None:
    folder = run_folder.create(config)
    (folder / "log.jsonl").write_text(text)
    assert "iterations" not in run_folder.conclude(folder, config, Outcome(1, "died"), START)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("bad"), 2, "bad"),
        (NumericalError("critic loss"), 3, "critic loss"),
        (DeadlineError("no chunk"), 4, "no chunk"),
        (OSError(28, "No space left on device", "x.csv"), 2, "cannot write x.csv: No space left on device"),
        (OSError(28, "No space left on device"), 2, "cannot write to the run folder: No space left on device"),
    ],
)
def test_errors_that_a_restart_cannot_cure_become_an_outcome(error: Exception, code: int, text: str) -> None:
    def work() -> str:
        raise error

    outcome = attempt(work)
    assert outcome.code == code
    assert outcome.text == text
    assert outcome.status == "failed"


def test_other_errors_are_crashes() -> None:
    def work() -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        attempt(work)
    assert attempt(lambda: "interrupted") == Outcome(130)
    assert attempt(lambda: None) == Outcome(0)


@pytest.mark.parametrize(("status", "looked_for"), [("finished", False), ("interrupted", False), ("failed", True)])
def test_prometheus_looks_for_a_run_until_it_has_ended_well(tmp_path: Path, status: str, looked_for: bool) -> None:
    run, link = tmp_path / "mine", tmp_path / ".targets" / "mine.json"
    run.mkdir()
    (run / "targets.json").write_text("[]")
    for _ in range(2):  # a resume is looked for again
        with run_folder.announced(run):
            assert link.read_text() == "[]"
            (run / "result.json").write_text(json.dumps({"status": status}))
        assert link.is_symlink() == looked_for


def test_a_refused_budget_leaves_the_old_one(config: Config) -> None:
    folder = run_folder.create(config)

    def refused() -> None:
        with run_folder.rewritten(folder, config, replace(config, steps=7)):
            assert run_folder.read_config(folder).steps == 7
            raise InputError("no")

    with pytest.raises(InputError, match="no"):
        refused()
    assert run_folder.read_config(folder) == config
    assert not list(folder.glob("config-*"))
