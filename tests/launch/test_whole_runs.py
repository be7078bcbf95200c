"""Whole runs whose outcome does not hang on seconds: over many nodes, and with iterations that are long."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.test_faults import (
    DEADLINE_SECONDS,
    FAMILIES,
    REPLAYED,
    finished,
    iterations,
    result_of,
    start,
    wait_for,
)

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_nodes_compute_what_one_computes(tmp_path: Path, family: str) -> None:
    hashes = set()
    for run, nodes in (("one", "1"), ("eight", "8")):
        process = start(tmp_path, run, "--nodes", nodes, "--actors", "4", "--steps", "1200", *FAMILIES[family])
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, output
        hashes.add(result_of(tmp_path, run)["policy_sha256"])
        if nodes == "8":
            assert all(f"node {number} " in output for number in range(8))
    assert len(hashes) == 1


@pytest.mark.timeout(600)  # three runs, of half a minute each where nothing else is at work
@pytest.mark.timeout(600)  # six iterations, each of ten seconds and, where other tests run beside it, of forty
def test_a_run_of_long_iterations_is_interrupted_after_one(tmp_path: Path) -> None:
    """Longer than the least patience: a learner is waited for as long as its iterations take."""
    long = [*REPLAYED, "--learner.updates", "1000", "--steps", "300"]
    wanted = finished(tmp_path, "undisturbed", "--mode", "serial", *long, deadline_seconds=200)
    process = start(tmp_path, "run", *long)
    wait_for(lambda: iterations(tmp_path, "run") >= 1, process)
    time.sleep(0.7)  # the next one has begun
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert result_of(tmp_path, "run")["iterations"] == 2
    assert (tmp_path / "runs" / "run" / "curve.png").exists()
    resume = [sys.executable, "-m", "bm3il.launch.cli", "resume", "runs/run"]
    assert subprocess.run(resume, cwd=tmp_path, timeout=200, check=False).returncode == 0
    assert result_of(tmp_path, "run")["policy_sha256"] == wanted["policy_sha256"]
    seconds = [json.loads(line)["wall_seconds"] for line in (tmp_path / "runs/run/log.jsonl").read_text().splitlines()]
    assert seconds[1] - seconds[0] > 7, "the iterations were too short to show anything"
