"""What a server remembers of requests: so each is carried out once, and its answer can be asked for again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from bm3il.protocol.messages import Message, Sender

ANSWER_BYTES_KEPT = 1 << 28
"""Of all clients together, and always the newest answer. A client says with its next message which answers it has, and
those are let go: so many wait only for clients that were cut off, or are no more."""
REQUESTS_KEPT = 1024
"""Of one client, more than any of ours has under way: who sends under ever new numbers shall not fill the memory."""
CLIENTS_KEPT = 4096
"""Whose requests are remembered: nor shall who connects under ever new names."""
UNKNOWN, AT_WORK, ANSWERED = "unknown", "at_work", "answered"

Key = tuple[str, str]


@dataclass
class _Client:
    """Requests of one start of a client, by number: the frames of the answer; None while it is being worked on, and
    no frames if they are kept no longer. All below `settled` are answered, or given up."""

    settled: int = 0
    requests: dict[int, list[Any] | None] = field(default_factory=dict)


class Ledger:
    """Requests are told apart by the start of the client that sent them, and its number for them."""

    def __init__(self) -> None:
        self._clients: OrderedDict[Key, _Client] = OrderedDict()
        self._kept: OrderedDict[tuple[Key, int], int] = OrderedDict()
        self.bytes_kept = 0
        """Of answers."""

    def enter(self, message: Message) -> bool:
        """Note a request that has come; whether it is new, and so to be carried out."""
        key, client = self._client_of(message)
        if message.sequence in client.requests or message.sequence < client.settled:
            return False
        client.requests[message.sequence] = None
        if len(client.requests) > REQUESTS_KEPT:
            oldest = next(iter(client.requests))
            # What is forgotten counts as settled: should it come again, it must not be carried out again.
            client.settled = max(client.settled, oldest + 1)
            self._drop(key, client, oldest)
        return True

    def keep(self, sender: Sender, sequence: int, frames: list[Any]) -> None:
        """Note the answer to a request, unless its client has given it up."""
        key = (sender.name, sender.incarnation)
        client = self._clients.get(key)
        if client is None or sequence not in client.requests:
            return
        self._let_go(key, sequence)
        client.requests[sequence] = frames
        self._kept[key, sequence] = sum(len(frame) for frame in frames)
        self.bytes_kept += self._kept[key, sequence]
        while self.bytes_kept > ANSWER_BYTES_KEPT and len(self._kept) > 1:
            oldest_key, oldest = next(iter(self._kept))
            self._let_go(oldest_key, oldest)
            self._clients[oldest_key].requests[oldest] = []

    def look_up(self, inquiry: Message) -> tuple[str, list[Any]]:
        """What became of the request that has the number of this message: `unknown`, `at_work`, or `answered` with the
        frames, none if they are kept no longer."""
        _, client = self._client_of(inquiry)
        if inquiry.sequence not in client.requests:
            return (ANSWERED if inquiry.sequence < client.settled else UNKNOWN), []
        frames = client.requests[inquiry.sequence]
        return (AT_WORK, []) if frames is None else (ANSWERED, frames)

    def _client_of(self, message: Message) -> tuple[Key, _Client]:
        """Who sent a message; what it says to be settled is forgotten."""
        key = (message.sender.name, message.sender.incarnation)
        client = self._clients.setdefault(key, _Client())
        self._clients.move_to_end(key)
        if message.settled > client.settled:
            client.settled = message.settled
            for number in [number for number in client.requests if number < message.settled]:
                self._drop(key, client, number)
        if len(self._clients) > CLIENTS_KEPT:
            old_key, old = self._clients.popitem(last=False)
            for number in list(old.requests):
                self._drop(old_key, old, number)
        return key, client

    def _drop(self, key: Key, client: _Client, number: int) -> None:
        del client.requests[number]
        self._let_go(key, number)

    def _let_go(self, key: Key, number: int) -> None:
        self.bytes_kept -= self._kept.pop((key, number), 0)
