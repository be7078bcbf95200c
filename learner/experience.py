"""Where the learner's trajectories and evaluations come from: actors over the wire, or the same code in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bm3il.actors.collector import Collector, episodes_per_chunk
from bm3il.actors.evaluation import Evaluator
from bm3il.actors.policy import Policy
from bm3il.actors.process import build_policy
from bm3il.learner.metrics import ChunkMetrics
from bm3il.learner.settings import Settings
from bm3il.protocol.broadcast import Broadcaster
from bm3il.protocol.channels import Request, Server
from bm3il.protocol.codec import frame_limit
from bm3il.protocol.errors import DeadlineError, ProtocolError
from bm3il.protocol.job import Job
from bm3il.protocol.messages import Chunk, Done, Evaluating, Evaluation, Leaving, Weights, Working
from bm3il.protocol.specs import ArrayTable
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

log = logging.getLogger(__name__)

REPEAT_SECONDS = 1.0
"""Between broadcasts of the same weights while chunks are missing: a broadcast that nobody heard is not asked for."""
MAX_EVALUATED = 1_000_000
"""Episodes of one evaluation."""


@dataclass(frozen=True)
class Evaluated:
    """True returns [episodes, N] of the policy after `version` iterations.

    random: the mean true returns [N] under the uniform policy.
    """

    version: int
    returns: np.ndarray
    random: np.ndarray


class Experience(Protocol):
    """The learner's side of the actors and the evaluator."""

    def publish(self, session: str, version: int, policy: Policy, evaluate_episodes: int) -> None:
        """Hand out new weights; with episodes > 0 they will be evaluated."""
        ...

    def collect(self, abort: Callable[[], None]) -> list[Trajectories]:
        """The chunks of all actors played with the weights published last, in the order of the actors.

        `abort` is called while waiting and may raise. Raises DeadlineError naming the actors that are missing.
        """
        ...

    def evaluations(self, wait_seconds: float = 0.0) -> list[Evaluated]:
        """Evaluations that have come since the last call, waiting up to `wait_seconds` for the first."""
        ...

    def evaluator_silent_seconds(self) -> float:
        """For how long nothing was heard of the evaluator, at most since the last weights were handed out."""
        ...


class LocalExperience:
    """All actors and the evaluator in this process, one after the other: the same bits as processes give."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self._policy = build_policy(job, settings.actor)
        self._evaluator = Evaluator(job, settings.evaluation)
        self._collectors = [Collector(job, settings.actor, index) for index in range(job.actors)]
        self._evaluated: list[Evaluated] = []

    def publish(self, session: str, version: int, policy: Policy, evaluate_episodes: int) -> None:
        self._policy.load_arrays(policy.to_arrays())  # the learner's may be on a GPU
        self._version = version
        if evaluate_episodes:
            random = self._evaluator.random_returns()
            returns = self._evaluator.returns(self._policy, evaluate_episodes)
            self._evaluated.append(Evaluated(version, returns, random))

    def collect(self, abort: Callable[[], None]) -> list[Trajectories]:
        return [collector.collect(self._policy, self._version) for collector in self._collectors]

    def evaluations(self, wait_seconds: float = 0.0) -> list[Evaluated]:
        evaluated, self._evaluated = self._evaluated, []
        return evaluated

    def evaluator_silent_seconds(self) -> float:
        return 0.0


class RemoteExperience:
    """Actors and evaluator behind sockets. Whoever joins late, or again, gets the newest weights at once."""

    def __init__(self, job: Job, settings: Settings, telemetry: Telemetry) -> None:
        self._spec, self._steps = job.spec, job.spec.episode_length
        self._actors, self._deadline_seconds = job.actors, settings.learner.deadline_seconds
        self._episodes = episodes_per_chunk(settings.actor, job)
        limit = frame_limit(
            Trajectories.array_table(self._spec, self._steps, self._episodes), self._returns_table(MAX_EVALUATED)
        )
        self._metrics = ChunkMetrics(telemetry.registry)
        endpoint, count_bytes = job.endpoints.experience, self._metrics.count_bytes
        self._server = Server(endpoint, telemetry.sender, self._schema, telemetry.count_drop, limit, count_bytes)
        self._weights = Broadcaster(job.endpoints.weights, telemetry.sender, telemetry.count_drop)
        self._chunks: dict[int, tuple[int, Trajectories]] = {}
        self._evaluated: list[Evaluated] = []
        self._heard: dict[int, float] = {}
        """When each actor last said something, in monotonic seconds."""
        self._evaluator_heard = self._published = time.monotonic()
        # No session: a chunk that comes before the first weights are out is stale.
        self._current = ("", -1)
        self._count_drop, self._numbers = telemetry.count_drop, telemetry.numbers

    def publish(self, session: str, version: int, policy: Policy, evaluate_episodes: int) -> None:
        self._chunks.clear()
        if session != self._current[0]:
            # What is kept for late subscribers is the first policy of a session that is over.
            self._weights.forget()
        self._current, self._published = (session, version), time.monotonic()
        # An evaluator that starts later than others shall not miss the first policy.
        self._weights.publish(Weights(session, version, evaluate_episodes), policy.to_arrays(), keep=version == 0)

    def collect(self, abort: Callable[[], None]) -> list[Trajectories]:
        start = repeated = time.monotonic()
        while missing := [index for index in range(self._actors) if index not in self._chunks]:
            abort()
            now = time.monotonic()
            if silent := [index for index in missing if self._silent_seconds(index, start) > self._deadline_seconds]:
                raise DeadlineError(f"no chunk from actors {silent} within {self._deadline_seconds:.0f} s")
            self._weights.pump(repeat=now - repeated > REPEAT_SECONDS)
            if now - repeated > REPEAT_SECONDS:
                log.info("waiting for actors %s since %.0f s", missing, now - start)
                repeated = now
            self._receive(0.05)
        for version, trajectories in self._chunks.values():
            self._metrics.policy_lag.observe(self._current[1] - version)
            self._metrics.taken.inc(trajectories.num_bytes)
        self._metrics.waiting.set(0)
        # By actor, and not as they came: in lockstep nothing depends on timing.
        return [self._chunks[index][1] for index in range(self._actors)]

    def evaluations(self, wait_seconds: float = 0.0) -> list[Evaluated]:
        self._weights.pump(repeat=wait_seconds > 0)
        self._receive(wait_seconds)
        evaluated, self._evaluated = self._evaluated, []
        return evaluated

    def evaluator_silent_seconds(self) -> float:
        return time.monotonic() - max(self._published, self._evaluator_heard)

    def close(self) -> None:
        self._server.close()
        self._weights.close()

    def _silent_seconds(self, actor: int, since: float) -> float:
        """For how long nothing was heard of an actor, at most since then."""
        # Before `since` the learner was not listening: that silence was its own.
        return time.monotonic() - max(since, self._heard.get(actor, since))

    def _receive(self, timeout_seconds: float) -> None:
        for request in self._server.poll(timeout_seconds):
            self._server.answer(request, Done(self._accept(request)))

    def _accept(self, request: Request) -> str:
        body, arrays = request.message.body, request.message.arrays
        if isinstance(body, Chunk | Working):
            self._heard[body.actor] = time.monotonic()
        if isinstance(body, Evaluating | Evaluation):
            self._evaluator_heard = time.monotonic()
        if isinstance(body, Evaluating):
            self._numbers |= {"evaluated_episodes": body.episodes, "episodes_to_evaluate": body.of}
        if isinstance(body, Working | Leaving | Evaluating):
            return ""
        if (body.session, body.version) != self._current and isinstance(body, Chunk):
            # Answered all the same, or its actor would ask after it again and again.
            return "stale"
        if isinstance(body, Evaluation):
            if body.session == self._current[0]:
                if body.version == 0:
                    self._weights.forget()
                self._evaluated.append(Evaluated(body.version, arrays["returns"], arrays["random"]))
            return "taken"
        try:
            # An actor that was started again plays the same chunk to the same bits: the first one will do.
            self._chunks.setdefault(body.actor, (body.version, Trajectories.from_arrays(arrays, self._spec)))
            self._metrics.waiting.set(len(self._chunks))
        except ProtocolError as error:
            self._count_drop(error.cause)
            log.warning("dropped a chunk of %s: %s", request.message.sender.name, error)
            return "dropped"
        return "taken"

    def _schema(self, body: Any) -> ArrayTable | None:
        if isinstance(body, Chunk):
            expected = (self._steps, self._episodes)
            if (body.steps, body.episodes) != expected or not 0 <= body.actor < self._actors:
                raise ProtocolError("body", f"a chunk here has (steps, episodes) {expected}, actors < {self._actors}")
            return Trajectories.array_table(self._spec, *expected)
        if isinstance(body, Evaluating) or (isinstance(body, Working | Leaving) and 0 <= body.actor < self._actors):
            return {}
        if isinstance(body, Evaluation) and 1 <= body.episodes <= MAX_EVALUATED:
            return self._returns_table(body.episodes)
        return None

    def _returns_table(self, episodes: int) -> ArrayTable:
        agents = self._spec.num_agents
        return {"returns": ("float32", (episodes, agents)), "random": ("float32", (agents,))}
