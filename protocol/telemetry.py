"""What a process tells about itself: metrics over HTTP, and a heartbeat to the director."""

from __future__ import annotations

import errno
import hmac
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any
from wsgiref.simple_server import WSGIServer

import prometheus_client
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bm3il.protocol.channels import Client, Refused, Unanswered
from bm3il.protocol.codec import MAX_TEXT
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import UNAUTHORISED
from bm3il.protocol.messages import Done, Event, Refusal, Sender, Status
from bm3il.protocol.specs import ArrayTable

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
"""Seldom enough that a thousand processes do not keep the director busy."""
STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PORT_SECONDS = 5.0
"""How long a port that was asked for may be taken by another process."""
STOP = "stop"
DONE_FD, TRAINED = "BM3IL_DONE_FD", b"trained"
"""The environment variable with the pipe to the supervisor that started this process."""
START, BETWEEN, END = "start", "between", "end"
"""Where a process is before its first stage, since its last one ended, and when this status is its last."""
WAIT, IDLE = "wait", "idle"
"""How the names of stages begin in which a process cannot go on without others, and that in which nobody wants anything
of it. Most are polls: one that follows the same again, with nothing else in between, goes on with it."""
EVENTS_KEPT, EVENTS_UNDER_WAY, EVENT_TEXT = 256, 16, 1000
"""Events that wait for a director who does not answer; those sent at once; and characters of one."""
PAUSE_SECONDS = 1.0
"""Longest time between two such polls: what lasts longer is work."""

OF_TYPE = "normalized_return."
"""Before the name of a type, in the learner's numbers."""


class Telemetry:
    """One per process: its current stage, its metrics, its heartbeat, and the wish that it stop.

    stop: set when the process shall come to an end: by a signal, or by the director's answer to a heartbeat.
    registry: where each room registers its own metrics (`<room>/metrics.py`).
    token: what metrics must be asked with (`Authorization: Bearer …`); empty: nothing.
    host, port: where metrics are reached; 0 takes a free port.   bind: the address they listen on, if it is another.
    answered: whether the director has ever answered.
    numbers, text: sent along with every heartbeat. A stage adds `seconds_<stage>`, its last duration.
    """

    def __init__(
        self,
        role: str,
        index: int,
        sender: Sender,
        node: int = 0,
        host: str = "127.0.0.1",
        token: str = "",
        port: int = 0,
        bind: str = "",
    ) -> None:
        # Else each counter and histogram has a second time series, of when it was made.
        prometheus_client.disable_created_metrics()
        self.role, self.index, self.sender, self.node = role, index, sender, node
        self.stop = threading.Event()
        self.registry = CollectorRegistry()
        self.numbers: dict[str, float] = {}
        self.text = ""
        prefix = f"bm3il_{role.replace('-', '_')}"
        self._seconds = Histogram(
            f"{prefix}_stage_seconds",
            "Time spent in a stage, each time",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self._drops = Counter(
            f"{prefix}_dropped_messages", "Messages dropped, by cause", ["cause"], registry=self.registry
        )
        self._drops.labels(UNAUTHORISED)  # an alert waits for it to increase, which it cannot from nothing
        memory = Gauge(f"{prefix}_resident_memory_bytes", "Resident memory of the process", registry=self.registry)
        process = psutil.Process()
        memory.set_function(lambda: process.memory_info().rss)
        self._happened: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._done_fd = int(os.environ[DONE_FD]) if DONE_FD in os.environ else None
        self._open: list[tuple[str, float]] = []
        """The stages that it is in, the innermost last, each with the time when it began."""
        self._now = (START, time.monotonic())
        self._spent: dict[str, float] = {}
        self._inside = 0.0
        """Seconds of each stage since they were last taken, and of the stages that ended inside the open one."""
        self._waited = ("", 0.0, -math.inf)
        """The last wait, unless something else has begun since: its stage, when it began, and until when it lasted."""
        self._server = self._listen(bind or host, port)
        if token:
            self._server.set_app(_guarded(prometheus_client.make_wsgi_app(self.registry), token))
        self.metrics_address = f"{host}:{self._server.server_port}"
        self._heard, self.answered = time.monotonic(), False
        self._closing = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def _listen(self, address: str, port: int) -> WSGIServer:
        """Serve the metrics. A port may be taken for a moment by the process that this one is started after."""
        give_up = time.monotonic() + PORT_SECONDS
        while True:
            try:
                return prometheus_client.start_http_server(port, address, self.registry)[0]
            except (OSError, OverflowError) as error:
                if getattr(error, "errno", 0) == errno.EADDRINUSE and time.monotonic() < give_up:
                    time.sleep(PORT_SECONDS / 10)
                    continue
                cause = getattr(error, "strerror", None) or error
                raise InputError(
                    f"the metrics of {self.sender.name} cannot listen on {address}:{port}: {cause}; take another "
                    "--metrics-port, of which each process has the next, or --metrics-address"
                ) from error

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and tell it to whoever asks what this process is doing. Stages may be nested."""
        start = time.monotonic()
        self._now = stage = (name, self._wait_since(start) if name == self._waited[0] else start)
        self._waited = ("", start, start)
        self._open.append(stage)
        outside, self._inside = self._inside, 0.0
        try:
            yield
        finally:
            end = time.monotonic()
            self._open.remove(stage)
            self._spent[name] = self._spent.get(name, 0.0) + end - start - self._inside
            self._inside = outside + end - start
            if name.startswith((WAIT, IDLE)):
                self._waited = (*stage, end)
            self._now = self._open[-1] if self._open else (BETWEEN, end)
            seconds = end - start
            self._seconds.labels(name).observe(seconds)
            self.numbers[f"seconds_{name}"] = seconds

    def take_spent(self) -> dict[str, float]:
        """Seconds `seconds_<stage>` that were spent in each stage since this was last asked, all visits together.

        What a stage inside another one took counts there and not in the outer one: they add up to the time that passed
        in stages.
        """
        spent, self._spent = self._spent, {}
        return {f"seconds_{name}": round(seconds, 6) for name, seconds in spent.items()}

    def done(self, number: int) -> None:
        """Tell the supervisor that this process got something done: its chunk, evaluation or iteration of that number.

        Who does not for too many starts is not started again.
        """
        self._tell_supervisor(b"%d" % number)

    def trained(self) -> None:
        """Tell the supervisor that nothing but the evaluation of the final policy is left to do in this run."""
        self._tell_supervisor(TRAINED)

    def _tell_supervisor(self, word: bytes) -> None:
        if self._done_fd is not None:
            with suppress(OSError):  # a supervisor that does not read has other worries
                os.write(self._done_fd, word + b"\n")

    def event(self, what: str, text: str, process: str = "") -> None:
        """Tell the operator, in `events.jsonl` and in this process's log, that something happened to it or to another.

        It is told with the next heartbeat, until the director answers, and written down once.
        """
        log.info("%s: %s", what, text)
        name = process or self.sender.name
        self._happened.append(Event(what, name, text[:EVENT_TEXT], time.time()))

    def events(self) -> Iterator[Event]:
        """Take out the events that nobody was told yet."""
        while self._happened:
            yield self._happened.popleft()

    def count_drop(self, cause: str) -> None:
        """Count a message that was dropped."""
        self._drops.labels(cause).inc()

    def status(self) -> Status:
        """The process as it is now; `stage_seconds` tells for how long it has been in its innermost stage."""
        (stage, since), waited, now = self._now, self._waited, time.monotonic()  # another thread asks than works
        if stage == BETWEEN and waited[0] and now - waited[2] <= PAUSE_SECONDS:
            stage, since = waited[:2]
        # Copied: the thread that works may add a number meanwhile.
        values = {name: float(value) for name, value in self.numbers.copy().items()}
        values["stage_seconds"] = now - since
        return Status(
            role=self.role,
            index=self.index,
            node=self.node,
            pid=psutil.Process().pid,
            stage=stage,
            metrics_address=self.metrics_address,
            values=values,
            # The limit is on bytes, of which a character may take four.
            text=self.text[-MAX_TEXT // 4 :],
        )

    def _wait_since(self, now: float) -> float:
        """When the last wait began, if it still goes on."""
        _, began, until = self._waited
        return began if now - until <= PAUSE_SECONDS else now

    def start_heartbeat(self, control: str) -> None:
        """Send the status to the director at `control` once a second, from a thread of its own."""
        self._heartbeat = threading.Thread(target=self._beat, args=(control,), name="heartbeat", daemon=True)
        self._heartbeat.start()

    def seconds_alone(self) -> float:
        """For how long the director has not answered."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Send the last status, end the heartbeat, and within a second the metrics endpoint."""
        self._now = (END, time.monotonic())
        self._closing.set()
        if self._heartbeat is not None:
            self._heartbeat.join(timeout=2 * HEARTBEAT_SECONDS)
        # The server looks only twice a second whether it shall end: nobody waits for that.
        threading.Thread(target=self._end_server, daemon=True).start()

    def _end_server(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _beat(self, control: str) -> None:
        # Made here: a socket of ZeroMQ is for the thread that uses it alone.
        client = Client(control, self.sender, _answers, self.count_drop)
        last = False
        while not last:
            # Once more after `close`: the last status says that this was the end.
            last = self._closing.is_set()
            # A status that was not answered is not resent: the next one is newer.
            with suppress(Unanswered):
                try:
                    for event in islice(self.events(), EVENTS_UNDER_WAY - client.pending_of(Event)):
                        client.tell(event)
                    answer = client.request(self.status(), deadline_seconds=HEARTBEAT_SECONDS)
                    self._heard, self.answered = time.monotonic(), True
                    if answer.body.note == STOP:
                        self.stop.set()
                except Refused as refusal:
                    log.error("the director refuses this process: %s", refusal)
                    break
            self._closing.wait(HEARTBEAT_SECONDS)
        client.close()


def _guarded(app: Callable[..., Any], token: str) -> Callable[..., Any]:
    """A WSGI application that answers only who knows the token."""
    # WSGI hands headers over as latin-1.
    wanted = f"Bearer {token}".encode("latin-1")

    def answer(environment: dict[str, str], start_response: Callable[..., Any]) -> Any:
        if hmac.compare_digest(environment.get("HTTP_AUTHORIZATION", "").encode("latin-1"), wanted):
            return app(environment, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
        return [b""]

    return answer


def _answers(body: Any) -> ArrayTable | None:
    return {} if isinstance(body, Done | Refusal) else None
