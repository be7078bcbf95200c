"""What a supervisor tells Prometheus."""

from __future__ import annotations

import shutil
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge


class SupervisorMetrics:
    """`bm3il_supervisor_*`."""

    def __init__(self, registry: CollectorRegistry, run_folder: Path = Path()) -> None:
        self.restarts = Counter(
            "bm3il_supervisor_restarts", "Restarts of a process after a crash", ["process"], registry=registry
        )
        free = Gauge("bm3il_supervisor_disk_free_bytes", "Bytes left on the disk of the run folder", registry=registry)
        free.set_function(lambda: shutil.disk_usage(run_folder).free)
        self.processes = Gauge("bm3il_supervisor_processes", "Processes of this node that are alive", registry=registry)
