"""Messages: a typed body, an envelope that says who sent it, and named arrays; and their form on the wire.

One message is one ZeroMQ multipart message: frame 0 is the msgpack header

    {"v": protocol version, "kind": str, "run": str, "sender": str, "incarnation": str, "seq": int, "settled": int,
     "body": {field: value}, "arrays": [[name, dtype, [shape]], ...]}

and one raw, C-contiguous, little-endian frame follows per array. `seq` numbers the requests of a client from 1; an
answer has the number of its request. All requests of its sender below `settled` have their answers, or are given up.

Nothing is ever unpickled. `decode` checks header and array table against limits, and the receiver's schema, before it
looks at a frame; arrays are views of the frames.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Union, get_type_hints

import msgpack
import numpy as np

from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.keys import Keys
from bm3il.protocol.specs import ArrayTable

PROTOCOL_VERSION = 9
MAX_HEADER_BYTES, MAX_ARRAYS, MAX_RANK, MAX_TEXT = 1 << 20, 4096, 8, 8192
"""Of a header, from whomever it is: far above what a run of hundreds of types sends, and parsed within milliseconds."""
MAX_MESSAGE_BYTES = 1 << 31
"""Of all arrays, where the receiver knows no lower limit; most do, from the shapes that they expect."""
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int64", "int32", "int16", "uint8", "bool")}

INCARNATION = re.compile("[0-9a-f]{24}")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Weights:
    """Learner → actors and evaluators: the policy after `version` iterations. Arrays: its parameters.

    evaluate_episodes: episodes that the evaluator shall play with it, if it has the time; 0 for a version that is not
    evaluated.
    """

    kind: ClassVar[str] = "weights"
    session: str
    version: int
    evaluate_episodes: int


@dataclass(frozen=True)
class Chunk:
    """Actor → learner: whole episodes collected with policy `version`. Arrays: `Trajectories.to_arrays`.

    next_version: the oldest version that the actor's next chunk can be of.
    """

    kind: ClassVar[str] = "chunk"
    session: str
    version: int
    next_version: int
    actor: int
    steps: int
    episodes: int
    collect_seconds: float


@dataclass(frozen=True)
class Working:
    """Actor → learner: it is at work on a chunk, and its simulator comes back from its steps."""

    kind: ClassVar[str] = "working"
    actor: int


@dataclass(frozen=True)
class Leaving:
    """Actor → learner: it was told to end, and its chunks so far were its last; nobody need wait for another."""

    kind: ClassVar[str] = "leaving"
    actor: int


@dataclass(frozen=True)
class Evaluating:
    """Evaluator → learner: it is at work, and has played so many of the episodes that it shall play."""

    kind: ClassVar[str] = "evaluating"
    episodes: int
    of: int


@dataclass(frozen=True)
class Evaluation:
    """Evaluator → learner: true returns of policy `version`. Arrays: `returns` [episodes, N] float32, of fewer episodes
    than were asked for if time was short; and what they are held against, `random` [N] float32, every agent's mean true
    return under the uniform policy."""

    kind: ClassVar[str] = "evaluation"
    session: str
    version: int
    episodes: int


@dataclass(frozen=True)
class Begin:
    """Learner → reward server: start a session, from the arrays given if `restore`, else from the seed.

    held: how many of the newest rows that will be shown are to be kept, for queries by number.
    first: the number of the first one.
    """

    kind: ClassVar[str] = "begin"
    session: str
    restore: bool
    held: int = 0
    first: int = 0


@dataclass(frozen=True)
class Hold:
    """Learner → reward server: rows to be kept under the next numbers, as in `Update`; nothing is learned from them
    yet. What the learner has kept from before the session began, and what it wants rewards of before an update.
    """

    kind: ClassVar[str] = "hold"
    session: str
    rows: int


@dataclass(frozen=True)
class Update:
    """Learner → reward server: observe fresh agent rows, which get the next numbers, and update the particles; the
    answer is `Statistics`. Arrays per block b: the columns of `protocol.observations` that are observed, `b.actions`,
    `b.active`; or, if `numbered`, of rows that were shown by `Hold`, their `numbers` [rows] int64.

    progress: the part of the run that is done, 0..1, for the learning-rate schedule.
    """

    kind: ClassVar[str] = "update"
    session: str
    rows: int
    progress: float
    numbered: bool = False


@dataclass(frozen=True)
class Query:
    """Learner → reward server: rewards of rows, as in `Update`, or, if `numbered`, of those that have the `numbers`
    [rows] int64; the answer is `Rewards`.

    With `reward_source="environment"` the arrays `b.rewards` come along and are answered as they came.
    deviation: also answer the standard deviation over particles.
    alone: do not compute these rows together with others', so that rounding depends on nobody else (lockstep).
    """

    kind: ClassVar[str] = "query"
    session: str
    rows: int
    deviation: bool = False
    alone: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class GetState:
    """Learner → reward server: everything that a restart needs; the answer is `Begin`-ready arrays."""

    kind: ClassVar[str] = "get_state"
    session: str


@dataclass(frozen=True)
class Rewards:
    """Reward server → learner. Arrays per block b: `b.rewards` [B, N_b] and, if `deviation`, `b.deviation`."""

    kind: ClassVar[str] = "rewards"
    rows: int
    particles_version: int
    queue_seconds: float
    compute_seconds: float
    deviation: bool = False


@dataclass(frozen=True)
class Statistics:
    """Reward server → learner: health of the discriminators after an update, and the particles' version."""

    kind: ClassVar[str] = "statistics"
    particles_version: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The request was carried out; some requests are answered with arrays."""

    kind: ClassVar[str] = "done"
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """The request was understood and cannot be carried out. `cause` is for programs, `text` for people."""

    kind: ClassVar[str] = "refusal"
    cause: str
    text: str


@dataclass(frozen=True)
class Status:
    """Any process → director: alive, in `stage`; the numbers that its live view shows."""

    kind: ClassVar[str] = "status"
    role: str
    index: int
    node: int
    pid: int
    stage: str
    metrics_address: str
    values: dict[str, float] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Inquiry:
    """Client → server, under the number of a request without an answer: what became of it? The answer is `Standing`,
    or, if `repeat` and there is one, the answer to the request once more.

    attempt: how many messages about this request, other than inquiries without `repeat`, its client has sent.
    """

    kind: ClassVar[str] = "inquiry"
    attempt: int
    repeat: bool = False


@dataclass(frozen=True)
class Standing:
    """Server → client: the request of this number is `unknown`, `at_work` or `answered` here.

    attempt: of the inquiry.
    """

    kind: ClassVar[str] = "standing"
    state: str
    attempt: int


@dataclass(frozen=True)
class Event:
    """Any process → director: something has happened that whoever looks after the run wants to read in the morning.

    process: whom it happened to.   at: when, in seconds since the epoch by the clock of the sender.
    """

    kind: ClassVar[str] = "event"
    what: str
    process: str
    text: str
    at: float


Body = Union[  # noqa: UP007  (a runtime value on Python 3.10 too)
    Weights,
    Chunk,
    Working,
    Leaving,
    Evaluating,
    Evaluation,
    Begin,
    Hold,
    Update,
    Query,
    GetState,
    Rewards,
    Statistics,
    Done,
    Refusal,
    Status,
    Inquiry,
    Standing,
    Event,
]
BODIES: dict[str, type[Any]] = {body.kind: body for body in Body.__args__}  # type: ignore[attr-defined]
_FIELDS = {kind: {f.name: get_type_hints(body)[f.name] for f in fields(body)} for kind, body in BODIES.items()}


@dataclass(frozen=True)
class Sender:
    """Who sends: the run, the name within it, and the id of this start (a restart is a new incarnation).

    incarnation: when it was, in nanoseconds since 1970, and a random number, as 16 and 8 hexadecimal digits: so a later
        start has the greater one.

    keys: with which it proves over TCP that it belongs to the run; they are in no message.
    """

    run: str
    name: str
    incarnation: str = field(default_factory=lambda: f"{time.time_ns():016x}{secrets.token_hex(4)}")
    keys: Keys | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Message:
    """A decoded message. `arrays` are read-only views of the received frames.

    settled: all requests of the sender below this number have their answers, or are given up.
    """

    sender: Sender
    sequence: int
    body: Any
    arrays: Arrays
    settled: int = 0


Schema = Callable[[Any], ArrayTable | None]
"""From a body to the array table that must come with it (exactly), or None if the body is not welcome here."""


def encode(
    sender: Sender, sequence: int, body: Any, arrays: Mapping[str, np.ndarray] | None = None, settled: int = 0
) -> list[Any]:
    """The frames of a message: header bytes, then one buffer per array (not copied if C-contiguous)."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    header = {
        "v": PROTOCOL_VERSION,
        "kind": body.kind,
        "run": sender.run,
        "sender": sender.name,
        "incarnation": sender.incarnation,
        "seq": sequence,
        "settled": settled,
        "body": asdict(body),
        "arrays": [[name, _name(array.dtype), list(array.shape)] for name, array in contiguous.items()],
    }
    return [msgpack.packb(header), *(_buffer(array) for array in contiguous.values())]


def decode(frames: Sequence[Any], run: str, schema: Schema) -> Message:
    """Check and read a message of the run `run`.

    frames: bytes-like. `schema` gives the arrays that must come with the body.
    Raises ProtocolError, whose `cause` is one of `header`, `version`, `foreign`, `kind`, `body`, `array_table`,
    `frame`.
    """
    header = _header(frames)
    if header["run"] != run:
        raise ProtocolError("foreign", f"message of run '{header['run'][:64]}' came to run '{run}'")
    body = _body(header["kind"], header["body"])
    expected = schema(body)
    if expected is None:
        raise ProtocolError("kind", f"messages of kind '{header['kind']}' are not accepted here")
    arrays = _arrays(header["arrays"], frames[1:], expected)
    sender = Sender(run, header["sender"], header["incarnation"])
    return Message(sender, header["seq"], body, arrays, header["settled"])


def answers(body: Any, request: Any) -> bool:
    """Whether a body can be the answer to a request; a refusal always can."""
    match request:
        case _ if isinstance(body, Refusal):
            return True
        case Query(rows=rows, deviation=deviation):
            return isinstance(body, Rewards) and (body.rows, body.deviation) == (rows, deviation)
        case Update():
            return isinstance(body, Statistics)
    return isinstance(body, Done)


def table_bytes(table: ArrayTable) -> int:
    """Of all arrays of a table."""
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in table.values())


def frame_limit(*tables: ArrayTable) -> int:
    """Bytes of a frame beyond which a socket that takes headers and these arrays cuts its peer off.

    Twice the largest honest one: who is configured a little differently shall be told so, and not cut off for ever.
    """
    sizes = [table_bytes({"": entry}) for table in tables for entry in table.values()]
    largest = max(MAX_HEADER_BYTES, *sizes, 0)
    return max(largest, min(2 * largest, MAX_MESSAGE_BYTES))


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which numpy makes anew each time


def _buffer(array: np.ndarray) -> memoryview | bytes:
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _header(frames: Sequence[Any]) -> dict[str, Any]:
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError("header", f"expected a header of 1..{MAX_HEADER_BYTES} bytes")
    try:
        header = msgpack.unpackb(
            frames[0], max_str_len=MAX_TEXT, max_array_len=MAX_ARRAYS, max_map_len=MAX_ARRAYS, max_ext_len=0
        )
    except Exception as error:  # msgpack raises ValueError, its own exceptions, and UnicodeDecodeError alike
        raise ProtocolError("header", f"the header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ProtocolError("header", f"expected a map, got {type(header).__name__}")
    if header.get("v") != PROTOCOL_VERSION:
        raise ProtocolError(
            "version",
            f"this side speaks protocol version {PROTOCOL_VERSION}, the sender {header.get('v')!r}: "
            "install the same release of bm3il on every node",
        )
    expected = {"kind": str, "run": str, "sender": str, "incarnation": str, "seq": int, "settled": int}
    expected |= {"body": dict, "arrays": list}
    for key, kind in expected.items():
        if type(header.get(key)) is not kind:
            raise ProtocolError("header", f"header field '{key}' must be {kind.__name__}")
    if not INCARNATION.fullmatch(header["incarnation"]):
        raise ProtocolError("header", "header field 'incarnation' must be 24 hexadecimal digits")
    return header


def _body(kind: str, values: dict[str, Any]) -> Any:
    if kind not in BODIES:
        raise ProtocolError("kind", f"unknown kind '{kind[:64]}'")
    hints = _FIELDS[kind]
    if values.keys() != hints.keys():
        raise ProtocolError("body", f"'{kind}' has the fields {sorted(hints)}, got {sorted(map(str, values))}")
    for name, value in values.items():
        if not _is(value, hints[name]):
            raise ProtocolError("body", f"field '{name}' of '{kind}' must be {hints[name]}, got {type(value).__name__}")
    return BODIES[kind](**values)


def _is(value: Any, hint: Any) -> bool:
    if hint == dict[str, float]:
        return isinstance(value, dict) and all(type(k) is str and type(v) in (int, float) for k, v in value.items())
    return type(value) in ((int, float) if hint is float else (hint,))


def _arrays(table: list[Any], frames: Sequence[Any], expected: ArrayTable) -> Arrays:
    if len(table) != len(frames):
        raise ProtocolError("frame", f"{len(table)} arrays announced, {len(frames)} frames came")
    arrays: Arrays = {}
    for entry, frame in zip(table, frames, strict=True):
        match entry:
            case [str(name), str(dtype), list(shape)] if (
                len(shape) <= MAX_RANK and dtype in DTYPES and all(type(n) is int for n in shape)
            ):
                pass
            case _:
                raise ProtocolError("array_table", "an entry of the array table is not [name, dtype, shape]")
        if name in arrays or name not in expected:
            raise ProtocolError("array_table", f"array '{name[:64]}' is not expected, or came twice")
        if (dtype, tuple(shape)) != expected[name]:
            raise ProtocolError(
                "array_table", f"array '{name}': expected {expected[name]}, found {(dtype, tuple(shape))}"
            )
        size = DTYPES[dtype].itemsize * math.prod(shape)
        if len(frame) != size:
            raise ProtocolError("frame", f"array '{name}' needs {size} bytes, its frame has {len(frame)}")
        arrays[name] = _view(frame, dtype, shape)
    if len(arrays) != len(expected):
        raise ProtocolError("array_table", f"array '{min(set(expected) - set(arrays))}' is missing")
    return arrays


def _view(frame: Any, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype == "bool":
        raw = np.frombuffer(frame, np.uint8)
        if raw.size and raw.max() > 1:
            raise ProtocolError("frame", "a boolean array holds bytes other than 0 and 1")
        return raw.view(np.bool_).reshape(shape)
    return np.frombuffer(frame, DTYPES[dtype]).reshape(shape)
