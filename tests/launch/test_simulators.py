"""Simulators that fail, in runs of real processes: their actor is started again, and the policy is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.faulty import installed
from tests.launch.test_faults import DEADLINE_SECONDS, REPLAYED, SMALL, finished, result_of

pytestmark = pytest.mark.processes

FAULTS = {
    "40.timeout": "environment 'faulty?faults={}' raised TimeoutError: timed out",
    "70.disk": "environment 'faulty?faults={}' raised OSError: [Errno 28] No space left on device",
    "110.nan": "an observation is not finite",
    "90.hang": "environment 'faulty?faults={}' has not come back from 'step' for 3 s",
    "30.exit": "ended with code 0",
    "20.child": "was killed by SIGABRT",
}


def played(folder: Path, *options: str, seconds: float = DEADLINE_SECONDS) -> subprocess.CompletedProcess[str]:
    faults = folder / "faults"
    environment = f"faulty?faults={faults}"
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", "run", *SMALL, *REPLAYED]
    command += ["--environment", environment, "--actor.step-seconds", "3", *options]
    return subprocess.run(
        command, cwd=folder, env=installed(folder), capture_output=True, text=True, check=False, timeout=seconds
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = finished(tmp_path_factory.mktemp("undisturbed"), "run", "--mode", "serial", *REPLAYED)
    return str(result["policy_sha256"])


@pytest.mark.parametrize("faults", [("20.child", "40.timeout", "90.hang"), ("30.exit", "70.disk", "110.nan")])
def test_an_actor_whose_simulator_failed_is_started_again(
    tmp_path: Path, undisturbed: str, faults: tuple[str, ...]
) -> None:
    (tmp_path / "faults").mkdir()
    for name in faults:
        (tmp_path / "faults" / name).touch()
    before = set(sleepers())
    ended = played(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    log = (tmp_path / "runs" / "run" / "logs" / "actor-0.log").read_text()
    told = log + ended.stdout + ended.stderr
    for name in faults:
        assert not (tmp_path / "faults" / name).exists()
        assert FAULTS[name].format(tmp_path / "faults") in told, name
    assert result_of(tmp_path, "run")["policy_sha256"] == undisturbed
    assert (tmp_path / "faults" / "closed").exists()
    assert set(sleepers()) <= before


def test_a_run_whose_simulator_always_fails_ends_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "always.timeout").touch()
    ended = played(tmp_path)
    assert ended.returncode == 1
    assert f"environment 'faulty?faults={tmp_path / 'faults'}' raised TimeoutError" in ended.stderr
    assert result_of(tmp_path, "run")["status"] == "failed"


@pytest.mark.timeout(300)
def test_a_training_outlives_an_evaluator_whose_simulator_always_fails(tmp_path: Path) -> None:
    """Once it is complete: the result has no return, and says what to do."""
    faults = tmp_path / "faults"
    faults.mkdir()
    assert played(tmp_path, "--steps", "300").returncode == 0
    result = result_of(tmp_path, "run")
    wanted = result["policy_sha256"]
    unevaluated = json.dumps(result | {"return_mean": None})  # of a run that is complete nothing would be started
    (tmp_path / "runs" / "run" / "result.json").write_text(unevaluated)
    (faults / "evaluator.timeout").touch()
    resume = [sys.executable, "-m", "bm3il.launch.cli", "resume", "runs/run"]
    ended = subprocess.run(
        resume, cwd=tmp_path, env=installed(tmp_path), capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = result_of(tmp_path, "run")
    assert (result["status"], result["policy_sha256"], result["return_mean"]) == ("finished", wanted, None)
    assert f"`bm3il evaluate {tmp_path / 'runs' / 'run'}` does it" in ended.stdout
    assert f"environment 'faulty?faults={faults}' raised TimeoutError" in ended.stderr


def test_a_run_whose_evaluator_always_fails_ends_with_the_name_of_its_simulator(tmp_path: Path) -> None:
    """As long as it trains."""
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "evaluator.timeout").touch()
    ended = played(tmp_path, "--steps", "100000000")
    assert ended.returncode == 1
    assert f"environment 'faulty?faults={tmp_path / 'faults'}' raised TimeoutError" in ended.stderr
    assert result_of(tmp_path, "run")["status"] == "failed"


def sleepers() -> list[str]:
    """Children that simulators have started."""
    return subprocess.run(["pgrep", "-f", "^sleep 3600$"], capture_output=True, text=True, check=False).stdout.split()
