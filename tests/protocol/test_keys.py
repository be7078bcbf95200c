"""Who gets in over TCP, and what others see of the wire."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zmq

from bm3il.protocol.broadcast import Broadcaster, Listener
from bm3il.protocol.channels import Client, Server, Unanswered
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import Keys, read_token
from bm3il.protocol.messages import Chunk, Done, Sender, Weights

MARK = np.frombuffer(b"a pattern that nobody would send by chance 0123456789abcdef" * 17 + b"x", np.uint8)
BODY = Chunk("s", 0, 0, 0, 1, 1, 0.0)
TABLE = {"mark": ("uint8", MARK.shape)}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Door:
    """A listening server, which answers in a thread."""

    keys: Keys
    drops: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self._server = Server(
            self.endpoint, Sender("run", "server", keys=self.keys), lambda body: TABLE, self.drops.append
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            for request in self._server.poll(0.05):
                self.received.append(request.message.arrays["mark"].tobytes())
                self._server.answer(request, Done("taken"))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._server.close()


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door(Keys.create())
    yield made
    made.close()


def ask(endpoint: str, keys: Keys, seconds: float = 5.0) -> str:
    client = Client(endpoint, Sender("run", "client", keys=keys), lambda body: {}, lambda cause: None)
    try:
        return client.request(BODY, {"mark": MARK}, deadline_seconds=seconds).body.note
    finally:
        client.close()


def until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)
    assert condition()  # type: ignore[operator]


def test_who_has_the_key_gets_in(door: Door) -> None:
    assert ask(door.endpoint, door.keys) == "taken"
    assert ask(door.endpoint, door.keys.of_client()) == "taken"
    assert door.received == [MARK.tobytes()] * 2
    assert not door.drops


@pytest.mark.parametrize("right", ["server", "nothing"])
def test_a_wrong_or_stale_key_is_refused_counted_and_named(
    door: Door, right: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = Keys.create()
    if right == "server":  # it knows whom it talks to, and is not known itself
        other = Keys(door.keys.server_public, "", other.client_public, other.client_secret)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):  # a connection may be closed before it could be asked where it comes from
            with pytest.raises(Unanswered):
                ask(door.endpoint, other, 0.7)
            until(lambda: "unauthorised" in door.drops)
            until(lambda: "refused a connection of " in caplog.text)
            if "refused a connection of 127.0.0.1:" in caplog.text:
                break
    assert "refused a connection of 127.0.0.1:" in caplog.text
    assert not door.received
    assert ask(door.endpoint, door.keys) == "taken"


def test_without_a_key_there_is_nothing_to_hear(door: Door) -> None:
    plain = zmq.Context.instance().socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(door.endpoint)
    plain.send(b"hello")
    until(lambda: "unauthorised" in door.drops)
    assert not plain.poll(300)
    plain.close()
    assert not door.received


def test_weights_go_to_listeners_with_the_key_only() -> None:
    keys, drops = Keys.create(), list[str]()
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    sender = Sender("run", "learner", keys=keys)
    broadcaster = Broadcaster(endpoint, sender, drops.append)
    listeners = [
        Listener(endpoint, Sender("run", "actor", keys=k), lambda body: TABLE, drops.append)
        for k in (keys, Keys.create())
    ]
    heard = None
    for version in range(100):
        broadcaster.publish(Weights("s", version, 0), {"mark": MARK})
        broadcaster.pump()
        if heard := listeners[0].next(0.05):
            break
    assert heard is not None
    assert listeners[1].next(0.3) is None
    until(lambda: "unauthorised" in drops)
    for part in (broadcaster, *listeners):
        part.close()


def test_tcp_without_keys_is_refused() -> None:
    with pytest.raises(InputError, match="needs the keys of the run"):
        Server("tcp://127.0.0.1:1", Sender("run", "x"), lambda body: {}, lambda cause: None)
    with pytest.raises(InputError, match="needs the keys of the run"):
        Client("tcp://127.0.0.1:1", Sender("run", "x"), lambda body: {}, lambda cause: None)
    keys = Keys.create().of_client()
    with pytest.raises(InputError, match="these keys are a client's"):
        Server("tcp://127.0.0.1:1", Sender("run", "x", keys=keys), lambda body: {}, lambda cause: None)


def test_keys_show_in_no_text() -> None:
    keys = Keys.create()
    text = repr(keys) + repr(Sender("run", "x", keys=keys))
    assert keys.server_secret not in text
    assert keys.client_secret not in text


def test_key_files_are_their_owners_alone(tmp_path: Path) -> None:
    path, keys = tmp_path / "keys.json", Keys.create()
    path.touch(0o644)
    keys.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Keys.load(path) == keys
    os.chmod(path, 0o640)
    with pytest.raises(InputError, match="can be read by others"):
        Keys.load(path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"server_public": 1}', "\x00", '"' * 5000, "[" * 3000])
def test_what_is_no_key_file_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match="expected the keys of a run"):
        Keys.load(path)


class Relay(threading.Thread):
    """Passes bytes on between a client and a server, and keeps them."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target, self.seen = target, bytearray()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    def run(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._copy, args=(far, near), daemon=True).start()
        self._copy(near, far)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)

    def close(self) -> None:
        self._listening.close()


def test_nobody_on_the_wire_sees_an_array(door: Door) -> None:
    relay = Relay(int(door.endpoint.rpartition(":")[2]))
    relay.start()
    assert ask(f"tcp://127.0.0.1:{relay.port}", door.keys) == "taken"
    relay.close()
    assert len(relay.seen) > MARK.nbytes
    assert MARK.tobytes()[:32] not in relay.seen
    assert b"chunk" not in relay.seen


def test_the_relay_would_have_seen_it() -> None:
    """The same without CURVE, on a raw socket."""
    context = zmq.Context.instance()
    server = context.socket(zmq.PULL)
    relay = Relay(server.bind_to_random_port("tcp://127.0.0.1"))
    relay.start()
    client = context.socket(zmq.PUSH)
    client.connect(f"tcp://127.0.0.1:{relay.port}")
    client.send(MARK.tobytes())
    assert server.poll(5000)
    assert MARK.tobytes()[:32] in relay.seen
    for part in (server, client):
        part.close(linger=0)
    relay.close()


def test_a_token_is_one_word_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(InputError, match="make one"):
        read_token(path)
    path.write_text("word\n")
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == "word"
    path.write_text("two words\n")
    with pytest.raises(InputError, match="one word"):
        read_token(path)
