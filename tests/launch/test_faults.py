"""Real processes, real signals: a lockstep run ends with the policy that its seed determines, whatever is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

DEADLINE_SECONDS = 140.0
"""Of runs of a quarter of a minute on an idle machine: only a hang, or cores that are overrun, take so long."""
SMALL = [
    *("--preset", "rover_tower_4", "--environment", "rover_tower?pairs=2", "--demonstrations", "rover_tower_4"),
    *("--seed", "3", "--steps", "2000", "--actor.steps-per-iteration", "100", "--actor.hidden", "16"),
    *("--learner.hidden", "16", "--learner.heads", "2", "--learner.updates", "4", "--learner.batch-size", "64"),
    *("--learner.clipped.epochs", "2", "--learner.clipped.parts", "4"),
    *("--learner.checkpoint-interval", "5", "--reward.hidden", "16", "--reward.updates", "2"),
    *("--reward.batch-size", "64", "--reward.particles", "2", "--evaluation.interval", "10"),
    *("--evaluation.episodes", "20", "--evaluation.final-episodes", "20"),
]
CLIPPED = [
    *("--learner.policy", "clipped", "--learner.start", "cloned", "--learner.clipped.clone-weight", "0.05"),
    *("--learner.clipped.critic-first", "2"),
    *("--cloning.iterations", "3", "--cloning.updates", "5", "--cloning.batch-size", "32", "--actor.babbling", "2"),
    *(
        "--reward.memory",
        "run",
        "--reward.window-steps",
        "500",
        "--reward.imagined",
        "0.25",
        "--reward.sees",
        "purpose",
    ),
]
REPLAYED = ["--learner.policy", "actor"]
FAMILIES = {"replayed": REPLAYED, "clipped": CLIPPED}
"""What an iteration learns from: rows of a replay, or fresh episodes from the clone on."""


def start(folder: Path, run: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", run, *SMALL, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result_of(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / run / "result.json").read_text())


def finished(folder: Path, run: str, *options: str, deadline_seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
    """The result of a run that nobody disturbs."""
    process = start(folder, run, *options)
    try:
        output, _ = process.communicate(timeout=deadline_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output
    return result_of(folder, run)


def iterations(folder: Path, run: str) -> int:
    log = folder / "runs" / run / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        assert process.poll() is None, f"the run ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.02)
    return value


def worker(process: subprocess.Popen[str], role: str) -> psutil.Process | None:
    """The process of this role below a run's command."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        works = "bm3il.launch.processes.worker" in command and "bm3il.launch.processes.lifeline" not in command
        if works and role in command and child.status() != psutil.STATUS_ZOMBIE:
            return child
    return None


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module", params=["replayed", pytest.param("clipped", marks=pytest.mark.processes)])
def family(request: pytest.FixtureRequest) -> list[str]:
    """Options of a kind of run. Those of one kind follow each other, so that each undisturbed run is played once."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, family: list[str]) -> dict[str, Any]:
    return finished(tmp_path_factory.mktemp("undisturbed"), "run", "--mode", "serial", *family)


def test_processes_compute_what_one_process_computes(
    tmp_path: Path, family: list[str], undisturbed: dict[str, Any]
) -> None:
    result = finished(tmp_path, "run", *family)
    assert result["policy_sha256"] == undisturbed["policy_sha256"]
    assert result["return_mean"] == undisturbed["return_mean"]


@pytest.mark.processes
@pytest.mark.parametrize("role", ["actor", "reward-server", "learner", "evaluator"])
def test_a_killed_process_leaves_no_trace_in_the_policy(
    tmp_path: Path, family: list[str], undisturbed: dict[str, Any], role: str
) -> None:
    process = start(tmp_path, "run", *family)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    victim = wait_for(lambda: worker(process, role), process)
    victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert ("\nlearner-0 goes on from the checkpoint of iteration " in output) == (role in ("learner", "reward-server"))
    result = result_of(tmp_path, "run")
    assert result["status"] == "finished"
    assert result["policy_sha256"] == undisturbed["policy_sha256"]


@pytest.mark.processes
def test_an_interrupted_run_resumes_to_the_same_policy(
    tmp_path: Path, family: list[str], undisturbed: dict[str, Any]
) -> None:
    process = start(tmp_path, "run", *family)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    processes, asked = descendants(process), time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, output
    assert time.monotonic() - asked < 10
    assert result_of(tmp_path, "run")["status"] == "interrupted"
    assert not alive(processes)
    resume = [sys.executable, "-m", "bm3il.launch.cli", "resume", "runs/run"]
    resumed = subprocess.run(resume, cwd=tmp_path, timeout=DEADLINE_SECONDS, check=False)
    assert resumed.returncode == 0
    assert result_of(tmp_path, "run")["policy_sha256"] == undisturbed["policy_sha256"]


@pytest.mark.processes
def test_a_killed_supervisor_leaves_no_orphan_and_resume_gives_the_same_policy(
    tmp_path: Path, family: list[str], undisturbed: dict[str, Any]
) -> None:
    process = start(tmp_path, "run", *family)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    processes = descendants(process)
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    deadline = time.monotonic() + 10
    while alive(processes):
        assert time.monotonic() < deadline, f"orphans: {alive(processes)}"
        time.sleep(0.1)
    resume = [sys.executable, "-m", "bm3il.launch.cli", "resume", "runs/run"]
    resumed = subprocess.run(resume, cwd=tmp_path, timeout=DEADLINE_SECONDS, check=False)
    assert resumed.returncode == 0
    assert result_of(tmp_path, "run")["policy_sha256"] == undisturbed["policy_sha256"]


@pytest.mark.processes
@pytest.mark.parametrize("role", ["actor", "reward-server", "learner", "evaluator"])
def test_an_async_run_outlives_any_process(tmp_path: Path, family: list[str], role: str) -> None:
    process = start(tmp_path, "run", "--mode", "async", "--actors", "2", *family)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    victim = wait_for(lambda: worker(process, role), process)
    victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    result = result_of(tmp_path, "run")
    assert (result["status"], result["iterations"], result["env_steps"]) == ("finished", 20, 2000)
