"""Sockets: answers arrive once, whatever is lost, resent, restarted or garbage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from protocol.channels import (
    MESSAGES_PER_POLL,
    Broadcaster,
    Client,
    Listener,
    Refused,
    Request,
    Server,
    Unanswered,
)
from protocol.errors import InputError
from protocol.keys import Keys
from protocol.messages import Done, GetState, Refusal, Sender, Statistics, Update, Weights, encode, frame_limit

DEADLINE_SECONDS = 10.0
ARRAY = {"a": np.arange(100_000, dtype=np.float32)}


def schema(body: Any) -> Any:
    return {"a": ("float32", (100_000,))} if isinstance(body, Weights | GetState) else {}


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
    wait_until(lambda: client.pump() or client._pending[ticket].resend_seconds > 2)
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


def test_a_restarted_server_gets_the_request_again(endpoint: str, client: Client) -> None:
    class Silent(Serving):
        def handle(self, server: Server, request: Request) -> None:
            self.carried_out.append(request.message.sequence)

    first = Silent(endpoint)
    ticket = client.submit(GetState("s"), ARRAY)
    wait_until(lambda: first.carried_out)
    first.close()
    second = Serving(endpoint)
    assert client.result(ticket, DEADLINE_SECONDS).body == Done("1")
    second.close()


def test_no_answer_ends_in_an_error_that_names_the_request(endpoint: str, client: Client) -> None:
    with pytest.raises(Unanswered, match="no answer to 'get_state' from ipc://"):
        client.request(GetState("s"), ARRAY, deadline_seconds=0.3)


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


def test_a_flood_of_subscriptions_is_taken_in_parts(endpoint: str) -> None:
    broadcaster = Broadcaster(endpoint, Sender("run", "learner"), lambda cause: None)
    flooder = zmq.Context.instance().socket(zmq.XSUB)
    flooder.set_hwm(0)
    flooder.connect(endpoint)
    for number in range(3 * MESSAGES_PER_POLL):
        flooder.send(b"\x01" + str(number).encode())
    wait_until(lambda: broadcaster._socket.poll(0))
    time.sleep(0.2)
    broadcaster.pump()
    assert broadcaster._socket.poll(5000), "all were taken at once"
    flooder.close(linger=0)
    broadcaster.close()


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


def test_a_late_listener_gets_the_newest_broadcast(endpoint: str) -> None:
    broadcaster = Broadcaster(endpoint, Sender("run", "learner"), lambda cause: None)
    for version in range(3):
        broadcaster.publish(Weights("s", version, 0), ARRAY)
    listener = Listener(endpoint, Sender("run", "actor"), schema, lambda cause: None)
    received: list[int] = []

    def newest() -> bool:
        broadcaster.pump()
        message = listener.newest(0.05)
        received.extend([] if message is None else [message.body.version])
        return bool(received)

    wait_until(newest)
    assert received == [2]
    for version in range(3, 6):
        broadcaster.publish(Weights("s", version, 0), ARRAY)
    time.sleep(0.2)
    message = listener.newest(1.0)
    assert message is not None
    assert message.body.version == 5
    np.testing.assert_array_equal(message.arrays["a"], ARRAY["a"])
    listener.close()
    broadcaster.close()
