"""The actor and evaluator processes: newest weights in, chunks or returns out."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch

from bm3il.actors.collector import Collector, episodes_per_chunk
from bm3il.actors.evaluation import Evaluator
from bm3il.actors.metrics import ActorMetrics, EvaluatorMetrics
from bm3il.actors.policy import Policy
from bm3il.actors.settings import ActorSettings, EvaluationSettings
from bm3il.actors.simulator import end_if_hung
from bm3il.protocol.broadcast import Listener
from bm3il.protocol.channels import Client, CountBytes, Refused
from bm3il.protocol.codec import frame_limit, table_bytes
from bm3il.protocol.device import use_threads
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Chunk, Done, Evaluating, Evaluation, Leaving, Message, Refusal, Weights, Working
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import ArrayTable
from bm3il.protocol.telemetry import IDLE, Telemetry
from bm3il.protocol.trajectories import Trajectories

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Longest deafness to the wish to stop."""
WORKING_SECONDS = 5.0
"""After which an actor says that it is still at work on its chunk, and an evaluator on its episodes: so the learner
waits for slow simulators, and not for those that are gone."""
CREDITS, CREDIT_BYTES = 2, 1 << 28
"""Chunks of one actor that the learner has not taken yet; with so many, a streaming actor pauses. One is there while
the other is played or on its way. Both sides hold what is not taken: of 32 actors the learner holds 8 GB, at most."""
FAREWELL_SECONDS = 1.0
"""For which an actor that ends still tries to say so; unsaid, the learner finds out by waiting for it."""
MAX_WAITING = 64
"""Policies that wait to be evaluated, with their weights in memory."""


def credits_of(job: Job, settings: ActorSettings) -> int:
    """How many chunks of an actor may be not taken: of large ones fewer, and always one."""
    table = Trajectories.array_table(job.spec, job.spec.episode_length, episodes_per_chunk(settings, job))
    return max(1, min(CREDITS, CREDIT_BYTES // table_bytes(table)))


def run_actor(job: Job, settings: ActorSettings, index: int, telemetry: Telemetry) -> None:
    """Collect chunks and send each until it has arrived; ends when told to stop.

    In lockstep one chunk per policy version. In async chunk after chunk with the newest weights there are.
    """
    use_threads(settings.threads)
    end_if_hung(settings.step_seconds)
    actor = _Actor(job, settings, index, telemetry)
    try:
        while not telemetry.stop.is_set():
            if job.mode == "async":
                actor.stream()
            else:
                actor.follow()
        # Only if it was told to end: one that fails is started again, and its next chunk is worth waiting for.
        actor.leave()
    finally:
        actor.close()


class _Actor:
    """`weights_of`: session and version of the weights that the policy has, None before the first."""

    def __init__(self, job: Job, settings: ActorSettings, index: int, telemetry: Telemetry) -> None:
        self._index, self._telemetry = index, telemetry
        self._collector = Collector(job, settings, index, self._say_so)
        self._policy = build_policy(job, settings)
        self._metrics = ActorMetrics(telemetry.registry)
        self._weights, self._learner = _connect(job, self._policy, telemetry, self._metrics.count_bytes)
        self._credits = credits_of(job, settings)
        self._weights_of: tuple[str, int] | None = None
        self._chunks, self._sent, self._said = 0, 0, -math.inf

    def leave(self) -> None:
        """Tell the learner, which may be busy and is not waited for, that no chunk will come any more."""
        self._learner.tell(Leaving(self._index))
        self._learner.close(FAREWELL_SECONDS)

    def close(self) -> None:
        """Let the environments free what they hold."""
        self._collector.environment.close()

    def follow(self) -> None:
        """Lockstep: wait a while for new weights, and play one chunk with them."""
        if not self._refresh(POLL_SECONDS) or self._weights_of is None:
            return
        self._learner.forget()  # a chunk of an older version is of no use to anybody
        session, version = self._weights_of
        chunk, seconds = self._collect(version)
        self._send(chunk, seconds, session, version, version + 1)

    def stream(self) -> None:
        """Async: one chunk with the newest weights; a pause while the learner has not taken the chunks before."""
        before = self._weights_of
        pauses = self._learner.pending_of(Chunk) >= self._credits
        # Short, since the wait is for weights: credit comes on the other socket, which is looked at between two waits.
        waits = POLL_SECONDS / 10 if pauses or before is None else 0.0
        self._refresh(waits, "wait_for_credit" if pauses else "wait_for_weights")
        if before is not None and self._weights_of is not None and before[0] != self._weights_of[0]:
            self._learner.forget()  # the learner went back to a checkpoint: older chunks are of no use
        if self._weights_of is None or self._learner.pending_of(Chunk) >= self._credits:
            return
        session, version = self._weights_of
        self._chunks += 1
        # With the incarnation: an actor that is started again counts from 1, and must not play the same episodes again.
        chunk, seconds = self._collect(version, self._telemetry.sender.incarnation, self._chunks)
        # Once more: the chunk says of which version the next one will be, by which the learner bounds the policy lag.
        self._refresh(0.0)
        if self._weights_of[0] == session:
            self._send(chunk, seconds, session, version, self._weights_of[1])

    def _refresh(self, wait_seconds: float, stage: str = "wait_for_weights") -> bool:
        """Take the newest weights; whether they are others than before. `stage` says what is waited for."""
        with self._telemetry.stage(stage):
            _pump(self._learner)  # first: an actor that may go on shall do so with what was published until then
            message = self._weights.newest(wait_seconds)
        if message is None or (message.body.session, message.body.version) == self._weights_of:
            return False
        if self._weights_of is None or self._weights_of[0] != message.body.session:
            log.info("session %s: weights of iteration %d", message.body.session, message.body.version)
        self._weights_of = (message.body.session, message.body.version)
        self._policy.load_arrays(message.arrays)
        self._telemetry.numbers["policy_version"] = message.body.version
        return True

    def _collect(self, version: int, *stream: int | str) -> tuple[Trajectories, float]:
        start = time.perf_counter()
        self._say_so()
        with self._telemetry.stage("collect"):
            chunk = self._collector.collect(self._policy, version, *stream)
        return chunk, time.perf_counter() - start

    def _send(self, chunk: Trajectories, seconds: float, session: str, version: int, next_version: int) -> None:
        self._metrics.count(chunk, version, self._learner.pending_of(Chunk))
        steps, episodes = chunk.terminated.shape
        body = Chunk(session, version, next_version, self._index, steps, episodes, seconds)
        self._learner.tell(body, chunk.arrays)
        self._sent += 1
        self._telemetry.done(self._sent)

    def _say_so(self) -> None:
        """Tell the learner, now and then, that the work on a chunk goes on."""
        if time.monotonic() - self._said < WORKING_SECONDS:
            return
        self._said = time.monotonic()
        _pump(self._learner)
        if not self._learner.pending_of(Working):  # a learner that is busy need not be told more
            self._learner.tell(Working(self._index))


def run_evaluator(
    job: Job, actor_settings: ActorSettings, evaluation_settings: EvaluationSettings, telemetry: Telemetry
) -> None:
    """Report the true return of every policy version that is marked for evaluation, in their order, beside that of the
    uniform policy, which is played first. Ends when told to stop."""
    use_threads(actor_settings.threads)
    end_if_hung(actor_settings.step_seconds)
    evaluating = _Evaluating(job, actor_settings, evaluation_settings, telemetry)
    evaluating.play_baseline()
    while not telemetry.stop.is_set():
        evaluating.follow()


class _Evaluating:
    def __init__(
        self, job: Job, actor_settings: ActorSettings, settings: EvaluationSettings, telemetry: Telemetry
    ) -> None:
        self._telemetry, self._seconds = telemetry, settings.seconds
        self._policy = build_policy(job, actor_settings)
        self._weights, self._learner = _connect(job, self._policy, telemetry)
        self._metrics = EvaluatorMetrics(telemetry.registry)
        self._evaluator = Evaluator(job, settings, self._say_so)
        self._waiting: list[Message] = []
        self._session, self._newest, self._has_first = "", -1, False
        self._evaluated, self._took, self._said = 0, 0.0, -math.inf
        self._stage = "wait_for_weights"

    def play_baseline(self) -> None:
        """The uniform policy, unless the run's folder knows its return; policies are queued meanwhile."""
        with self._telemetry.stage("baseline"):
            self._random = self._evaluator.random_returns()

    def follow(self) -> None:
        """Wait a while for policies to evaluate, and evaluate the one whose turn it is."""
        with self._telemetry.stage(self._stage):
            self._take_in(0.0 if self._waiting else POLL_SECONDS)
            _pump(self._learner)
        if self._waiting:
            self._evaluate(self._waiting.pop(0))

    def _take_in(self, timeout_seconds: float = 0.0) -> None:
        message = self._weights.next(timeout_seconds)
        if message is None:
            return
        while message is not None:
            self._queue(message)
            message = self._weights.next(0.0)
        self._skip()

    def _queue(self, message: Message) -> None:
        body = message.body
        if body.session != self._session:
            self._session, self._newest, self._has_first = body.session, -1, False
            self._waiting.clear()  # the learner went back to a checkpoint: those versions come again
        # A subscription holds before the learner has read of it, and sends the first policy: others may overtake it.
        is_first = body.version == 0 and not self._has_first
        if body.version <= self._newest and not is_first:  # broadcasts are repeated
            return
        self._newest, self._has_first = max(self._newest, body.version), self._has_first or is_first
        self._stage = IDLE  # from now on, whenever it waits, it has played all that was to be played
        if body.evaluate_episodes:
            self._waiting.insert(0 if is_first else len(self._waiting), message)

    def _skip(self) -> None:
        """Let those go that would keep the newest waiting for longer than one evaluation may take. The first policy of
        a run is always evaluated: it may be the clone that the run is held against."""
        # Before the first evaluation nothing has taken any time: then memory alone is the limit.
        room = max(1, min(MAX_WAITING, int(self._seconds / max(self._took, 1e-9))))
        older, newer = self._waiting[:-room], self._waiting[-room:]
        if skipped := [message.body.version for message in older if message.body.version]:
            log.warning("behind the learner: versions %s are not evaluated", skipped)
            self._metrics.skipped.inc(len(skipped))
        self._waiting = [message for message in older if not message.body.version] + newer

    def _evaluate(self, message: Message) -> None:
        body, start = message.body, time.monotonic()
        self._policy.load_arrays(message.arrays)
        with self._telemetry.stage("evaluate"):
            returns = self._evaluator.returns(self._policy, body.evaluate_episodes)
        self._took = time.monotonic() - start
        log.info("iteration %d: return %.3f", body.version, returns.mean())
        self._metrics.count(returns, body.version)
        evaluation = Evaluation(body.session, body.version, len(returns))
        self._learner.tell(evaluation, {"returns": returns, "random": self._random})
        self._evaluated += 1
        self._telemetry.done(self._evaluated)

    def _say_so(self, episodes: int, of: int) -> None:
        """Tell the learner, now and then, that the work goes on."""
        # Policies that nobody takes in would fill the socket's queue, which then drops the newest.
        self._take_in()
        if time.monotonic() - self._said < WORKING_SECONDS:
            return
        self._said = time.monotonic()
        _pump(self._learner)
        if not self._learner.pending_of(Evaluating):
            self._learner.tell(Evaluating(episodes, of))


def _pump(learner: Client) -> None:
    try:
        learner.pump()
    except Refused as refusal:  # by a learner that cannot read this process: another release
        raise InputError(f"the learner refuses what this process sends: {refusal}") from refusal


def build_policy(job: Job, settings: ActorSettings) -> Policy:
    """The policy networks of the job, at the start that its seed gives."""
    generator = torch.Generator().manual_seed(derive_seed(job.seed, "policy"))
    return Policy(Layout.of_job(job), settings.hidden, generator)


def _connect(
    job: Job, policy: Policy, telemetry: Telemetry, count_bytes: CountBytes = lambda kind, count: None
) -> tuple[Listener, Client]:
    def weights_schema(body: Any) -> ArrayTable | None:
        return policy.array_table() if isinstance(body, Weights) else None

    def answer_schema(body: Any) -> ArrayTable | None:
        return {} if isinstance(body, Done | Refusal) else None

    limit = frame_limit(policy.array_table())
    weights = Listener(job.endpoints.weights, telemetry.sender, weights_schema, telemetry.count_drop, limit)
    learner = Client(
        job.endpoints.experience, telemetry.sender, answer_schema, telemetry.count_drop, count_bytes=count_bytes
    )
    return weights, learner
