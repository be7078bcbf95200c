"""Runs of real processes whose simulators are programs of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch.test_faults import result_of

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.processes,
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on the PATH"),
]

QUEUES = Path(__file__).parents[1] / "protocol" / "adapters" / "queues.js"
SMALL = [
    *("--algorithm", "maac", "--seed", "3", "--steps", "1200", "--actor.steps-per-iteration", "160"),
    *("--actor.hidden", "16", "--learner.hidden", "16", "--learner.heads", "2", "--learner.updates", "4"),
    *("--learner.batch-size", "64", "--learner.start", "random", "--evaluation.starts", "fresh"),
    *("--evaluation.episodes", "10", "--evaluation.final-episodes", "10", "--actors", "2"),
]


def played(folder: Path, run: str, *options: str, simulator: str = "") -> subprocess.CompletedProcess[str]:
    environment = f"remote:node queues.js{simulator}"
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", run, "--environment", environment, *SMALL]
    return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the simulator in it."""
    shutil.copy(QUEUES, tmp_path)
    return tmp_path


def test_an_actor_whose_simulator_has_ended_goes_on_with_a_new_one(folder: Path) -> None:
    undisturbed = played(folder, "quiet", "--mode", "serial")
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    (folder / "fault").mkdir()
    ended = played(folder, "loud", simulator=" --fault exit@20 --once fault")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not (folder / "fault").exists()
    logs = "".join(path.read_text() for path in (folder / "runs" / "loud" / "logs").iterdir())
    assert "but ended with code 3; its last words: the queue is on fire | good bye" in logs
    assert result_of(folder, "loud")["policy_sha256"] == result_of(folder, "quiet")["policy_sha256"]
    assert result_of(folder, "loud")["environment"].startswith(f"remote:node {folder}/queues.js")
    assert not simulators(folder)


def test_a_run_whose_simulator_always_ends_says_so(folder: Path) -> None:
    ended = played(folder, "lost", simulator=" --fault exit@20")
    assert ended.returncode == 1
    assert "its last words: the queue is on fire | good bye" in ended.stderr
    assert result_of(folder, "lost")["status"] == "failed"
    assert not simulators(folder)


def simulators(folder: Path) -> list[psutil.Process]:
    """Those of a folder that are left."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if f"{folder}/queues.js" in (process.info["cmdline"] or ())]
