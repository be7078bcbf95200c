"""The reward server process: updates and queries; one answer per request, queries batched across clients."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bm3il.protocol.channels import Request, Server
from bm3il.protocol.codec import frame_limit
from bm3il.protocol.demonstrations import load_demonstrations
from bm3il.protocol.device import choose_device, use_threads
from bm3il.protocol.errors import InputError, NumericalError, ProtocolError
from bm3il.protocol.job import Job
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
    Statistics,
    Update,
)
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import ArrayTable
from bm3il.protocol.telemetry import IDLE, Telemetry
from bm3il.reward_server.batcher import QueryBatcher, Waiting
from bm3il.reward_server.client import STATE, rewards_table
from bm3il.reward_server.held import Held
from bm3il.reward_server.metrics import RewardServerMetrics
from bm3il.reward_server.model import Model, TrueRewards
from bm3il.reward_server.particles import RewardModel, state_table
from bm3il.reward_server.settings import RewardSettings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Longest deafness to the wish to stop."""
SUPERSEDED = "another learner of this run, which started later, has begun a session; this one ends, that one goes on"
MAX_NUMBER = 2**60
"""Far from where the numbers of rows would overflow."""


def run_reward_server(job: Job, settings: RewardSettings, telemetry: Telemetry) -> None:
    """Serve rewards until told to stop.

    Raises InputError if the demonstrations cannot be used.
    """
    use_threads(settings.threads)
    layout = Layout.of_job(job)
    build_model(job, settings)  # what is wrong with the demonstrations shows before anybody waits
    server = listen(job.endpoints.rewards, layout, settings, state_table(layout, settings), telemetry)
    device = choose_device(settings.device)
    service = RewardServer(server, lambda: build_model(job, settings), layout, settings, telemetry, device)
    try:
        while not telemetry.stop.is_set():
            service.serve(POLL_SECONDS)
    finally:
        server.close()


def build_model(job: Job, settings: RewardSettings) -> Model:
    """The reward model of the job, at the start that its seed gives.

    Raises InputError if a learned reward has no demonstrations, or they do not fit the environment.
    """
    if settings.source == "environment":
        return TrueRewards()
    demonstrations = load_demonstrations(job)
    if demonstrations is None:
        raise InputError("a learned reward needs demonstrations; name a file with --demonstrations")
    layout, seed = Layout.of_job(job), derive_seed(job.seed, "reward_server")
    return RewardModel(layout, demonstrations.rows(layout), settings, seed, choose_device(settings.device))


class RewardServer:
    """Answers the requests of one session at a time.

    A session starts with `begin`, which makes a model or restores one. Whatever belongs to another session is refused
    with cause `no_session`: so a learner notices that this process was restarted, and goes back to its checkpoint. If
    a learner that started later has begun one, the cause is `superseded`, for good: of two learners, of which one was
    thought to be lost, the older ends, and they do not begin in turns for ever.
    """

    def __init__(
        self,
        server: Server,
        make_model: Callable[[], Model],
        layout: Layout,
        settings: RewardSettings,
        telemetry: Telemetry,
        device: torch.device | str = "cpu",
    ) -> None:
        self._server, self._make_model, self._layout = server, make_model, layout
        self._telemetry, self._metrics = telemetry, RewardServerMetrics(telemetry.registry)
        self._queries = QueryBatcher(
            settings.max_batch_rows, settings.max_delay_seconds, settings.max_queue_rows, settings.deadline_seconds
        )
        self._session: str | None = None
        self._learner = ""
        """The latest start, as incarnation, of those who began a session."""
        self._model: Model = TrueRewards()
        self._device = device
        self._held = Held(layout, 0, 0)

    def serve(self, timeout_seconds: float) -> None:
        """Take in requests, waiting up to `timeout_seconds` for the first, and answer what is due."""
        wait = self._queries.wait_seconds(time.monotonic())
        with self._telemetry.stage(IDLE):
            requests = self._server.poll(timeout_seconds if wait is None else min(wait, timeout_seconds))
        for request in requests:
            self._handle(request)
        self._answer_queries()

    def _handle(self, request: Request) -> None:
        body, arrays = request.message.body, request.message.arrays
        try:
            sender = request.message.sender
            # Incarnations begin with the time of the start, so that they are ordered as texts. Within the session
            # everybody is answered: other clients may have started before its learner.
            if sender.incarnation < self._learner and (isinstance(body, Begin) or body.session != self._session):
                self._refuse(request, Refusal("superseded", SUPERSEDED))
            elif isinstance(body, Begin):
                self._learner = sender.incarnation
                self._begin(body, arrays)
                self._server.answer(request, Done())
            elif body.session != self._session:
                self._refuse(request, Refusal("no_session", f"this server is not in the session {body.session}"))
            elif isinstance(body, Query):
                self._queue(request, body, arrays)
            else:
                # Queries that came before an update are answered by the particles that they met.
                self._answer_queries(flush=True)
                self._server.answer(request, *self._change(body, arrays))
        except ProtocolError as error:
            self._telemetry.count_drop(error.cause)
            self._refuse(request, Refusal(error.cause, str(error)))
        except InputError as error:
            self._refuse(request, Refusal("input", str(error)))
        except NumericalError as error:
            self._refuse(request, Refusal("numerical", str(error)))

    def _begin(self, body: Begin, arrays: Arrays) -> None:
        for query in self._queries.clear():
            self._refuse(query.request, Refusal("no_session", f"the session {body.session} has begun"))
        with self._telemetry.stage("begin"):
            # If making the model fails there is no session at all, and not an old one with half a new model.
            self._session = None
            if not (0 <= body.held <= MAX_NUMBER and 0 <= body.first <= MAX_NUMBER):
                raise ProtocolError("body", f"held and first must lie in 0..{MAX_NUMBER}: {body.held}, {body.first}")
            self._held = Held(self._layout, body.held, body.first, self._device)
            self._model = self._make_model()
            if body.restore:
                self._model.load_state(arrays)
            self._session = body.session
        log.info("session %s has begun%s", body.session, " from a checkpoint" if body.restore else "")

    def _change(self, body: Hold | Update | GetState, arrays: Arrays) -> tuple[Any, Arrays | None]:
        """Carry out a request that is not a query; the answer's body and arrays."""
        with self._telemetry.stage(body.kind):
            if isinstance(body, GetState):
                return Done(STATE), self._model.state()
            if isinstance(body, Update) and not 0 <= body.progress <= 1:
                raise ProtocolError("body", f"progress must lie in 0..1, got {body.progress}")
            if isinstance(body, Update) and body.numbered:
                rows = self._held.take(torch.tensor(arrays["numbers"]))
            else:
                rows = JointRows.from_arrays(arrays, self._layout)
                if self._held.capacity:
                    self._held.keep(rows)
            if isinstance(body, Hold):
                return Done(), None
            self._model.observe(rows)
            figures = self._model.update(body.progress)
        version = self._model.version
        self._metrics.set_health(version, figures)
        self._telemetry.numbers |= {"particles_version": version, **figures}
        return Statistics(version, figures), None

    def _queue(self, request: Request, body: Query, arrays: Arrays) -> None:
        if body.numbered:
            # Here, so that a number that is not held refuses this query alone, and not its whole batch.
            rows = self._held.take(torch.tensor(arrays["numbers"]))
        else:
            rows = JointRows.from_arrays(arrays, self._layout)
        names = [f"{b}.rewards" for b in range(len(self._layout.blocks))]
        true_rewards = [torch.tensor(arrays[name]) for name in names] if names[0] in arrays else None
        refusal = self._queries.add(Waiting(request, rows, true_rewards, body.deviation, body.alone, request.arrived))
        if refusal:
            self._refuse(request, refusal)

    def _answer_queries(self, flush: bool = False) -> None:
        while True:
            # Computing took its time: further queries may be too late by now, and others due.
            now = time.monotonic()
            for query in self._queries.late(now):
                waited = now - query.arrived
                self._refuse(
                    query.request, Refusal("deadline", f"the query waited for {waited:.1f} s; nobody needs it now")
                )
            if not (batch := self._queries.take(now, flush)):
                return
            try:
                self._compute(batch, now)
            except (NumericalError, ProtocolError) as error:
                cause = "numerical" if isinstance(error, NumericalError) else error.cause
                for query in batch:
                    self._refuse(query.request, Refusal(cause, str(error)))

    def _compute(self, batch: list[Waiting], now: float) -> None:
        start = time.perf_counter()
        counts = [len(query.rows) for query in batch]
        with self._telemetry.stage("query"):
            rewards, deviations = self._model.query(*_merged(batch))
            columns = [("rewards", rewards), ("deviation", deviations or [])]
            split = {f"{b}.{name}": values.split(counts) for name, blocks in columns for b, values in enumerate(blocks)}
        seconds = time.perf_counter() - start
        # Before the answers: whoever has one finds it counted.
        self._metrics.count_batch(counts, [now - query.arrived for query in batch], seconds, self._queries.rows)
        for number, query in enumerate(batch):
            table = rewards_table(self._layout, counts[number], query.deviation)
            arrays: dict[str, np.ndarray] = {name: split[name][number].numpy() for name in table}
            body = Rewards(counts[number], self._model.version, now - query.arrived, seconds, query.deviation)
            self._server.answer(query.request, body, arrays)

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        self._metrics.count_refusal(refusal.cause)
        self._server.answer(request, refusal)


def listen(endpoint: str, layout: Layout, settings: RewardSettings, state: ArrayTable, telemetry: Telemetry) -> Server:
    """The socket of a reward server; `state` is of `particles.state_table`."""
    limit = frame_limit(state, JointRows.array_table(layout, settings.max_queue_rows))
    schema = request_schema(layout, settings, state)
    return Server(endpoint, telemetry.sender, schema, telemetry.count_drop, limit)


def request_schema(layout: Layout, settings: RewardSettings, state: ArrayTable) -> Schema:
    """What a reward server accepts; `state` is of `particles.state_table`."""

    def schema(body: Any) -> ArrayTable | None:
        match body:
            case Begin(restore=restore):
                return state if restore else {}
            case GetState():
                return {}
            case Hold(rows=rows) | Update(rows=rows) | Query(rows=rows):
                # More could never wait together; `listen` cuts off longer frames by the same number.
                if not 1 <= rows <= settings.max_queue_rows:
                    raise ProtocolError("body", f"rows must lie in 1..{settings.max_queue_rows}, got {rows}")
                if isinstance(body, Update | Query) and body.numbered:
                    return {"numbers": ("int64", (rows,))}
                table = JointRows.array_table(layout, rows)
                with_rewards = isinstance(body, Query) and settings.source == "environment"
                return table | rewards_table(layout, rows) if with_rewards else table
        return None

    return schema


def _merged(batch: list[Waiting]) -> tuple[JointRows, bool, list[torch.Tensor] | None]:
    """Rows, whether any wants the deviation, and true rewards of a batch of queries."""
    deviation = any(query.deviation for query in batch)
    if len(batch) == 1:
        return batch[0].rows, deviation, batch[0].true_rewards
    if len({query.true_rewards is None for query in batch}) > 1:
        raise ProtocolError("body", "queries with true rewards and without cannot be computed together")
    true_rewards = [torch.cat(block) for block in zip(*(query.true_rewards or [] for query in batch), strict=True)]
    return JointRows.joined([query.rows for query in batch]), deviation, true_rewards or None
