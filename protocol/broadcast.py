"""Broadcast (`Broadcaster` XPUB → `Listener` SUB): policy weights. A late subscriber gets the newest at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zmq

from bm3il.protocol.codec import MAX_MESSAGE_BYTES, encode, frame_limit
from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.keys import secure_client, secure_server
from bm3il.protocol.messages import Message, Schema, Sender
from bm3il.protocol.sockets import MESSAGES_PER_POLL, CountDrop, Drops, bind, decode_frames, open_socket, send

MAX_SUBSCRIPTION_BYTES = 1024
"""What a listener sends, the handshake included."""


class Broadcaster:
    """The sending end of a broadcast: never blocks; a slow listener loses messages, and `pump` repeats the newest."""

    def __init__(self, endpoint: str, sender: Sender, count_drop: CountDrop) -> None:
        self._socket = open_socket(zmq.XPUB, MAX_SUBSCRIPTION_BYTES, MAX_SUBSCRIPTION_BYTES)
        # Otherwise only the first of several listeners is heard of, and later ones would not be sent the newest.
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        secure_server(self._socket, endpoint, sender.keys, count_drop)
        bind(self._socket, endpoint)
        self._sender = sender
        self._sequence = 0
        self._newest: list[Any] | None = None
        self._kept: list[Any] | None = None

    def publish(self, body: Any, arrays: Mapping[str, np.ndarray], keep: bool = False) -> None:
        """Send to all listeners; remembered for those who subscribe later. The arrays must not change afterwards.

        keep: until `forget`, who subscribes gets this one, too, before the newest.
        """
        self._sequence += 1
        self._newest = encode(self._sender, self._sequence, body, arrays)
        if keep:
            self._kept = self._newest
        send(self._socket, self._newest)

    def forget(self) -> None:
        """What was kept."""
        self._kept = None

    def pump(self, repeat: bool = False) -> None:
        """Send the newest message again if somebody subscribed since, or if `repeat`."""
        subscribed = False
        for _ in range(MESSAGES_PER_POLL):
            if not self._socket.poll(0):
                break
            subscribed |= self._socket.recv().startswith(b"\x01")
        if subscribed and self._kept is not None and self._kept is not self._newest:
            send(self._socket, self._kept)
        if (subscribed or repeat) and self._newest is not None:
            send(self._socket, self._newest)

    def close(self) -> None:
        self._socket.close(linger=0)


class Listener:
    """The receiving end of a broadcast."""

    def __init__(
        self,
        endpoint: str,
        sender: Sender,
        schema: Schema,
        count_drop: CountDrop,
        largest_bytes: int = frame_limit(),
    ) -> None:
        """largest_bytes: of a frame that comes, as in `frame_limit`."""
        self._socket = open_socket(zmq.SUB, MAX_MESSAGE_BYTES, largest_bytes)
        self._socket.subscribe(b"")
        secure_client(self._socket, endpoint, sender.keys)
        self._socket.connect(endpoint)
        self._sender, self._schema = sender, schema
        self._drops = Drops(count_drop)
        self.endpoint = endpoint

    def next(self, timeout_seconds: float) -> Message | None:
        """The next message, or None after `timeout_seconds`."""
        if not self._socket.poll(int(timeout_seconds * 1000)):
            return None
        try:
            return decode_frames(self._socket.recv_multipart(copy=False), self._sender.run, self._schema)
        except ProtocolError as error:
            self._drops.add(self.endpoint, error)
            return None

    def newest(self, timeout_seconds: float) -> Message | None:
        """The last message that has come; older ones are skipped."""
        # Not zmq.CONFLATE, which keeps single frames and not messages of several.
        newest = message = self.next(timeout_seconds)
        while message is not None:
            newest, message = message, self.next(0)
        return newest

    def close(self) -> None:
        self._socket.close(linger=0)
