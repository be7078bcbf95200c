"""How the learner asks for rewards: from a reward server, or from a model in its own process; the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from bm3il.protocol.channels import Client, Refused, Unanswered
from bm3il.protocol.codec import frame_limit
from bm3il.protocol.errors import NumericalError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.messages import (
    Arrays,
    Begin,
    Done,
    GetState,
    Hold,
    Query,
    Refusal,
    Rewards,
    Schema,
    Sender,
    Statistics,
    Update,
)
from bm3il.protocol.sockets import CountDrop
from bm3il.protocol.specs import ArrayTable
from bm3il.reward_server.model import Model

OVERLOAD_PAUSE_SECONDS = 0.05
ROWS_AT_ONCE, AGENTS_AT_ONCE = 10_000, 500_000
"""Of the rows that a session begins with, in one message: fewer than a server takes, and, of agents that are described
by twenty bytes, ten megabytes."""
STATE = "state"
"""The note of a `Done` that carries the arrays of a state."""


@dataclass(frozen=True)
class Kept:
    """Which of the rows that a session observes can be asked for by number.

    capacity: the newest so many.   first: the number of the next row.   rows: those that have the numbers from
    `first` on already, because the learner has them from before.
    """

    capacity: int
    first: int = 0
    rows: JointRows | None = None


NOTHING_KEPT = Kept(0)


class RewardService(Protocol):
    """What the learner needs. `begin` comes first; a missing reward is an error, never a zero.

    All methods but `submit` may raise NumericalError (a reward or a parameter is not finite).
    """

    lag: int
    """By how many updates of the particles the rewards last taken are behind the newest that is known of."""

    def begin(self, session: str, state: Mapping[str, np.ndarray] | None = None, kept: Kept = NOTHING_KEPT) -> None:
        """Start a session: from a `state`, or from the seed."""

    def update(self, rows: JointRows, progress: float) -> int:
        """Hand over fresh rows of the agents, for the particles to learn from; the ticket is for `updated`.

        Whatever is submitted afterwards is answered by the updated particles. Rows must stay as they are until then.
        """

    def updated(self, ticket: int) -> tuple[int, dict[str, float]]:
        """The particles' version afterwards and health figures (`Health.figures`). Each ticket is answered once."""

    def submit(
        self, rows: JointRows, true_rewards: list[torch.Tensor] | None = None, numbers: torch.Tensor | None = None
    ) -> int:
        """Ask for rewards; several queries may be under way. Rows must stay as they are until they are answered.

        numbers: [B] int64 of these rows, if they were all observed and `Kept` says that they are still kept.
        true_rewards: [B, N_b] float32 per block, only for `source="environment"`, which answers them.
        """

    def rewards(self, ticket: int) -> list[torch.Tensor]:
        """The rewards that were asked for, [B, N_b] float32 per block. Each ticket is answered once."""

    def state(self) -> Arrays:
        """Everything that `begin` needs to continue from here."""


class LocalRewards:
    """A reward model in this process (serial mode). `make_model` gives a model as the seed makes it."""

    lag = 0

    def __init__(self, make_model: Callable[[], Model]) -> None:
        self._make_model = make_model
        self._model: Model | None = None
        self._answers: dict[int, list[torch.Tensor]] = {}
        self._updates: dict[int, tuple[int, dict[str, float]]] = {}
        self._ticket = 0

    def begin(self, session: str, state: Mapping[str, np.ndarray] | None = None, kept: Kept = NOTHING_KEPT) -> None:
        self._model = self._make_model()
        self._answers.clear()
        self._updates.clear()
        if state is not None:
            self._model.load_state(state)

    def update(self, rows: JointRows, progress: float) -> int:
        self._begun.observe(rows)
        self._ticket += 1
        figures = self._begun.update(progress)
        self._updates[self._ticket] = self._begun.version, figures
        return self._ticket

    def updated(self, ticket: int) -> tuple[int, dict[str, float]]:
        return self._updates.pop(ticket)

    def submit(
        self, rows: JointRows, true_rewards: list[torch.Tensor] | None = None, numbers: torch.Tensor | None = None
    ) -> int:
        self._ticket += 1
        # `numbers` spare a message its rows; here the rows are at hand.
        self._answers[self._ticket] = self._begun.query(rows, true_rewards=true_rewards)[0]
        return self._ticket

    def rewards(self, ticket: int) -> list[torch.Tensor]:
        return self._answers.pop(ticket)

    def state(self) -> Arrays:
        return self._begun.state()

    @property
    def _begun(self) -> Model:
        if self._model is None:
            raise RuntimeError("`begin` comes first")
        return self._model


@dataclass
class _Asked:
    body: Query
    arrays: Arrays
    ticket: int


class RemoteRewards:
    """The client of a reward server.

    alone: queries are never computed together with others', so that rounding depends on nobody else (lockstep).
    deadline_seconds: longest wait for one answer, after which Unanswered is raised; `abort` is called while waiting
        and may raise. Refused is raised with cause "no_session" when the server has forgotten the session (it was
        restarted): the learner then goes back to its last checkpoint.
    state_table: of `particles.state_table`.
    """

    def __init__(
        self,
        endpoint: str,
        sender: Sender,
        layout: Layout,
        state_table: ArrayTable,
        count_drop: CountDrop,
        deadline_seconds: float = 120.0,
        abort: Callable[[], None] = lambda: None,
        alone: bool = True,
    ) -> None:
        # The run's own server answers as many rows as it was asked for: no limit but the protocol's is known here.
        schema = answer_schema(layout, state_table)
        self._client = Client(endpoint, sender, schema, count_drop, frame_limit(state_table))
        self._blocks = range(len(layout.blocks))
        self._session, self._alone = "", alone
        self._deadline_seconds, self._abort = deadline_seconds, abort
        self._asked: dict[int, _Asked] = {}
        self.particles_version = 0
        """Of the newest answer taken."""
        self._newest_version = 0
        self.lag = 0

    def begin(self, session: str, state: Mapping[str, np.ndarray] | None = None, kept: Kept = NOTHING_KEPT) -> None:
        # What is under way belongs to the session before, and nobody will ask for it.
        self._client.forget()
        self._asked.clear()
        self._session, self.lag, self._newest_version = session, 0, 0
        self._request(Begin(session, state is not None, kept.capacity, kept.first), state)
        if kept.rows is not None:
            num_agents = sum(active.shape[1] for active in kept.rows.active)
            height = max(1, min(ROWS_AT_ONCE, AGENTS_AT_ONCE // num_agents))
            for part in torch.arange(len(kept.rows)).split(height):
                self.hold(kept.rows.select(part))

    def hold(self, rows: JointRows) -> None:
        """Show rows, to be named by their numbers afterwards."""
        self._request(Hold(self._session, len(rows)), rows.on_host().to_arrays())

    def update(self, rows: JointRows, progress: float, numbers: torch.Tensor | None = None) -> int:
        """As in `RewardService`.   numbers: of these rows, if the server was shown them by `hold`."""
        body = Update(self._session, len(rows), progress, numbers is not None)
        return self._client.submit(
            body, rows.on_host().to_arrays() if numbers is None else {"numbers": numbers.numpy()}
        )

    def updated(self, ticket: int) -> tuple[int, dict[str, float]]:
        statistics = self._result(ticket, self._deadline_seconds).body
        self.particles_version = self._newest_version = statistics.particles_version
        return statistics.particles_version, dict(statistics.values)

    def submit(
        self,
        rows: JointRows,
        true_rewards: list[torch.Tensor] | None = None,
        numbers: torch.Tensor | None = None,
        deviation: bool = False,
    ) -> int:
        """As in `RewardService`; with `deviation`, `answer` also gives the standard deviation over particles."""
        numbered = numbers is not None and true_rewards is None
        body = Query(self._session, len(rows), deviation, self._alone, numbered)
        if numbers is not None and numbered:
            arrays: Arrays = {"numbers": numbers.numpy()}
        else:
            arrays = rows.on_host().to_arrays()
            arrays |= {f"{b}.rewards": values.cpu().numpy() for b, values in enumerate(true_rewards or [])}
        ticket = self._client.submit(body, arrays)
        # Kept to be sent again: a server that refused them as `overloaded` has thrown them away.
        self._asked[ticket] = _Asked(body, arrays, ticket)
        return ticket

    def rewards(self, ticket: int) -> list[torch.Tensor]:
        return self.answer(ticket)[0]

    def answer(self, ticket: int) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Rewards and, if asked for, their deviations."""
        asked = self._asked.pop(ticket)
        # One deadline for all tries: to be refused and to ask again shall not prolong the wait.
        give_up = time.monotonic() + self._deadline_seconds
        while True:
            try:
                message = self._result(asked.ticket, give_up - time.monotonic())
                break
            except Refused as refusal:
                if refusal.cause != "overloaded":
                    raise
            if time.monotonic() > give_up:
                raise Unanswered(f"the reward server {self._client.endpoint} was overloaded until the deadline")
            time.sleep(OVERLOAD_PAUSE_SECONDS)
            asked.ticket = self._client.submit(asked.body, asked.arrays)
        self.particles_version = message.body.particles_version
        # What was asked before an update may be taken after its figures: then it is of older particles.
        self._newest_version = max(self._newest_version, self.particles_version)
        self.lag = self._newest_version - self.particles_version
        arrays = message.arrays
        # Copied: arrays are read-only views of the frames.
        rewards = [torch.tensor(arrays[f"{b}.rewards"]) for b in self._blocks]
        if not all(bool(torch.isfinite(values).all()) for values in rewards):
            raise NumericalError("a reward that the reward server answered is not finite")
        if not asked.body.deviation:
            return rewards, None
        return rewards, [torch.tensor(arrays[f"{b}.deviation"]) for b in self._blocks]

    def state(self) -> Arrays:
        message = self._request(GetState(self._session))
        if message.body.note != STATE:
            raise Refused(Refusal("body", "the reward server answered something else than its state"))
        # They are read-only views of the frames; a state is the caller's, to keep and to change.
        return {name: array.copy() for name, array in message.arrays.items()}

    def close(self) -> None:
        """Close the socket; what is under way is lost."""
        self._client.close()

    def _request(self, body: Any, arrays: Mapping[str, np.ndarray] | None = None) -> Any:
        return self._result(self._client.submit(body, arrays), self._deadline_seconds)

    def _result(self, ticket: int, deadline_seconds: float) -> Any:
        try:
            return self._client.result(ticket, deadline_seconds, self._abort)
        except Refused as refusal:
            if refusal.cause == "numerical":
                raise NumericalError(str(refusal)) from refusal
            raise


def answer_schema(layout: Layout, state_table: ArrayTable) -> Schema:
    """What a client accepts from a reward server."""

    def schema(body: Any) -> ArrayTable | None:
        match body:
            case Rewards(rows=rows, deviation=deviation):
                return rewards_table(layout, rows, deviation)
            case Done(note=note):
                return state_table if note == STATE else {}
            case Statistics() | Refusal():
                return {}
        return None

    return schema


def rewards_table(layout: Layout, rows: int, deviation: bool = False) -> ArrayTable:
    """Name → (dtype, shape) of the rewards of `rows` joint rows, and of their deviations.

    Raises ProtocolError (cause `body`) for fewer than one row.
    """
    if rows < 1:
        raise ProtocolError("body", f"rows must be at least 1, got {rows}")
    names = ("rewards", "deviation") if deviation else ("rewards",)
    return {
        f"{b}.{name}": ("float32", (rows, block.num_agents)) for b, block in enumerate(layout.blocks) for name in names
    }
