"""What a supervisor tells Prometheus."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from bm3il.launch.config import Config
from bm3il.launch.processes import states
from bm3il.protocol.version import version


class SupervisorMetrics:
    """`bm3il_supervisor_*`."""

    def __init__(self, registry: CollectorRegistry, run_folder: Path = Path()) -> None:
        self._restarts = Counter(
            "bm3il_supervisor_restarts", "Restarts of a process after a crash", ["process"], registry=registry
        )
        free = Gauge("bm3il_supervisor_disk_free_bytes", "Bytes left on the disk of the run folder", registry=registry)
        free.set_function(lambda: shutil.disk_usage(run_folder).free)
        self.processes = Gauge("bm3il_supervisor_processes", "Processes of this node that are alive", registry=registry)

    def started(self, process: str) -> None:
        """A process of this node is there: Prometheus sees no increase of a counter that begins at 1."""
        self._restarts.labels(process)

    def restarted(self, process: str) -> None:
        """It has crashed, and is started again."""
        self._restarts.labels(process).inc()


class RunMetrics:
    """What the first node's supervisor knows of the whole run."""

    def __init__(self, registry: CollectorRegistry, config: Config) -> None:
        facts = {
            "run": config.run,
            "algorithm": config.algorithm,
            "environment": config.environment,
            "seed": str(config.seed),
            "version": version(),
        }
        info = Gauge("bm3il_run_info", "1; what the run is, in its labels", [*facts], registry=registry)
        info.labels(**facts).set(1)
        self._states = Gauge(
            "bm3il_supervisor_process_state",
            "1 for the state that a process of the run is in, 0 for the others (of the first node's supervisor)",
            ["process", "state"],
            registry=registry,
        )
        self._known: set[str] = set()

    def show(self, found: Mapping[str, states.State]) -> None:
        """The states of all processes that there are."""
        # An actor that had joined and left would keep its last state in Prometheus.
        for gone in self._known - found.keys():
            for name in states.NAMES:
                self._states.remove(gone, name)
        self._known = set(found)
        for process, state in found.items():
            for name in states.NAMES:
                self._states.labels(process, name).set(name == state.name)
