"""Who may talk to a run over TCP: CURVE keys, made for each start of a run (design: security).

A server proves that it is the run's by its secret key, a client that it belongs to the run by its own. All processes of
a run share one pair for each side. A socket without keys listens on `ipc://` or `inproc://` only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket as sockets
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from bm3il.protocol.errors import InputError

log = logging.getLogger(__name__)

KEY_CHARACTERS = 40
LOGGED_ADDRESSES = 100
MONITOR_POLL_SECONDS = 1.0
FIELDS = ("server_public", "server_secret", "client_public", "client_secret")

REFUSALS = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it has another run's key, or one of an earlier start",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it has no key, or does not speak our protocol",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it ended the handshake, or took another server for ours",
}


UNAUTHORISED = "unauthorised"
"""Cause of a drop: who connects has no key of the run."""


@dataclass(frozen=True)
class Keys:
    """Both pairs in Z85, 40 characters each; `server_secret` is empty where nobody listens (an actor that joins)."""

    server_public: str
    server_secret: str = field(repr=False)
    client_public: str
    client_secret: str = field(repr=False)

    @classmethod
    def create(cls) -> Keys:
        """New ones."""
        server, client = ([part.decode() for part in zmq.curve_keypair()] for _ in range(2))
        return cls(*server, *client)

    def of_client(self) -> Keys:
        """Without the secret of the servers."""
        return Keys(self.server_public, "", self.client_public, self.client_secret)

    def to_text(self) -> str:
        """For a file; `from_text` is the inverse."""
        return json.dumps({name: getattr(self, name) for name in FIELDS})

    @classmethod
    def from_text(cls, text: str) -> Keys:
        """Raises InputError for anything but the text of keys; it never shows the text."""
        try:
            value = json.loads(text)
            keys = cls(*(value[name] for name in FIELDS))
            for name in FIELDS:
                if name != "server_secret" or keys.server_secret:
                    _check(getattr(keys, name))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("expected the keys of a run, as its launcher wrote them") from error
        return keys

    def save(self, path: Path) -> None:
        """Write a file that only its owner can read. Raises InputError."""
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as opened:
                # A file that was there before has kept its mode.
                os.fchmod(opened.fileno(), 0o600)
                opened.write(self.to_text())
        except OSError as error:
            raise InputError(f"cannot write the keys {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Raises InputError for a file that is no keys, or that others can read."""
        text = _read_private(path, "the keys", "they are there while the run runs")
        try:
            return cls.from_text(text)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def read_token(path: Path) -> str:
    """The word that metrics are asked with. Raises InputError for a file that others can read, or without one word."""
    words = _read_private(path, "the token", "make one: (umask 077; openssl rand -hex 24 > FILE)").split()
    if len(words) != 1 or not words[0].isascii():
        raise InputError(f"{path}: expected one word of ASCII characters, found {len(words)} words")
    return words[0]


def _read_private(path: Path, what: str, hint: str) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise InputError(f"{path} can be read by others (mode {mode:o}): chmod 600 {path}")
        with path.open(encoding="utf-8") as file:
            return file.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {what} {path}: {error}; {hint}") from error


def secure_client(socket: zmq.Socket[bytes], endpoint: str, keys: Keys | None) -> None:
    """Before `connect`: speak CURVE over TCP. Raises InputError without keys."""
    if not endpoint.startswith("tcp:"):
        return
    keys = _needed(keys, endpoint)
    socket.curve_serverkey = keys.server_public.encode()
    socket.curve_publickey, socket.curve_secretkey = keys.client_public.encode(), keys.client_secret.encode()


def secure_server(
    socket: zmq.Socket[bytes], endpoint: str, keys: Keys | None, count_drop: Callable[[str], None]
) -> None:
    """Before `bind`: over TCP answer nobody but clients of the run. Who is refused is counted (cause `unauthorised`)
    and named in the log. Raises InputError without keys.
    """
    if not endpoint.startswith("tcp:"):
        return
    keys = _needed(keys, endpoint)
    if not keys.server_secret:
        raise InputError(f"these keys are a client's; nobody can listen on {endpoint} with them")
    # One for each socket: the authenticator is the whole process's, and tells sockets apart by their domains alone.
    domain = f"bm3il-{next(_DOMAINS)}"
    socket.curve_secretkey, socket.curve_publickey = keys.server_secret.encode(), keys.server_public.encode()
    socket.curve_server, socket.zap_domain = True, domain.encode()
    _authenticator().configure_curve_callback(domain, _Allowed(keys.client_public))
    _Doorkeeper(socket, endpoint, count_drop).start()


class _Allowed:
    """What the authenticator asks: may who has this public key come in?"""

    def __init__(self, public: str) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key.decode() == self._public


_DOORS = count()


class _Doorkeeper(threading.Thread):
    """Counts and names who is refused by a listening socket; ends when the socket is closed."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, count_drop: Callable[[str], None]) -> None:
        super().__init__(name="doorkeeper", daemon=True)
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
        for event in REFUSALS:
            events |= event
        # Named by pyzmq it would be by the file descriptor: the next socket can have that before this monitor is gone.
        self._monitor = socket.get_monitor_socket(events, f"inproc://doorkeeper-{next(_DOORS)}")
        self._endpoint, self._count_drop = endpoint, count_drop
        self._peers: dict[int, str] = {}
        self._refused: zmq.Event | None = None
        self._logged: set[str] = set()

    def run(self) -> None:
        while True:
            try:
                if not self._monitor.poll(int(MONITOR_POLL_SECONDS * 1000)):
                    continue
                message: Any = recv_monitor_message(self._monitor)
            except zmq.ZMQError:
                return
            if message["event"] == zmq.EVENT_MONITOR_STOPPED:
                self._monitor.close()
                return
            self._note(message["event"], message["value"])

    def _note(self, event: zmq.Event, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._peers[value] = _peer(value)
        elif event in REFUSALS:
            self._count_drop(UNAUTHORISED)
            self._refused = event
        elif event == zmq.EVENT_DISCONNECTED:
            peer = self._peers.pop(value, "somebody")
            if self._refused is not None:  # libzmq tells why first, and then whose connection it closes
                self._say(peer, REFUSALS[self._refused])
                self._refused = None

    def _say(self, peer: str, why: str) -> None:
        host = peer.rpartition(":")[0]
        if host not in self._logged and len(self._logged) < LOGGED_ADDRESSES:
            self._logged.add(host)
            log.warning("refused a connection of %s to %s: %s", peer, self._endpoint, why)


_DOMAINS = count()
_authenticators: dict[zmq.Context[Any], ThreadAuthenticator] = {}


def _authenticator() -> ThreadAuthenticator:
    """One for the life of the process: libzmq has one place to ask."""
    context: zmq.Context[Any] = zmq.Context.instance()
    if context not in _authenticators:
        _authenticators[context] = ThreadAuthenticator(context)
        _authenticators[context].start()
    return _authenticators[context]


def _needed(keys: Keys | None, endpoint: str) -> Keys:
    if keys is None:
        raise InputError(f"{endpoint} needs the keys of the run: traffic over TCP is always encrypted")
    return keys


def _check(key: Any) -> None:
    if not isinstance(key, str) or len(key) != KEY_CHARACTERS:
        raise ValueError(f"a key has {KEY_CHARACTERS} characters")
    zmq.curve_public(key.encode())  # raises for what is not Z85


def _peer(descriptor: int) -> str:
    """Address of a connection, which libzmq may close at any time."""
    try:
        # A duplicate: to close this object must not close the connection, which is libzmq's.
        with sockets.socket(fileno=os.dup(descriptor)) as connection:
            host, port = connection.getpeername()[:2]
            return f"{host}:{port}"
    except OSError as error:
        return f"somebody ({errno.errorcode.get(error.errno or 0, 'gone')})"
