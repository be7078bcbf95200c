"""Request and answer over ZeroMQ (`Client` DEALER → `Server` ROUTER): chunks, reward queries, evaluations, status.

A client asks after an overdue request with a message of one small frame (`Inquiry`), which travels behind the request
and so is answered when that has arrived, however large it is. A server that is at work on it says so; one that was
started again, or never got it, says that it is unknown, and only then it is sent again. The server recognises a request
by (sender, incarnation, sequence number): it takes effect exactly once per server start, over any cut. The answer is
kept until the client's next message shows that it has it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from bm3il.protocol.codec import MAX_MESSAGE_BYTES, encode, frame_limit
from bm3il.protocol.errors import DeadlineError, ProtocolError
from bm3il.protocol.keys import secure_client, secure_server
from bm3il.protocol.ledger import ANSWERED, UNKNOWN, Ledger
from bm3il.protocol.messages import Inquiry, Message, Refusal, Schema, Sender, Standing, answers
from bm3il.protocol.sockets import (
    MESSAGES_PER_POLL,
    CountDrop,
    Drops,
    bind,
    decode_frames,
    num_bytes,
    open_socket,
    send,
)
from bm3il.protocol.specs import ArrayTable

log = logging.getLogger(__name__)

STOPPED_SECONDS = 0.5
"""A wait that outlasts its timeout by more was no wait: the process was stopped, and what is there may be old."""
FIRST_INQUIRY_SECONDS, LAST_INQUIRY_SECONDS = 1.0, 8.0
"""Between the times that a client asks after a request, doubled each time: a restarted server is heard of within
seconds, and a busy one is not made busier."""

CountBytes = Callable[[str, int], None]
"""Is told of bytes of whole requests, and whether they were `sent` or `resent`."""


class Unanswered(DeadlineError):
    """No answer within the deadline; the text says who was asked for what, and for how long."""


class Refused(RuntimeError):
    """The other side understood the request and refused it; `cause` is for programs."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.cause = refusal.cause


@dataclass(frozen=True)
class Request:
    """A request at the server; give it back to `Server.answer`.

    arrived: monotonic seconds when it came, if that was waited for, else when the socket was last seen empty: ZeroMQ
        does not tell when, only not before that.
    """

    message: Message
    peer: bytes
    arrived: float


class Server:
    """The answering end. Not thread-safe: one thread owns it.

    max_frame_bytes: of `frame_limit`; who sends more is cut off before it is read.
    count_bytes: of requests that come; `resent` are those that had come before.
    """

    def __init__(
        self,
        endpoint: str,
        sender: Sender,
        schema: Schema,
        count_drop: CountDrop,
        max_frame_bytes: int = frame_limit(),
        count_bytes: CountBytes = lambda kind, count: None,
    ) -> None:
        self._socket = open_socket(zmq.ROUTER, max_frame_bytes, max_frame_bytes)
        self._socket.router_handover = True
        secure_server(self._socket, endpoint, sender.keys, count_drop)
        bind(self._socket, endpoint)
        self._sender, self._schema = sender, schema
        self._drops, self._count_bytes = Drops(count_drop), count_bytes
        self._ledger = Ledger()
        self._empty_at = time.monotonic()

    def poll(self, timeout_seconds: float) -> list[Request]:
        """New requests, waiting up to `timeout_seconds` for the first; of many, the rest comes with the next call."""
        requests: list[Request] = []
        if self._wait(timeout_seconds):
            for _ in range(MESSAGES_PER_POLL):
                if (request := self._receive()) is _NOTHING:
                    self._empty_at = time.monotonic()
                    break
                if request is not None:
                    requests.append(request)
        return requests

    def answer(self, request: Request, body: Any, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Answer a request. The answer is kept, and its arrays must not change, until the client has it."""
        message = request.message
        frames = encode(self._sender, message.sequence, body, arrays)
        self._ledger.keep(message.sender, message.sequence, frames)
        self._send(request.peer, frames)

    def close(self) -> None:
        """Close at once; unsent answers are asked for again by their clients."""
        self._socket.close(linger=0)

    def _wait(self, timeout_seconds: float) -> bool:
        """Whether something is there, at once or within the timeout."""
        if self._socket.poll(0):
            return True
        self._empty_at = time.monotonic()
        found = bool(self._socket.poll(int(timeout_seconds * 1000)))
        if (now := time.monotonic()) - self._empty_at <= timeout_seconds + STOPPED_SECONDS:
            self._empty_at = now
        return found

    def _receive(self) -> Any:
        try:
            peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return _NOTHING
        try:
            message = decode_frames(frames, self._sender.run, self._accepts)
        except ProtocolError as error:
            self._drops.add(peer.bytes.hex(), error)
            if error.cause in ("version", "array_table", "body"):
                # An honest peer of another release would otherwise wait for an answer for ever.
                # Under -1, as the number of a message that was not understood is not known.
                self._send(peer.bytes, encode(self._sender, -1, Refusal(error.cause, str(error))))
            return None
        if isinstance(message.body, Inquiry):
            self._send(peer.bytes, self._look_up(message))
            return None
        is_new = self._ledger.enter(message)
        self._count_bytes("sent" if is_new else "resent", num_bytes(frames))
        return Request(message, peer.bytes, self._empty_at) if is_new else None

    def _accepts(self, body: Any) -> ArrayTable | None:
        return {} if isinstance(body, Inquiry) else self._schema(body)

    def _look_up(self, inquiry: Message) -> list[Any]:
        """The answer to an inquiry. That of the request is not sent unasked: it may well be on its way already."""
        state, frames = self._ledger.look_up(inquiry)
        if state != ANSWERED or not inquiry.body.repeat:
            return encode(self._sender, inquiry.sequence, Standing(state, inquiry.body.attempt))
        gone = Refusal("answer_gone", "the answer was kept no longer, for want of room, when it was asked for again")
        return frames or encode(self._sender, inquiry.sequence, gone)

    def _send(self, peer: bytes, frames: list[Any]) -> None:
        try:
            send(self._socket, [peer, *frames])
        except zmq.ZMQError:  # the peer is gone, or its queue is full: it will ask again
            log.debug("an answer could not be sent", exc_info=True)


class Client:
    """The asking end. Several requests may be under way (`submit`, then `result`). Not thread-safe.

    largest_bytes: of a frame that answers, as in `frame_limit`.   count_bytes: of requests that are sent.
    """

    def __init__(
        self,
        endpoint: str,
        sender: Sender,
        schema: Schema,
        count_drop: CountDrop,
        largest_bytes: int = frame_limit(),
        count_bytes: CountBytes = lambda kind, count: None,
    ) -> None:
        self.endpoint = endpoint
        self._socket = open_socket(zmq.DEALER, MAX_MESSAGE_BYTES, largest_bytes)
        secure_client(self._socket, endpoint, sender.keys)
        self._socket.connect(endpoint)
        self._sender, self._schema = sender, schema
        self._drops, self._count_bytes = Drops(count_drop), count_bytes
        self._sequence = 0
        self._pending: dict[int, _Pending] = {}
        self._answers: dict[int, Message] = {}

    @property
    def pending(self) -> int:
        """Requests without an answer yet."""
        return len(self._pending)

    def pending_of(self, kind: type[Any]) -> int:
        """Those whose body is of this kind."""
        return sum(isinstance(pending.body, kind) for pending in self._pending.values())

    def submit(self, body: Any, arrays: Mapping[str, np.ndarray] | None = None) -> int:
        """Send a request; its arrays must not change until it is answered. Returns the ticket for `result`."""
        return self._start(body, arrays, wanted=True)

    def tell(self, body: Any, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """As `submit`, for nobody who wants the answer: it is asked after until it is there, and not kept."""
        self._start(body, arrays, wanted=False)

    def pump(self, timeout_seconds: float = 0.0) -> None:
        """Take in answers, waiting up to `timeout_seconds` for the first, and ask after what is overdue."""
        if self._socket.poll(int(timeout_seconds * 1000)):
            for _ in range(MESSAGES_PER_POLL):
                if not self._receive():
                    break
        now = time.monotonic()
        for sequence, pending in self._pending.items():
            if now >= pending.ask_at:
                self._ask_after(sequence, pending)

    def result(self, ticket: int, deadline_seconds: float, abort: Callable[[], None] = lambda: None) -> Message:
        """The answer to a submitted request. `abort` is called while waiting and may raise.

        Raises Unanswered after `deadline_seconds`, Refused if the server refused.
        """
        start = time.monotonic()
        while ticket not in self._answers:
            waited = time.monotonic() - start
            if waited > deadline_seconds:
                kind = self._pending.pop(ticket).body.kind
                raise Unanswered(f"no answer to '{kind}' from {self.endpoint} within {waited:.0f} s")
            abort()
            self.pump(min(0.2, deadline_seconds))
        message = self._answers.pop(ticket)
        if isinstance(message.body, Refusal):
            raise Refused(message.body)
        return message

    def take(self, ticket: int) -> Message | None:
        """The answer if it has come."""
        return self._answers.pop(ticket, None)

    def request(
        self,
        body: Any,
        arrays: Mapping[str, np.ndarray] | None = None,
        deadline_seconds: float = 60.0,
        abort: Callable[[], None] = lambda: None,
    ) -> Message:
        """`submit` and `result` in one."""
        return self.result(self.submit(body, arrays), deadline_seconds, abort)

    def forget(self) -> None:
        """Drop all requests under way and answers not taken."""
        self._pending.clear()
        self._answers.clear()

    def close(self, linger_seconds: float = 0.0) -> None:
        """Close, waiting up to `linger_seconds` for unsent requests."""
        self._socket.close(linger=int(linger_seconds * 1000))

    def _start(self, body: Any, arrays: Mapping[str, np.ndarray] | None, wanted: bool) -> int:
        self._sequence += 1
        frames = encode(self._sender, self._sequence, body, arrays, self._settled())
        self._pending[self._sequence] = pending = _Pending(body, frames, wanted, FIRST_INQUIRY_SECONDS)
        self._transmit(pending)
        return self._sequence

    def _settled(self) -> int:
        return min(self._pending, default=self._sequence)

    def _transmit(self, pending: _Pending) -> None:
        """Send the request."""
        pending.ask_at = time.monotonic() + pending.ask_seconds
        if self._sent(pending.frames):
            self._count_bytes("resent" if pending.attempt else "sent", num_bytes(pending.frames))
            pending.attempt += 1

    def _ask_after(self, sequence: int, pending: _Pending, repeat: bool = False) -> None:
        """Ask what became of the request, or for its answer once more."""
        if not pending.attempt:
            self._transmit(pending)
            return
        pending.attempt += repeat
        pending.ask_at = time.monotonic() + pending.ask_seconds
        pending.ask_seconds = min(2 * pending.ask_seconds, LAST_INQUIRY_SECONDS)
        self._sent(encode(self._sender, sequence, Inquiry(pending.attempt, repeat), settled=self._settled()))

    def _sent(self, frames: list[Any]) -> bool:
        try:
            send(self._socket, frames)
        except zmq.Again:  # the queue is full: the request is overdue later
            return False
        return True

    def _heard(self, sequence: int, pending: _Pending, standing: Standing) -> None:
        """What the server knows of a request. Of many that were asked after the same attempt the first counts."""
        if standing.attempt != pending.attempt:
            return
        if standing.state == UNKNOWN:
            self._transmit(pending)
        elif standing.state == ANSWERED:  # and the answer, which would have come before, was lost
            self._ask_after(sequence, pending, repeat=True)

    def _accepts(self, body: Any) -> ArrayTable | None:
        return {} if isinstance(body, Standing) else self._schema(body)

    def _receive(self) -> bool:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        try:
            message = decode_frames(frames, self._sender.run, self._accepts)
            pending = self._pending.get(message.sequence)
            if isinstance(message.body, Standing):
                if pending is not None:
                    self._heard(message.sequence, pending, message.body)
                return True
            if pending is not None and not answers(message.body, pending.body):
                raise ProtocolError("kind", f"'{message.body.kind}' does not answer {pending.body}")
        except ProtocolError as error:
            self._drops.add(self.endpoint, error)
            return True
        if message.sequence == -1 and isinstance(message.body, Refusal):
            raise Refused(message.body)
        self._pending.pop(message.sequence, None)
        if pending is not None and pending.wanted:
            self._answers[message.sequence] = message
        return True


@dataclass
class _Pending:
    """attempt: as in `Inquiry`; 0 until the request has been sent."""

    body: Any
    frames: list[Any]
    wanted: bool
    ask_seconds: float
    ask_at: float = 0.0
    attempt: int = 0


_NOTHING = object()
