"""Sockets: answers arrive once, whatever is lost, resent, restarted or garbage."""

from __future__ import annotations

import gc
import socket as sockets
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from bm3il.protocol import channels, ledger
from bm3il.protocol import sockets as zmq_sockets
from bm3il.protocol.broadcast import Broadcaster, Listener
from bm3il.protocol.channels import Client, Refused, Request, Server, Unanswered
from bm3il.protocol.codec import encode, frame_limit
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import Keys
from bm3il.protocol.ledger import UNKNOWN
from bm3il.protocol.messages import Done, GetState, Refusal, Sender, Standing, Statistics, Update, Weights
from bm3il.protocol.sockets import MESSAGES_PER_POLL

DEADLINE_SECONDS = 10.0
LARGE = Done("with an array")
ARRAY = {"a": np.arange(100_000, dtype=np.float32)}


def schema(body: Any) -> Any:
    has_array = isinstance(body, Weights | GetState) or body == LARGE
    return {"a": ("float32", (100_000,))} if has_array else {}


class Serving:
    """A server in a thread that answers every request with how many it has carried out."""

    def __init__(self, endpoint: str, drops: list[str] | None = None) -> None:
        self.carried_out: list[int] = []
        self._drops = [] if drops is None else drops
        self._endpoint, self._stop = endpoint, threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)

    def _serve(self) -> None:
        server = Server(self._endpoint, Sender("run", "server"), schema, self._drops.append)
        self._ready.set()
        while not self._stop.is_set():
            for request in server.poll(0.02):
                self.handle(server, request)
        server.close()

    def handle(self, server: Server, request: Request) -> None:
        self.carried_out.append(request.message.sequence)
        server.answer(request, Done(str(len(self.carried_out))))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_SECONDS)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    client = Client(endpoint, Sender("run", "client"), lambda body: {}, lambda cause: None)
    yield client
    client.close()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_a_request_is_answered(endpoint: str, client: Client) -> None:
    serving = Serving(endpoint)
    assert client.request(GetState("s"), ARRAY).body == Done("1")
    assert client.pending == 0
    serving.close()


def test_who_only_tells_keeps_no_answers(endpoint: str, client: Client) -> None:
    serving = Serving(endpoint)
    for _ in range(50):
        client.tell(GetState("s"), ARRAY)
    client.tell(Done())
    assert (client.pending, client.pending_of(GetState), client.pending_of(Done)) == (51, 50, 1)

    def all_answered() -> bool:
        client.pump()
        return not client.pending

    wait_until(all_answered)
    assert not client._answers
    serving.close()


def test_answers_go_to_their_tickets_in_any_order(endpoint: str, client: Client) -> None:
    serving = Serving(endpoint)
    tickets = [client.submit(GetState("s"), ARRAY) for _ in range(3)]
    notes = [client.result(ticket, DEADLINE_SECONDS).body.note for ticket in reversed(tickets)]
    assert notes == ["3", "2", "1"]
    serving.close()


def test_a_request_sent_before_the_server_is_there_is_carried_out_once(endpoint: str, client: Client) -> None:
    ticket = client.submit(GetState("s"), ARRAY)
    wait_until(lambda: client.pump() or client._pending[ticket].ask_seconds > 2)
    serving = Serving(endpoint)
    assert client.result(ticket, DEADLINE_SECONDS).body == Done("1")
    client.pump(0.3)
    assert serving.carried_out == [1]
    serving.close()


def test_a_lost_answer_is_given_again_without_doing_the_work_again(endpoint: str, client: Client) -> None:
    class LosesTheFirstAnswer(Serving):
        def handle(self, server: Server, request: Request) -> None:
            send, server._send = server._send, lambda peer, frames: None  # type: ignore[method-assign]
            super().handle(server, request)
            server._send = send  # type: ignore[method-assign]

    serving = LosesTheFirstAnswer(endpoint)
    assert client.request(GetState("s"), ARRAY, DEADLINE_SECONDS).body == Done("1")
    assert serving.carried_out == [1]
    serving.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("phase", ["on its way", "at work", "said to be at work", "answered"])
def test_a_server_that_is_started_again_gets_the_request_again(endpoint: str, client: Client, phase: str) -> None:
    """And each server carries it out once at most, though a message of before comes a second time."""
    silent = phase != "answered"

    class Forgetful(Serving):
        def handle(self, server: Server, request: Request) -> None:
            self.carried_out.append(request.message.sequence)
            if not silent:
                server._send = lambda peer, frames: None  # type: ignore[method-assign]
                server.answer(request, Done("lost"))

    first = Forgetful(endpoint) if phase != "on its way" else None
    deaf = Server(endpoint, Sender("run", "server"), schema, lambda cause: None) if first is None else None
    ticket = client.submit(GetState("s"), ARRAY)
    if first is not None:
        wait_until(lambda: first.carried_out)
        if phase == "said to be at work":
            client.pump(0.3)
            client.pump(0.3)
        first.close()
    elif deaf is not None:
        client.pump(0.3)
        deaf.close()
    second = Serving(endpoint)
    assert client.result(ticket, DEADLINE_SECONDS).body == Done("1")
    client.pump(0.3)
    assert second.carried_out == [1]
    assert first is None or first.carried_out == [1]
    second.close()


@pytest.mark.usefixtures("impatient")
def test_requests_over_a_connection_that_is_cut_again_and_again_are_carried_out_once(
    endpoint: str, tmp_path: Path
) -> None:
    serving = Serving(endpoint)
    pipe = SlowPipe(tmp_path, endpoint, 1e9)
    client = Client(pipe.endpoint, Sender("run", "client"), schema, lambda cause: None)
    tickets = [client.submit(GetState("s"), ARRAY) for _ in range(40)]
    for _ in range(10):
        client.pump(0.01)
        time.sleep(0.05)
        pipe.cut()
    notes = [client.result(ticket, DEADLINE_SECONDS).body.note for ticket in tickets]
    assert sorted(map(int, notes)) == list(range(1, 41))
    assert sorted(serving.carried_out) == tickets
    assert pipe.connections > 5
    client.close()
    serving.close()


def test_answers_are_kept_until_the_client_has_them_and_no_longer(endpoint: str) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    class Large(Serving):
        def handle(self, server: Server, request: Request) -> None:
            array = np.zeros(100_000, np.float32)
            alive.append(weakref.ref(array))
            server.answer(request, LARGE, {"a": array})

    serving = Large(endpoint)
    client = Client(endpoint, Sender("run", "client"), schema, lambda cause: None)
    for _ in range(20):
        client.request(GetState("s"), ARRAY, DEADLINE_SECONDS)
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 2
    client.close()
    serving.close()


def test_an_answer_that_is_kept_no_longer_is_refused(
    endpoint: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither made once more nor waited for in vain."""
    monkeypatch.setattr(ledger, "ANSWER_BYTES_KEPT", 1)

    class LosesTheFirstAnswer(Serving):
        def handle(self, server: Server, request: Request) -> None:
            send, server._send = server._send, lambda peer, frames: None  # type: ignore[method-assign]
            server._send = send if self.carried_out else server._send  # type: ignore[method-assign]
            super().handle(server, request)
            server._send = send  # type: ignore[method-assign]

    serving = LosesTheFirstAnswer(endpoint)
    lost, got = (client.submit(GetState("s"), ARRAY) for _ in range(2))
    assert client.result(got, DEADLINE_SECONDS).body == Done("2")
    with pytest.raises(Refused, match="kept no longer") as refused:
        client.result(lost, DEADLINE_SECONDS)
    assert refused.value.cause == "answer_gone"
    assert serving.carried_out == [1, 2]
    serving.close()


class SlowPipe:
    """Hands bytes on between two unix sockets, at most so many a second to the server and back, and counts them."""

    def __init__(self, folder: Path, endpoint: str, there: float, back: float = 1e9) -> None:
        self.endpoint, self._there, self._back = f"ipc://{folder}/slow", there, back
        self.to_server = self.to_client = self.connections = 0
        self._ends: list[sockets.socket] = []
        self._target = endpoint.removeprefix("ipc://")
        self._listening = sockets.socket(sockets.AF_UNIX)
        self._listening.bind(self.endpoint.removeprefix("ipc://"))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Whatever is on its way is lost."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(sockets.SHUT_RDWR)
        self._ends.clear()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            self.connections += 1
            far = sockets.socket(sockets.AF_UNIX)
            far.connect(self._target)
            self._ends += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._hand_on, args=ends, daemon=True).start()

    def _hand_on(self, source: sockets.socket, sink: sockets.socket) -> None:
        to_server = sink.getpeername() == self._target
        with suppress(OSError):
            while data := source.recv(1 << 14):
                if to_server:  # counted first: who has got the last of it may look at once
                    self.to_server += len(data)
                else:
                    self.to_client += len(data)
                sink.sendall(data)
                time.sleep(len(data) / (self._there if to_server else self._back))
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(sockets.SHUT_RDWR)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an answer asks after it many times a second."""
    monkeypatch.setattr(channels, "FIRST_INQUIRY_SECONDS", 0.02)
    monkeypatch.setattr(channels, "LAST_INQUIRY_SECONDS", 0.05)


BYTES = ARRAY["a"].nbytes


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("deaf", [False, True], ids=["at work", "deaf"])
def test_a_request_that_has_arrived_is_not_sent_again(endpoint: str, tmp_path: Path, deaf: bool) -> None:
    """However long the server is at work on it; also one that does not listen meanwhile. Nor is its answer."""

    class Slow(Serving):
        def handle(self, server: Server, request: Request) -> None:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                if deaf:
                    time.sleep(0.05)
                else:
                    assert not server.poll(0.05)
            self.carried_out.append(request.message.sequence)
            server.answer(request, LARGE, ARRAY)

    serving = Slow(endpoint)
    pipe = SlowPipe(tmp_path, endpoint, 1e9)
    client = Client(pipe.endpoint, Sender("run", "client"), schema, lambda cause: None)
    assert client.request(GetState("s"), ARRAY, DEADLINE_SECONDS).arrays["a"][7] == 7
    client.pump(0.3)
    assert serving.carried_out == [1]
    assert BYTES < pipe.to_server < 1.05 * BYTES
    assert BYTES < pipe.to_client < 1.05 * BYTES
    client.close()
    serving.close()


@pytest.mark.usefixtures("impatient")
def test_a_message_that_is_long_under_way_is_sent_once(endpoint: str, tmp_path: Path) -> None:
    serving = Serving(endpoint)
    pipe = SlowPipe(tmp_path, endpoint, BYTES / 1.5)
    client = Client(pipe.endpoint, Sender("run", "client"), schema, lambda cause: None)
    assert client.request(GetState("s"), ARRAY, DEADLINE_SECONDS).body == Done("1")
    time.sleep(0.3)  # whatever is behind it would come now
    assert BYTES < pipe.to_server < 1.05 * BYTES
    client.close()
    serving.close()


@pytest.mark.parametrize("direction", ["request", "answer"])
def test_who_sends_one_large_frame_is_not_taken_for_silent(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """It cannot answer a heartbeat before the frame's end, and would begin it again and again."""
    monkeypatch.setattr(zmq_sockets, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(zmq_sockets, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(zmq_sockets, "SLOWEST_BYTES_PER_SECOND", 1e5)

    class Large(Serving):
        def handle(self, server: Server, request: Request) -> None:
            server.answer(request, LARGE, ARRAY)

    serving = Serving(endpoint) if direction == "request" else Large(endpoint)
    slow = BYTES / 1.5
    pipe = SlowPipe(tmp_path, endpoint, *((slow, 1e9) if direction == "request" else (1e9, slow)))
    client = Client(pipe.endpoint, Sender("run", "client"), schema, lambda cause: None)
    client.request(GetState("s"), ARRAY, DEADLINE_SECONDS)
    assert pipe.connections == 1
    client.close()
    serving.close()


def test_no_answer_ends_in_an_error_that_names_the_request(endpoint: str, client: Client) -> None:
    with pytest.raises(Unanswered, match="no answer to 'get_state' from ipc://"):
        client.request(GetState("s"), ARRAY, deadline_seconds=0.3)


def test_what_nobody_answered_is_not_asked_after_any_more(client: Client) -> None:
    ticket = client.submit(GetState("s"))
    with pytest.raises(Unanswered):
        client.result(ticket, 0.1)
    assert client.pending == 0


def test_waiting_can_be_aborted(endpoint: str, client: Client) -> None:
    def abort() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.request(GetState("s"), ARRAY, DEADLINE_SECONDS, abort)


def test_a_refusal_is_an_error_with_its_cause(endpoint: str, client: Client) -> None:
    class Refusing(Serving):
        def handle(self, server: Server, request: Request) -> None:
            server.answer(request, Refusal("no_session", "nothing has begun"))

    serving = Refusing(endpoint)
    with pytest.raises(Refused, match="nothing has begun") as caught:
        client.request(GetState("s"), ARRAY)
    assert caught.value.cause == "no_session"
    serving.close()


def test_garbage_is_counted_and_logged_once_and_nothing_else(
    endpoint: str, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    drops: list[str] = []
    serving = Serving(endpoint, drops)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.connect(endpoint)
    for _ in range(5):
        stranger.send_multipart([b"\xc1not a header", b"x" * 100])
    foreign = Client(endpoint, Sender("another run", "client"), lambda body: {}, lambda cause: None)
    foreign.submit(Done())
    wait_until(lambda: len(drops) >= 6)
    assert sorted(set(drops)) == ["foreign", "header"]
    assert caplog.text.count("(header)") == 1
    assert client.request(GetState("s"), ARRAY).body == Done("1")
    stranger.close(linger=0)
    foreign.close()
    serving.close()


def test_a_request_of_a_wrong_shape_is_refused_at_once(endpoint: str, client: Client) -> None:
    serving = Serving(endpoint)
    with pytest.raises(Refused, match="expected"):
        client.request(GetState("s"), {"a": np.zeros(3, np.float32)}, DEADLINE_SECONDS)
    serving.close()


def test_a_flood_is_taken_in_parts(endpoint: str) -> None:
    server = Server(endpoint, Sender("run", "server"), schema, lambda cause: None)
    flooders = [zmq.Context.instance().socket(zmq.DEALER) for _ in range(12)]  # a socket holds 64 messages of each
    for number, flooder in enumerate(flooders):
        flooder.connect(endpoint)
        for sequence in range(50):
            flooder.send_multipart(encode(Sender("run", f"actor-{number}"), sequence, Done()))
    taken = []
    while sum(taken) < 600:
        taken.append(len(server.poll(DEADLINE_SECONDS)))
        time.sleep(0.1)
    assert max(taken) == MESSAGES_PER_POLL
    for flooder in flooders:
        flooder.close(linger=0)
    server.close()


def test_a_flood_of_answers_is_taken_in_parts(client: Client) -> None:
    received = []
    client._receive = lambda: not received.append(0)  # type: ignore[method-assign,func-returns-value]
    client._socket = Ready()  # type: ignore[assignment]
    client.pump()
    assert len(received) == MESSAGES_PER_POLL


class Ready:
    """A socket that always has something."""

    def poll(self, timeout: int) -> bool:
        return True

    def close(self, linger: int) -> None: ...


@pytest.mark.parametrize("kind", ["server", "broadcaster"])
def test_who_sends_too_large_a_frame_is_cut_off_and_others_are_served(endpoint: str, kind: str) -> None:
    large = zmq.Context.instance().socket(zmq.DEALER if kind == "server" else zmq.XSUB)
    large.connect(endpoint)
    monitor = large.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    if kind == "server":
        serving = Serving(endpoint)
        header = encode(Sender("run", "large"), 1, GetState("s"))[0]
        large.send_multipart([header, b"\0" * (frame_limit() + 1)])
        assert monitor.poll(DEADLINE_SECONDS * 1000), "it was not cut off"
        client = Client(endpoint, Sender("run", "client"), lambda body: {}, lambda cause: None)
        assert client.request(GetState("s"), ARRAY, DEADLINE_SECONDS).body == Done("1")
        client.close()
        serving.close()
    else:
        broadcaster = Broadcaster(endpoint, Sender("run", "learner"), lambda cause: None)
        broadcaster.publish(Weights("s", 1, 0), ARRAY)
        large.send(b"\x01" * 5000)
        assert monitor.poll(DEADLINE_SECONDS * 1000), "it was not cut off"
        listener = Listener(endpoint, Sender("run", "actor"), schema, lambda cause: None)
        wait_until(lambda: broadcaster.pump() or listener.next(0.05))
        listener.close()
        broadcaster.close()
    large.disable_monitor()
    large.close(linger=0)


def test_a_large_answer_or_broadcast_does_not_deafen_who_connects(endpoint: str) -> None:
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(endpoint)
    client = Client(endpoint, Sender("run", "client"), lambda body: {}, lambda cause: None)
    ticket = client.submit(GetState("s"))
    peer = router.recv_multipart()[0]
    for frames in ([b"\0" * (8 << 20)], encode(Sender("run", "server"), 1, Done("honest"))):
        router.send_multipart([peer, *frames])
    assert client.result(ticket, DEADLINE_SECONDS).body == Done("honest")
    client.close()
    router.close(linger=0)

    publisher = zmq.Context.instance().socket(zmq.PUB)
    publisher.bind(endpoint + "-weights")
    listener = Listener(endpoint + "-weights", Sender("run", "actor"), schema, lambda cause: None)
    newest = encode(Sender("run", "learner"), 1, Weights("s", 1, 0), ARRAY)
    wait_until(lambda: publisher.send_multipart(newest) or listener.next(0.05))
    publisher.send(b"\0" * (8 << 20))
    wait_until(lambda: listener.next(0.0) is None)
    wait_until(lambda: publisher.send_multipart(newest) or listener.next(0.05))
    listener.close()
    publisher.close(linger=0)


def test_a_limit_leaves_room_for_a_peer_that_is_configured_otherwise(endpoint: str) -> None:
    """It hears that its message has another shape."""
    table = {"a": ("float32", (2_000_000,))}
    server = Server(endpoint, Sender("run", "server"), lambda body: table, lambda cause: None, frame_limit(table))
    client = Client(endpoint, Sender("run", "client"), lambda body: {}, lambda cause: None)
    with pytest.raises(Refused, match="expected"):
        client.request(
            GetState("s"), {"a": np.zeros(3_000_000, np.float32)}, DEADLINE_SECONDS, lambda: server.poll(0.05) and None
        )
    client.close()
    server.close()


def test_an_answer_to_something_else_is_dropped(endpoint: str) -> None:
    class Confused(Serving):
        def handle(self, server: Server, request: Request) -> None:
            server.answer(request, Done())
            server.answer(request, Statistics(3))

    drops: list[str] = []
    serving = Confused(endpoint)
    client = Client(endpoint, Sender("run", "client"), lambda body: {}, drops.append)
    assert client.request(Update("s", 1, 0.0), None, DEADLINE_SECONDS).body == Statistics(3)
    assert drops == ["kind"]
    client.close()
    serving.close()


def test_a_taken_endpoint_is_an_error_for_people() -> None:
    taken = zmq.Context.instance().socket(zmq.ROUTER)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(InputError, match=f"cannot listen on tcp://127.0.0.1:{port}"):
        Server(f"tcp://127.0.0.1:{port}", Sender("run", "server", keys=Keys.create()), schema, lambda cause: None)
    taken.close(linger=0)


def test_a_request_has_come_no_later_than_it_says(endpoint: str, client: Client) -> None:
    """While the server works, what comes lies in the socket: its time is counted from when the socket was empty."""
    server = Server(endpoint, Sender("run", "server"), schema, lambda cause: None)
    assert not server.poll(0.05)
    before = time.monotonic()
    client.submit(GetState("s"), ARRAY)
    time.sleep(0.3)  # at work
    (request,) = server.poll(DEADLINE_SECONDS)
    assert request.arrived <= before
    server.close()


def test_a_request_that_lay_in_the_socket_did_not_come_when_it_was_read(endpoint: str, client: Client) -> None:
    server = Server(endpoint, Sender("run", "server"), schema, lambda cause: None)
    client.submit(Done())
    assert len(server.poll(5.0)) == 1
    assert server.poll(0.0) == []
    client.submit(Done())
    came = time.monotonic()
    time.sleep(0.3)
    (request,) = server.poll(0.0)
    assert request.arrived <= came
    server.close()


def test_a_request_that_was_waited_for_has_just_come(endpoint: str, client: Client) -> None:
    server = Server(endpoint, Sender("run", "server"), schema, lambda cause: None)
    assert not server.poll(0.05)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        client.submit(GetState("s"), ARRAY)

    late = threading.Timer(0.3, send)
    late.start()
    (request,) = server.poll(DEADLINE_SECONDS)
    late.join()
    assert request.arrived >= sent[0]
    server.close()


def test_a_request_that_is_unknown_is_sent_again_once_however_often_that_is_said(endpoint: str) -> None:
    counted: list[str] = []
    client = Client(
        endpoint,
        Sender("run", "client"),
        lambda body: {},
        lambda cause: None,
        count_bytes=lambda kind, count: counted.append(kind),
    )
    ticket = client.submit(GetState("s"))
    for _ in range(3):  # inquiries after the same attempt, answered late and all at once
        client._heard(ticket, client._pending[ticket], Standing(UNKNOWN, 1))
    assert counted == ["sent", "resent"]
    client.close()
