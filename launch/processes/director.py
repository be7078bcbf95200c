"""The first node's supervisor leads the run: it hears every process, and decides when and how the run ends."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bm3il.launch.events import EventLog
from bm3il.launch.outcome import CRASHED, Outcome
from bm3il.launch.processes.metrics import RunMetrics
from bm3il.launch.processes.states import SILENT_SECONDS, State, judge
from bm3il.launch.processes.supervisor import LEARNER_GRACE_SECONDS, StopRequests, Supervisor, patience
from bm3il.launch.progress import Progress
from bm3il.launch.topology import Plan
from bm3il.protocol.channels import Server
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically
from bm3il.protocol.messages import Done, Event, Sender, Status
from bm3il.protocol.specs import ArrayTable
from bm3il.protocol.telemetry import END, STOP, Telemetry

log = logging.getLogger(__name__)

PROCESSES, PROCESSES_SECONDS = "processes.json", 1.0
# A part of what AFTER_LEARNER_SECONDS keeps free.
REMOTE_GRACE_SECONDS = 2.0
LOST_NODE_SECONDS = 15.0
"""Longer than a silent process is only named, since its work is given to other nodes then."""
PAUSE_SECONDS = 5.0
"""Of this process itself, from which on it is no silence of the others: below that they are heard again in time."""
JOINED = re.compile(r"actor-\d{1,6}")
"""Names of actors that may come to an async run."""
ADDRESS = re.compile(r"[\w.:\[\]-]{1,255}:\d{1,5}")


@dataclass
class _Trouble:
    """Which one a process is in, since when, and when it was last seen in it (monotonic seconds)."""

    name: str
    began: float
    last_seen: float = 0.0


class Director:
    """Hears the heartbeats of all processes. Keeps `targets.json` for Prometheus. `say` tells people what happened."""

    def __init__(self, plan: Plan, telemetry: Telemetry, say: Callable[[str], None] = lambda line: None) -> None:
        self._plan, self._telemetry = plan, telemetry
        self._server = Server(plan.control, telemetry.sender, _schema, telemetry.count_drop)
        self._supervisors = {f"supervisor-{node}" for node in range(1, len(plan.nodes))}
        self._names = self._supervisors | {process.name for process in plan.processes}
        self._takes_more = plan.config.mode == "async"
        self._metrics = RunMetrics(telemetry.registry, plan.config)
        self.events = EventLog(Path(plan.run_folder), telemetry.sender.name, say)
        self._troubles: dict[str, _Trouble] = {}
        self._targets: dict[str, tuple[str, str, int]] = {}
        self._heard: dict[str, float] = {}
        self._starts: dict[str, set[str]] = {}
        self._looked, self._began, self._warned = 0.0, time.monotonic(), False
        self._awake = self._began
        """When it was last seen that this process is not paused."""
        self.statuses: dict[str, Status] = {}
        self.stopping = False
        """Whether everybody who is heard is told to stop."""

    def pump(self, timeout_seconds: float = 0.0) -> None:
        """Take in heartbeats, waiting up to `timeout_seconds` for the first."""
        self._forgive_pause()
        requests = self._server.poll(timeout_seconds)
        self._forgive_pause(timeout_seconds)
        for request in requests:
            name, body = request.message.sender.name, request.message.body
            if name in self._names or (self._takes_more and JOINED.fullmatch(name)):
                if isinstance(body, Event):
                    self.events.take([body])
                else:
                    self._hear(request.message.sender, body)
            # Answered last: whoever has no answer tells its event again, so none is lost before it is written down.
            self._server.answer(request, Done(STOP if self.stopping else ""))
        self.events.take(self._telemetry.events())
        self._write_targets()
        if (now := time.monotonic()) - self._looked >= PROCESSES_SECONDS:
            self._looked = now
            self._look(now)

    def _forgive_pause(self, waited_seconds: float = 0.0) -> None:
        """Take it for nobody's silence that this process could not listen: its disk stalled, or it was suspended."""
        now = time.monotonic()
        if (pause := now - self._awake - waited_seconds) > PAUSE_SECONDS:
            log.warning("could not listen for %.0f s: did the disk of %s stall?", pause, self._plan.run_folder)
            self._heard = {name: min(now, heard + pause) for name, heard in self._heard.items()}
            self._began += pause
        self._awake = now

    def _hear(self, sender: Sender, status: Status) -> None:
        name = sender.name
        if name not in self._names and name not in self.statuses:
            self.events.add("joined", f"joined from {status.metrics_address.rpartition(':')[0]}", name)
        starts = self._starts.setdefault(name, set())
        if starts and sender.incarnation not in starts:
            self.events.add(
                "back", f"is heard again, {time.monotonic() - self._heard[name]:.0f} s after its last sign", name
            )
        starts.add(sender.incarnation)
        # A rate of another process may be infinite: shown as a whole number it once raised here, and ended the run.
        numbers = {key: value for key, value in status.values.items() if math.isfinite(value)}
        self.statuses[name], self._heard[name] = replace(status, values=numbers), time.monotonic()
        if status.stage == END and name not in self._names:
            self._forget(name, "it was told to")

    def _forget(self, name: str, why: str) -> None:
        """One that had joined, and is a part of this run no more."""
        self.events.add("left", why, name)
        del self.statuses[name], self._heard[name], self._starts[name]
        self._troubles.pop(name, None)

    def _look(self, now: float) -> None:
        """At all processes, once a second: what `bm3il status`, Prometheus and the events show of them."""
        for name in [name for name in self.statuses if name not in self._names]:
            if (silent := now - self._heard[name]) > LOST_NODE_SECONDS:
                self._forget(name, f"not heard for {silent:.0f} s; it had joined")
        states = self.states()
        self._metrics.show(states)
        self._write_processes(states)
        # At the end everybody falls silent, which is no trouble.
        if not self.stopping:
            self._tell_troubles(states, now)

    def _tell_troubles(self, states: Mapping[str, State], now: float) -> None:
        """Events of who gets into trouble, and who is out of it for good: who starves again and again is told once."""
        for name, state in states.items():
            trouble = self._troubles.get(name)
            if state.troubled:
                if trouble is None or trouble.name != state.name:
                    heard = trouble is not None and trouble.name == "dead"
                    began = trouble.began if trouble else now - state.seconds
                    self._troubles[name] = trouble = _Trouble(state.name, began)
                    text = f"heard again, {now - began:.0f} s after its last sign" if heard else state.why
                    self.events.add("state", f"{state.name}: {text}", name, state=state.name)
                trouble.last_seen = now
            elif trouble is not None and now - trouble.last_seen > SILENT_SECONDS:
                del self._troubles[name]
                seconds = trouble.last_seen - trouble.began
                text = f"{state.name} again for {now - trouble.last_seen:.0f} s, after {seconds:.0f} s of trouble"
                self.events.add("state", text, name, state=state.name)

    def remote_outcome(self) -> Outcome | None:
        """How the run ended, if another node's supervisor has decided it."""
        for name in sorted(self._supervisors & set(self.statuses)):
            status = self.statuses[name]
            if "exit_code" in status.values:
                # Never 0: that a run is finished is said by the learner, and `place` keeps it on the first node.
                return Outcome(int(status.values["exit_code"]) or CRASHED, status.text)
        return None

    def worries(self) -> list[str]:
        """Processes that are not heard, or do not get on, each with its last stage."""
        return [f"{name} {state.why}" for name, state in self.states().items() if state.troubled]

    def states(self) -> dict[str, State]:
        """Of every process of the run, and of those who joined."""
        now, patience, learner = time.monotonic(), SILENT_SECONDS, self.statuses.get("learner-0")
        if not self._takes_more and learner is not None:  # in lockstep it is each one's turn once an iteration
            patience = 2 * learner.values.get("seconds_iteration", 0.0)
        patiences = dict.fromkeys(self._names | set(self.statuses), patience)
        if learner is not None and "iteration" not in learner.values:  # it loads and clones, and nobody else has work
            patiences = {name: patience if name == "learner-0" else math.inf for name in patiences}
        return {
            name: judge(self.statuses.get(name), now - self._heard.get(name, self._began), patiences[name])
            for name in sorted(patiences)
        }

    def lost_nodes(self) -> list[int]:
        """Nodes whose supervisors were heard, and are no longer; each is told once."""
        self._forgive_pause()
        now = time.monotonic()
        lost = [
            name for name in self._supervisors if name in self._heard and now - self._heard[name] > LOST_NODE_SECONDS
        ]
        self._supervisors -= set(lost)
        return sorted(int(name.rpartition("-")[2]) for name in lost)

    def wait_for_nodes(self) -> None:
        """Wait a while until the other nodes' supervisors have stopped, too."""
        deadline = time.monotonic() + REMOTE_GRACE_SECONDS
        while not self._all_ended() and time.monotonic() < deadline:
            self.pump(0.1)

    def close(self) -> None:
        self._server.close()

    def _all_ended(self) -> bool:
        return all(name in self.statuses and "ended" in self.statuses[name].values for name in self._supervisors)

    def _write_processes(self, states: Mapping[str, State]) -> None:
        """What `bm3il status` shows of each process."""
        processes = {}
        for name, state in states.items():
            status = self.statuses.get(name)
            processes[name] = {
                "node": status.node if status else None,
                "state": state.name,
                "stage": status.stage if status else "",
                "stage_seconds": round(status.values.get("stage_seconds", 0.0), 1) if status else 0.0,
                "policy_version": status.values.get("policy_version", status.values.get("iteration"))
                if status
                else None,
                "restarts": max(0, len(self._starts.get(name, ())) - 1),
            }
        self._write(PROCESSES, processes)

    def _write_targets(self) -> None:
        known = self.statuses | {self._telemetry.sender.name: self._telemetry.status()}
        targets = {
            name: (status.role, status.metrics_address, status.node)
            for name, status in sorted(known.items())
            if ADDRESS.fullmatch(status.metrics_address)
        }
        if targets != self._targets:
            self._targets = targets
            self._write("targets.json", self._file_sd())

    def _write(self, name: str, told: Any) -> None:
        """Into the run's folder. Who looks at it can wait: the learner decides whether the run can go on."""
        try:
            write_atomically(Path(self._plan.run_folder, name), json.dumps(told, indent=1))
        except InputError as error:
            if not self._warned:
                log.warning("%s", error)
            self._warned = True

    def _file_sd(self) -> list[dict[str, Any]]:
        run = Path(self._plan.run_folder).name
        return [
            {"targets": [address], "labels": {"run": run, "process": name, "role": role, "node": str(node)}}
            for name, (role, address, node) in self._targets.items()
        ]


def direct(plan: Plan, progress: Progress, stopped: StopRequests) -> Outcome:
    """Lead a run from the first node to its end; returns how it ended. Nothing is left running."""
    telemetry = plan.telemetry("supervisor", 0, 0)
    director = Director(plan, telemetry, progress.note)
    supervisor = Supervisor(plan, 0, telemetry, progress.note)
    outcome: Outcome | None = None
    asked = 0

    def learner_grace() -> float:
        return patience(director.statuses.get("learner-0"))

    def listen() -> None:
        nonlocal asked
        director.pump()
        for by in stopped.by[asked:]:
            asked += 1
            director.events.add("stop", f"{by} asks for the end" + (", at once" if asked > 1 else ""))

    director.events.start(plan.config, resumed=(Path(plan.run_folder, "checkpoints")).exists())
    try:
        supervisor.start()
        while outcome is None and not stopped.count:
            director.pump(0.1)
            outcome = supervisor.watch() or director.remote_outcome()
            for node in director.lost_nodes():
                progress.note(f"node {node} is lost; its processes go on here")
                names = ", ".join(process.name for process in plan.on(node))
                director.events.add("node_lost", f"its processes go on here: {names}", f"supervisor-{node}")
                supervisor.adopt(node)
            progress.show(director.statuses.get("learner-0"), director.worries())
    finally:
        if stopped.count and (seconds := learner_grace()) > 2 * LEARNER_GRACE_SECONDS:
            progress.note(
                f"the learner ends its iteration and writes a checkpoint, for at most {seconds:.0f} s; "
                "once more, and all ends at once"
            )
        end = supervisor.stop_learner(stopped, listen, learner_grace)
        # Not earlier: the answers to heartbeats would end the reward server, which the last checkpoint needs.
        director.stopping = True
        supervisor.stop_all(stopped, listen)
        director.wait_for_nodes()
        # What came last is written before the end: readers take the last event for the end of the run.
        listen()
        director.events.end(outcome or end)
        director.close()
        telemetry.close()
    return outcome or end


@dataclass(frozen=True)
class Followed:
    """How another node's part ended.

    outcome: what a process of it has decided, if one has.   heard: whether the director ever was.   lost: whether it
    was not, for as long as a wait may last.
    """

    outcome: Outcome | None
    heard: bool
    lost: bool


def follow(plan: Plan, node: int, stopped: StopRequests, say: Callable[[str], None], joined: bool = False) -> Followed:
    """Run another node's part: until the director says stop, or has not been heard for as long as a wait may last.

    joined: it is no part of the plan. The director hears its actors only, and so it ends with the first that has an
    outcome.
    """
    patience = plan.config.learner.deadline_seconds
    lost = False
    telemetry = plan.telemetry("supervisor", node, node)
    supervisor = Supervisor(plan, node, telemetry, say)
    telemetry.start_heartbeat(plan.control)
    outcome: Outcome | None = None
    try:
        supervisor.start()
        while not (telemetry.stop.wait(0.1) or stopped.count or lost or (joined and outcome)):
            lost = telemetry.seconds_alone() > patience
            # Only reported, with the next heartbeats: the director decides, and tells this node to stop.
            if outcome is None and (outcome := supervisor.watch()):
                telemetry.text, telemetry.numbers["exit_code"] = outcome.text, outcome.code
    finally:
        supervisor.stop_all(stopped, lambda: None)
        # Before `close`, which sends the last heartbeat: the director waits for this number.
        telemetry.numbers["ended"] = 1
        telemetry.close()
    return Followed(outcome, telemetry.answered, lost)


def _schema(body: Any) -> ArrayTable | None:
    return {} if isinstance(body, Status | Event) else None
