"""ZeroMQ sockets as all channels open them: limits, heartbeats, what is dropped.

Over TCP all of them speak CURVE with the keys of their sender (`protocol.keys`).
Whatever cannot be decoded is counted by cause, logged once per sender and cause, and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from bm3il.protocol.codec import MAX_ARRAYS, decode
from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.ledger import CLIENTS_KEPT
from bm3il.protocol.messages import Message, Schema

log = logging.getLogger(__name__)

ZERO_COPY_BYTES = 1 << 16
"""Of a frame; libzmq calls back for each one that it was lent, which costs more than to copy a smaller one."""
MESSAGES_PER_POLL = 256
"""Taken in at once; who floods a socket delays its owner's other work, and cannot hold it for ever."""
HEARTBEAT_SECONDS, SILENCE_SECONDS = 5.0, 30.0
SLOWEST_BYTES_PER_SECOND = 4e6
"""A third of a network of 100 Mbit/s. Whoever sends a large frame can answer no heartbeat before its end, and shall not
be taken for silent before that."""

CountDrop = Callable[[str], None]
_MORE = zmq.NOBLOCK | zmq.SNDMORE


def open_socket(kind: int, max_frame_bytes: int, largest_bytes: int) -> zmq.Socket[bytes]:
    """A peer of whom nothing comes for longer than the largest frame takes is cut off, to connect again.

    max_frame_bytes: whoever connects takes what its server sends, whom it has reason to trust: libzmq would end such a
        connection over a large frame for ever, and not only until the next try.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.linger = 0
    socket.maxmsgsize = max_frame_bytes  # libzmq's limit is on each frame
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 1000
    socket.handshake_ivl = 5000
    socket.set_hwm(64)
    # Only to notice a silent peer; what a disconnect loses is resent.
    silence_seconds = SILENCE_SECONDS + largest_bytes / SLOWEST_BYTES_PER_SECOND
    socket.heartbeat_ivl, socket.heartbeat_timeout = int(1000 * HEARTBEAT_SECONDS), int(1000 * silence_seconds)
    return socket


def bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Listen there. Raises InputError, and closes the socket, if somebody else does, or it cannot be."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise InputError(f"cannot listen on {endpoint}: {error.strerror}; is another run using it?") from error


def send(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    """Without waiting; large frames are lent, not copied. Raises zmq.Again if the queue is full."""
    # Only the first frame can find the queue full: libzmq counts whole messages, and takes all of one it has begun.
    for frame in frames[:-1]:
        socket.send(frame, _MORE, copy=len(frame) < ZERO_COPY_BYTES)
    socket.send(frames[-1], zmq.NOBLOCK, copy=len(frames[-1]) < ZERO_COPY_BYTES)


def num_bytes(frames: list[Any]) -> int:
    """Of a whole message."""
    return sum(len(frame) for frame in frames)


def decode_frames(frames: list[zmq.Frame], run: str, schema: Schema) -> Message:
    """As `protocol.codec.decode`. Raises ProtocolError."""
    if len(frames) > MAX_ARRAYS + 1:
        raise ProtocolError("frame", f"more than {MAX_ARRAYS} arrays in one message")
    return decode([frame.buffer for frame in frames], run, schema)


class Drops:
    """Counts every dropped message, and logs the first of each sender and cause."""

    def __init__(self, count: CountDrop) -> None:
        self._count = count
        self._logged: set[tuple[str, str]] = set()

    def add(self, sender: str, error: ProtocolError) -> None:
        self._count(error.cause)
        if (sender, error.cause) not in self._logged and len(self._logged) < CLIENTS_KEPT:
            self._logged.add((sender, error.cause))
            log.warning("dropped a message from %s (%s): %s", sender, error.cause, error)
