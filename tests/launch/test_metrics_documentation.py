"""`docs/metrics.md` and what the processes export are the same list."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from bm3il.actors.metrics import ActorMetrics, EvaluatorMetrics
from bm3il.launch.config import Config
from bm3il.launch.processes.metrics import RunMetrics, SupervisorMetrics
from bm3il.learner.metrics import ChunkMetrics, LearnerMetrics, RewardMetrics
from bm3il.protocol.messages import Sender
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.metrics import RewardServerMetrics

ROLES = {
    "actor": [ActorMetrics],
    "evaluator": [EvaluatorMetrics],
    "learner": [LearnerMetrics, ChunkMetrics, RewardMetrics],
    "reward-server": [RewardServerMetrics],
    "supervisor": [SupervisorMetrics, lambda registry: RunMetrics(registry, Config())],
}
ROW = re.compile(r"^\| `(bm3il_\S+)` \| (\w+) \| (?:`([\w,]+)`)? ?\|", re.M)


def documented() -> set[tuple[str, str, str]]:
    """(name, kind, label) of every row, `<role>` filled in."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = set()
    for name, kind, label in ROW.findall(text):
        for role in ROLES if "<role>" in name else ("",):
            rows.add((name.replace("<role>", role.replace("-", "_")), kind, label))
    return rows


def exported(registry: CollectorRegistry) -> set[tuple[str, str, str]]:
    """The same of what is registered; a label has no sample yet, so it is read from the metric itself."""
    rows = set()
    for metric in {id(m): m for m in registry._collector_to_names}.values():
        (family,) = metric.describe() if hasattr(metric, "describe") else metric.collect()
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.add((name, family.type, ",".join(metric._labelnames)))
    return rows


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    found = set()
    for role, metrics in ROLES.items():
        telemetry = Telemetry(role, 0, Sender("run", f"{role}-0"))
        for part in metrics:
            part(telemetry.registry)
        found |= exported(telemetry.registry)
        telemetry.close()
    assert found == documented()
