"""Messages: typed bodies, one for all that processes tell each other, and the envelope that says who sent it.

Arrays travel beside a body, by name; `protocol.codec` has their form on the wire, `protocol.channels` and
`protocol.broadcast` carry them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Union

import numpy as np

from bm3il.protocol.keys import Keys
from bm3il.protocol.specs import ArrayTable

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
