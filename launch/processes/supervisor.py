"""One per node: starts the node's processes, restarts those that crash, stops them in order, leaves none behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from bm3il.launch.outcome import CRASHED, FINAL_CODES, FINISHED, INTERRUPTED, Outcome
from bm3il.launch.processes.child import Child, worker_command
from bm3il.launch.processes.metrics import SupervisorMetrics
from bm3il.launch.topology import Plan, Process
from bm3il.protocol.messages import Status
from bm3il.protocol.telemetry import Telemetry

MAX_RESTARTS, RESTART_WINDOW_SECONDS = 5, 120.0
"""A process that crashes more often within that time would crash for ever; one that crashes once a night may go on."""
MAX_FRUITLESS_STARTS = 6
"""Of a process that gets nothing done in between, however long each one takes to fail."""
# Not the reward server: it only does what it is asked for, so that its silence is no failure.
TELL_WHAT_THEY_DO = ("actor", "evaluator", "learner")
RESTART_DELAY_SECONDS = 0.5
"""So that a process that dies at once does not take a core from those that work."""
HEARSAY_SECONDS = 3.0
"""How long after an actor has ended well the end of the run may be heard of, which the learner tells it directly."""
SHORT = 400
"""Characters of why a process is started again."""
LEARNER_GRACE_SECONDS, OTHERS_GRACE_SECONDS = 5.5, 1.5
"""From the wish to stop to SIGKILL. The learner ends its iteration and writes a checkpoint, for which it gets more time
where iterations are long (`patience`); the others have nothing to save. Together, with what it takes to write down the
end, they stay below the 10 s after which a scheduler may kill."""
NOTICE = "BM3IL_NOTICE_SECONDS"
"""The environment variable that says how long after its signal a scheduler kills."""
AFTER_LEARNER_SECONDS = OTHERS_GRACE_SECONDS + 3.0
"""What is kept of such a notice for the others, other nodes and the writing down of the end."""
POLL_SECONDS = 0.05

# Numerical libraries read these once, when they are loaded: a worker could not set them for itself in time.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def _in_short(text: str) -> str:
    """Both ends of it: the first words name who failed, the last say why."""
    return text if len(text) <= SHORT else f"{text[: SHORT // 2]} … {text[-SHORT // 2 :]}"


def patience(status: Status | None) -> float:
    """Seconds that a learner is given to end its iteration and write a checkpoint: all that a notice from a scheduler
    leaves, since nothing is gained by less; without one twice what these took when they were last done, and what is
    given in any case."""
    with suppress(ValueError):
        return max(LEARNER_GRACE_SECONDS, float(os.environ.get(NOTICE, "")) - AFTER_LEARNER_SECONDS)
    last = sum(status.values.get(f"seconds_{what}", 0.0) for what in ("iteration", "checkpoint")) if status else 0.0
    return LEARNER_GRACE_SECONDS + 2 * last


class StopRequests:
    """Counts how often somebody asked for the end: once, in order; twice, at once."""

    def __init__(self) -> None:
        self.count = 0
        self.by: list[str] = []
        """Who asked, each time."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take over Ctrl-C, SIGTERM and SIGHUP (a terminal that was closed), and give them back.

        SIGHUP stays ignored if it is: nohup wants that.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None is a handler that Python did not set

    def add(self, by: str = "the launcher") -> None:
        """One more."""
        self.count += 1
        self.by.append(by)

    def _hear(self, number: int, frame: object) -> None:
        self.add(signal.Signals(number).name)


class Supervisor:
    """Owns the processes of one node. `say` tells people what happened; `command` is what a process runs."""

    def __init__(
        self,
        plan: Plan,
        node: int,
        telemetry: Telemetry,
        say: Callable[[str], None],
        command: Callable[[Process], list[str]] = worker_command,
    ) -> None:
        self._say, self._plan, self._node, self._command, self._tell = say, plan, node, command, telemetry.event
        self._metrics = SupervisorMetrics(telemetry.registry, Path(plan.run_folder))
        self._children = self._made([process.name for process in plan.on(node)])
        self._ended_well: dict[str, float] = {}  # and when that was seen first

    def start(self) -> None:
        """Start all processes of the node; none waits for another."""
        for child in self._children:
            child.spawn()
        if self._children:
            self._tell("processes", f"started {', '.join(child.process.name for child in self._children)}")

    def adopt(self, node: int) -> None:
        """Start the processes of a node that was lost, here."""
        theirs = self._plan.on(node)
        # The moved processes must know it, too: their metrics listen at the address of the node that they are on.
        moved = tuple(replace(p, node=self._node) if p in theirs else p for p in self._plan.processes)
        self._plan = replace(self._plan, processes=moved)
        adopted = self._made([process.name for process in theirs])
        for child in adopted:
            child.spawn()
        self._children += adopted

    def _made(self, names: Collection[str]) -> list[Child]:
        logs = Path(self._plan.run_folder, "logs")
        logs.mkdir(parents=True, exist_ok=True)  # a node may have no part in the disk of the first
        plan, config = self._plan.to_json(), self._plan.config
        for name in names:
            self._metrics.started(name)
        return [
            Child(
                process,
                self._command(process),
                plan,
                logs / f"{process.name}.log",
                os.environ | dict.fromkeys(THREAD_VARIABLES, str(config.threads_of(process.role))),
            )
            for process in self._plan.processes
            if process.name in names
        ]

    def watch(self) -> Outcome | None:
        """Start again what crashed. Returns how the run ended once a process of this node has decided it."""
        for child in self._children:
            child.listen()
            if child.start_at is not None and time.monotonic() >= child.start_at:
                child.spawn()
            elif (code := child.exit_code) is None or self._may_be_over(child, code):
                continue
            elif outcome := self._ended(child, code):
                return self._without_evaluation(outcome) if child.process.role == "evaluator" else outcome
        self._metrics.processes.set(sum(child.alive for child in self._children))
        return None

    def stop_learner(
        self,
        stopped: StopRequests,
        meanwhile: Callable[[], None],
        grace_seconds: Callable[[], float] = lambda: LEARNER_GRACE_SECONDS,
    ) -> Outcome:
        """End the learner, before the others: its checkpoint needs them. Returns how it ended.

        `meanwhile` is called while waiting; a second request to stop ends the patience.
        grace_seconds: asked again and again, since the heartbeat that tells of a long iteration may be under way.
        """
        learners = [child for child in self._children if child.process.role == "learner"]
        self._end(learners, grace_seconds, stopped, meanwhile)
        code = learners[0].exit_code if learners else INTERRUPTED
        if code in FINAL_CODES:
            return Outcome(code, learners[0].last_words())
        # A learner that was killed at the end of the patience, or that waited for its restart, is interrupted, too.
        return Outcome(FINISHED if code == FINISHED else INTERRUPTED)

    def stop_all(self, stopped: StopRequests, meanwhile: Callable[[], None]) -> None:
        """End whatever is left on the node."""
        self._end(self._children, lambda: OTHERS_GRACE_SECONDS, stopped, meanwhile)

    def _may_be_over(self, child: Child, code: int) -> bool:
        """Whether a process has ended as one does that was told the end of the run, and so lately that the word may
        still be on its way to this node."""
        if child.process.role == "learner" or code != FINISHED:
            return False
        first_seen = self._ended_well.setdefault(child.process.name, time.monotonic())
        return time.monotonic() - first_seen < HEARSAY_SECONDS

    def _ended(self, child: Child, code: int) -> Outcome | None:
        name = child.process.name
        self._ended_well.pop(name, None)
        if child.process.role == "learner" and code in (FINISHED, INTERRUPTED):
            return Outcome(code)
        if code in FINAL_CODES:
            return Outcome(code, f"{name}: {child.last_words()}")
        # Code 0, too, is a crash of any other role: only the learner decides that the run is over.
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        child.listen()  # to its last words
        now = time.monotonic()
        child.crashes.append(now)
        while now - child.crashes[0] > RESTART_WINDOW_SECONDS:
            child.crashes.popleft()
        if len(child.crashes) > MAX_RESTARTS:
            return Outcome(
                CRASHED,
                f"{name} {how}, {len(child.crashes)} times within {RESTART_WINDOW_SECONDS:.0f} s; log: {child.log}\n"
                + child.last_traceback(),
            )
        if child.process.role in TELL_WHAT_THEY_DO and child.fruitless_starts >= MAX_FRUITLESS_STARTS:
            return Outcome(
                CRASHED,
                f"{name} {how}; it was started {child.fruitless_starts} times and got nothing done; log: {child.log}\n"
                + child.last_traceback(),
            )
        why = f" ({_in_short(child.last_words())})" if code > 0 else ""  # who is killed has no last words
        self._say(f"{name} {how}; starting it again{why}")
        self._tell("restart", f"{how}; starting it again{why}", name)
        self._metrics.restarted(name)
        child.restart_after(RESTART_DELAY_SECONDS)
        return None

    def _without_evaluation(self, outcome: Outcome) -> Outcome:
        """How the run ends whose evaluator is lost for good: a training that is complete has not failed by that."""
        for child in self._children:
            child.listen()
        return Outcome(FINISHED, outcome.text) if any(child.trained for child in self._children) else outcome

    @staticmethod
    def _end(
        children: Iterable[Child],
        grace_seconds: Callable[[], float],
        stopped: StopRequests,
        meanwhile: Callable[[], None],
    ) -> None:
        for child in children:
            child.send(signal.SIGTERM)
        asked = time.monotonic()
        while (
            any(child.alive for child in children) and time.monotonic() - asked < grace_seconds() and stopped.count < 2
        ):
            meanwhile()
            time.sleep(POLL_SECONDS)
        for child in children:
            child.send(signal.SIGKILL)
            child.wait()
