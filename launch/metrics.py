"""What a supervisor tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class SupervisorMetrics:
    """`bm3il_supervisor_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.restarts = Counter(
            "bm3il_supervisor_restarts", "Restarts of a process after a crash", ["process"], registry=registry
        )
        self.processes = Gauge("bm3il_supervisor_processes", "Processes of this node that are alive", registry=registry)
