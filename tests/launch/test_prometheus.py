"""What the endpoints answer is what Prometheus accepts (needs promtool, from Debian's package `prometheus`)."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request

import pytest

from bm3il.actors.metrics import ActorMetrics, EvaluatorMetrics
from bm3il.launch.config import Config
from bm3il.launch.processes.metrics import RunMetrics, SupervisorMetrics
from bm3il.learner.metrics import ChunkMetrics, LearnerMetrics
from bm3il.protocol.messages import Sender
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.metrics import RewardServerMetrics

PARTS = {
    "actor": [ActorMetrics],
    "evaluator": [EvaluatorMetrics],
    "learner": [LearnerMetrics, ChunkMetrics],
    "reward-server": [RewardServerMetrics],
    "supervisor": [SupervisorMetrics, lambda registry: RunMetrics(registry, Config())],
}


@pytest.mark.parametrize("role", PARTS)
def test_promtool_accepts_every_endpoint(role: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    telemetry = Telemetry(role, 0, Sender("run", f"{role}-0"))
    for part in PARTS[role]:
        part(telemetry.registry)
    with telemetry.stage("collect"):
        telemetry.count_drop("header")
    with urllib.request.urlopen(f"http://{telemetry.metrics_address}/metrics", timeout=5) as answer:
        text = answer.read()
    telemetry.close()
    assert f"bm3il_{role.replace('-', '_')}_".encode() in text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr.decode() + checked.stdout.decode()
