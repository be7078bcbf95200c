"""Studies: runs from a grid, refusals, what is written down, and what goes on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from bm3il.launch.cli import main
from bm3il.launch.config import load_preset
from bm3il.launch.result import read_result
from bm3il.launch.studies import pool
from bm3il.launch.studies.file import Study, in_world
from bm3il.launch.studies.study import threads_of
from bm3il.launch.surroundings import module_command
from bm3il.protocol.errors import InputError

TINY = {
    "preset": "rover_tower_4",
    "demonstration_episodes": 2,
    "actor": {"hidden": [16], "steps_per_iteration": 50},
    "learner": {"hidden": 16, "clipped": {"epochs": 1, "parts": 2}, "checkpoint_interval": 5},
    "cloning": {"iterations": 1, "updates": 2},
    "reward": {"hidden": [16], "updates": 1, "batch-size": 8, "window-steps": 100},
    "evaluation": {"starts": "fresh", "episodes": 1, "final_episodes": 2},
}
ITERATIONS = 40
STEPS = 50 * ITERATIONS


def written(folder: Path, **values: object) -> Path:
    """The file of a study."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"settings": TINY | {"steps": STEPS}, **values}, sort_keys=False))
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        Study.read(path).trials(path.parent)
    return str(error.value)


def study(path: Path, *args: str) -> int:
    return main(["study", str(path), "--runs-folder", str(path.parent), "--jobs", "1", *args])


def told(path: Path) -> list[dict[str, Any]]:
    """The runs of `study.json`."""
    record = json.loads((path.parent / "tiny" / "study.json").read_text())
    assert (record["version"], record["name"]) == (1, "tiny")
    return record["runs"]  # type: ignore[no-any-return]


def states(path: Path) -> list[str]:
    return [run["status"] for run in told(path)]


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C and SIGTERM mean after a test what they meant before, and nobody waits for long."""
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    grid = {"algorithm": ["bc", "bm3il"], "actor.hidden": [[64, 64], [16]]}
    path = written(tmp_path, grid=grid, seeds=[1, 2], worlds=["slip=0.1"])
    trials = Study.read(path).trials(tmp_path / "tiny")
    assert [trial.name for trial in trials[:2]] == [
        "bc_hidden-64-64_seed-1",
        "bc_hidden-16_seed-1",
    ]
    assert [trial.seed for trial in trials] == [1] * 4 + [2] * 4
    last = trials[-1]
    assert last.settings == {"algorithm": "bm3il", "actor.hidden": [16]}
    config = last.config
    assert (config.algorithm, config.actor.hidden, config.seed, config.steps) == ("bm3il", (16,), 2, STEPS)
    assert (config.mode, config.run, config.runs_folder) == ("serial", last.name, str(tmp_path / "tiny"))
    assert config.reward.batch_size == 8  # nested, and with a hyphen
    assert config.learner.policy == load_preset("rover_tower_4").learner.policy == "clipped"  # the preset's stays


def test_grids_follow_each_other_and_equal_runs_are_one(tmp_path: Path) -> None:
    grids = [{"algorithm": ["bc", "bm3il"]}, {"algorithm": ["bm3il"]}, {"algorithm": ["bm3il"], "steps": [100]}]
    trials = Study.read(written(tmp_path, grid=grids)).trials(tmp_path)
    assert [trial.name for trial in trials] == [
        *("bc_seed-0", "bm3il_seed-0", "bm3il_steps-100_seed-0"),
    ]


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"sedes": [1]}, "tiny.yaml: unknown key 'sedes'; did you mean seeds"),
        ({"grid": {"learner.bach_size": [1]}}, "unknown key 'learner.bach_size'; did you mean learner.batch_size"),
        ({"grid": {"lerner.batch_size": [1]}}, "unknown key 'lerner'; did you mean learner"),
        ({"grid": {"steps.many": [1]}}, "'steps.many' cannot be set: steps holds no other keys"),
        ({"grid": {"algorithm": ["bm3li"]}}, "algorithm=bm3li: unknown algorithm 'bm3li'; did you mean bm3il"),
        ({"grid": {"preset": ["rover_towr_4"]}}, "unknown preset 'rover_towr_4'; did you mean rover_tower_4"),
        ({"grid": {"algorithm": "bc"}}, "grid: algorithm must be a list, got 'bc'"),
        ({"grid": []}, "grid has no values"),
        ({"grid": {"algorithm": []}}, "grid: algorithm has no values"),
        ({"grid": {"steps": ["many"]}}, "steps must be"),
        ({"grid": {"seed": [1, 2]}}, "'seed' is the study's own: say it by seeds"),
        ({"seeds": 3}, "seeds must be a list, got 3"),
        ({"seeds": [-1]}, "seeds must be a list of whole numbers from 0 on, got [-1]"),
        ({"episodes": 0}, "episodes must be a whole number, at least 1, got 0"),
        ({"name": "x" * 300}, "name must be a plain folder name"),
        ({"name": "../up"}, "name must be a plain folder name, got '../up'"),
        ({"worlds": ["rover_tower?pairs=4"]}, "does not fit the world 'rover_tower?pairs=4'"),
        ({"worlds": ["slipp=0.1"]}, "unknown option of environment rover_tower 'slipp'; did you mean slip"),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_the_nearest(
    tmp_path: Path, values: dict[str, object], answer: str
) -> None:
    path = written(tmp_path, **values)
    line = refused(path)
    assert answer in line
    assert line.startswith(str(path))
    assert "\n" not in line


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    assert "cannot read the study" in refused(path)
    path.write_text("grid: [")
    assert f"{path} is not YAML: line 1, column 8" in refused(path)
    path.write_text("")
    assert "must hold keys and values, got None" in refused(path)


def test_a_world_of_options_alone_changes_the_run_s_own() -> None:
    assert in_world("rover_tower?pairs=2", "slip=0.1") == "rover_tower?pairs=2&slip=0.1"
    assert in_world("rover_tower", "slip=0.1&x=y") == "rover_tower?slip=0.1&x=y"
    assert in_world("berlin?closed=22&types=1", "closed=36") == "berlin?closed=36&types=1"
    assert in_world("rover_tower", "rover_tower?pairs=2") == "rover_tower?pairs=2"
    assert in_world("berlin?closed=22&types=1", "own") == "berlin?closed=22&types=1"


def test_a_dry_run_prints_the_runs_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, grid={"algorithm": ["bc", "bm3il"]}, seeds=[1, 2])
    assert study(path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("waiting") == 4
    assert "bm3il_seed-2" in said
    assert list(tmp_path.iterdir()) == [path]
    assert study(path, "--dry-run", "--jobs", "0") == 2


def test_a_changed_file_is_refused_unless_it_has_more_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"algorithm": ["bm3il"], "steps": [100]}
    kept = written(tmp_path, grid=grid, seeds=[1], worlds=["slip=0.1"])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.yaml").write_text(kept.read_text())
    more: dict[str, Any] = {"grid": grid | {"steps": [50, 100]}, "seeds": [2, 1], "worlds": ["slip=0.2", "slip=0.1"]}
    assert study(written(tmp_path, **more), "--dry-run") == 0
    assert study(written(tmp_path, **more | {"grid": [more["grid"], {"mode": ["serial"]}]}), "--dry-run") == 0
    capsys.readouterr()
    fewer = more | {"seeds": [2], "episodes": 7, "grid": {"algorithm": ["bm3il"], "reward.particles": [2]}}
    assert study(written(tmp_path, settings=TINY | {"steps": 7}, **fewer), "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is not the study that {tmp_path / 'tiny'} holds: steps, steps, reward.particles, seeds, episodes" in line


def test_a_run_takes_the_threads_of_its_processes() -> None:
    config = load_preset("rover_tower_4")
    assert threads_of(replace(config, mode="serial", threads=3).checked()) == 3
    assert threads_of(replace(config, threads=2, actors=2).checked()) == 10


def once(true: Callable[[], bool], do: Callable[[], None]) -> None:
    """Do something as soon as something is true."""

    def wait() -> None:
        while not true():
            time.sleep(0.01)
        do()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.processes
@pytest.mark.timeout(300)  # six starts of processes
def test_a_study_that_was_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, grid={"algorithm": ["bc", "bm3il"]}, worlds=["slip=0.1"], episodes=3)
    clone, imitator = (tmp_path / "tiny" / f"{name}_seed-0" for name in ("bc", "bm3il"))
    command = module_command("bm3il.launch.cli", "study", str(path), "--runs-folder", str(tmp_path), "--jobs", "1")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (imitator / "checkpoints" / "00000005").exists():
        assert first.poll() is None
        time.sleep(0.01)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    assert states(path) == ["finished", "running"]
    logged, log = (imitator / "log.jsonl").read_text(), (clone / "run.log").read_text()
    begun = logged.splitlines()[0]
    once(lambda: (imitator / "log.jsonl").read_text() != logged, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert study(path) == 130
    assert states(path) == ["finished", "interrupted"]
    assert study(path) == 0
    assert states(path) == ["finished", "finished"]
    assert read_result(imitator)["iterations"] == ITERATIONS
    assert (imitator / "log.jsonl").read_text().splitlines()[0] == begun  # it went on, and did not begin anew
    assert (clone / "run.log").read_text() == log
    evaluations = told(path)[1]["evaluations"]
    assert list(evaluations) == ["as trained", "slip=0.1"]
    assert evaluations["as trained"]["return_mean"] == read_result(imitator)["return_mean"]
    assert (evaluations["slip=0.1"]["episodes"], evaluations["as trained"]["episodes"]) == (3, 2)
    assert evaluations["slip=0.1"]["environment"] == "rover_tower?pairs=2&slip=0.1"

    assert study(written(tmp_path, grid={"algorithm": ["bc", "bm3il"]}, worlds=["slip=0.1", "slip=0"], episodes=3)) == 0
    again = told(path)[1]["evaluations"]
    assert list(again) == ["as trained", "slip=0.1", "slip=0"]
    assert again["slip=0.1"] == evaluations["slip=0.1"]
    assert (imitator / "log.jsonl").read_text().splitlines()[0] == begun
    assert main(["compare", str(tmp_path / "tiny")]) == 0


@pytest.mark.processes
@pytest.mark.timeout(300)  # three starts of processes
def test_a_run_that_fails_ends_no_study_and_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, grid={"algorithm": ["bm3il", "bc"]})
    imitator = tmp_path / "tiny" / "bm3il_seed-0"

    def kill() -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()

    once((imitator / "checkpoints" / "00000005").exists, kill)
    assert study(path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"bm3il: {imitator.name} failed: was killed by SIGKILL; log: {imitator / 'run.log'}"
    assert [(run["status"], run["reason"]) for run in told(path)] == [
        *(("failed", "was killed by SIGKILL"), ("finished", ""))
    ]
    begun = (imitator / "log.jsonl").read_text().splitlines()[0]
    assert study(path) == 0
    assert states(path) == ["finished", "finished"]
    assert (imitator / "log.jsonl").read_text().splitlines()[0] == begun
