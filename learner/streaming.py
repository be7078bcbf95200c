"""Async mode: chunks as they come, rewards that travel while the learner computes (design: throughput before bits)."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable

import torch

from bm3il.actors.policy import Policy
from bm3il.actors.process import credits_of
from bm3il.learner.experience import REPEAT_SECONDS, RemoteExperience
from bm3il.learner.figures import Figures, merged
from bm3il.learner.imitation import Arrays, OffPolicyImitation, OnPolicyImitation
from bm3il.learner.segments import Segments
from bm3il.learner.settings import Settings
from bm3il.protocol.channels import Request
from bm3il.protocol.errors import DeadlineError, ProtocolError
from bm3il.protocol.job import Job
from bm3il.protocol.messages import Chunk, Done, Leaving
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.client import RemoteRewards

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
"""How long the learner waits for an actor that would pass the bound of the policy lag, before it goes on without it,
and without all others that were as silent: of a host that is gone it does not wait for one actor after the other."""
MAX_ACTORS = 65_536
"""Numbers that actors can have, those who join included."""


class StreamedExperience(RemoteExperience):
    """Chunks of whichever actors there are, those of older policies first, else in the order in which they came.

    An iteration takes as many chunks as the job has actors, so that updates per fresh step are the same as in lockstep.
    A chunk is answered when it is taken: an actor with too many, or too large ones, that are not taken pauses
    (`credits_of`); it has asked meanwhile whether they have arrived, and does not send them again. If the policy of an
    actor could fall more than `max_policy_lag` iterations behind, the learner pauses until its chunk has come.

    No chunk that is trained on is of a policy more than K = `max_policy_lag` iterations behind. Let v be the version
    published last. A chunk is let in if its version is v − K or newer, and what an iteration does not take is thrown
    away unless it is v + 1 − K or newer; so at the next take, of v + 1, the bound holds again. Little is thrown away,
    for two reasons. Every actor says with each chunk how old the next one can be, and is waited for while that is older
    than v + 1 − K: so it comes while it still counts. And the oldest are taken first: what is left is too old only if
    more chunks than an iteration takes were all of the oldest version.
    """

    def __init__(self, job: Job, settings: Settings, telemetry: Telemetry) -> None:
        super().__init__(job, settings, telemetry)
        self._share, self._actors = job.actors, MAX_ACTORS
        self._credits = credits_of(job, settings.actor)
        self._max_policy_lag, self._telemetry = settings.learner.max_policy_lag, telemetry
        self._queue: deque[tuple[Request, Trajectories]] = deque()
        self._next_version: dict[int, int] = {}
        """Of each actor that may be at work: the oldest version that its next chunk can be of."""

    def publish(self, session: str, version: int, policy: Policy, evaluate_episodes: int) -> None:
        if session != self._current[0]:
            for request, _ in self._queue:
                self._server.answer(request, Done("stale"))
            self._queue.clear()
            # Versions of another session, which say nothing of how far behind this one an actor is.
            self._next_version.clear()
        super().publish(session, version, policy, evaluate_episodes)

    def collect(self, abort: Callable[[], None]) -> list[Trajectories]:
        start = repeated = time.monotonic()
        self._weights.pump()
        self._receive(0)
        while len(self._queue) < self._share or self._behind():
            abort()
            now = time.monotonic()
            if min((self._silent_seconds(actor, start) for actor in self._heard), default=now - start) > (
                self._deadline_seconds
            ):
                raise DeadlineError(
                    f"{len(self._queue)} of {self._share} chunks from actors within {self._deadline_seconds:.0f} s"
                )
            # While chunks are missing nobody is given up: the learner could not go on without them anyway.
            if len(self._queue) >= self._share and now - start > PATIENCE_SECONDS:
                self._give_up_on([*self._behind(), *self._silent(start)])
            self._weights.pump(repeat=now - repeated > REPEAT_SECONDS)
            if now - repeated > REPEAT_SECONDS:
                log.info("%d of %d chunks since %.0f s", len(self._queue), self._share, now - start)
                repeated = now
            self._receive(0.02)
        return self._take()

    def _take(self) -> list[Trajectories]:
        for actor in self._pausing():
            if actor in self._next_version:  # the last chunks of one that left are no promise of further ones
                self._next_version[actor] = self._current[1]
        by_age = sorted(self._queue, key=_version)  # stable: of one version in the order in which they came
        taken, left = by_age[: self._share], by_age[self._share :]
        self._queue.clear()
        for chunk in left:
            if _version(chunk) > self._current[1] - self._max_policy_lag:
                self._queue.append(chunk)
            else:
                self._refuse(chunk[0])
        lags = [self._current[1] - _version(chunk) for chunk in taken]
        for (request, trajectories), lag in zip(taken, lags, strict=True):
            self._metrics.policy_lag.observe(lag)
            self._metrics.taken.inc(trajectories.num_bytes)
            self._server.answer(request, Done("taken"))
        self._metrics.waiting.set(len(self._queue))
        self._telemetry.numbers["policy_lag"] = sum(lags) / len(lags)
        return [trajectories for _, trajectories in taken]

    def _behind(self) -> list[int]:
        """Actors at work whose next chunk could be too old once this iteration is done."""
        oldest, pausing = self._current[1] + 1 - self._max_policy_lag, self._pausing()
        return [actor for actor, version in self._next_version.items() if version < oldest and actor not in pausing]

    def _pausing(self) -> list[int]:
        """Actors that wait for a chunk to be taken, and will then look for the newest weights."""
        waiting = Counter(request.message.body.actor for request, _ in self._queue)
        return [actor for actor, chunks in waiting.items() if chunks >= self._credits]

    def _silent(self, since: float) -> list[int]:
        """Actors at work of which nothing was heard for as long as the learner has patience, nor since then."""
        at_work = self._next_version.keys() - self._pausing()
        return [actor for actor in at_work if self._silent_seconds(actor, since) > PATIENCE_SECONDS]

    def _give_up_on(self, actors: list[int]) -> None:
        for actor in sorted(set(actors)):
            text = f"goes on without actor-{actor}, after {PATIENCE_SECONDS:.0f} s in which no chunk of it came"
            log.warning(text)
            self._telemetry.event("without", text)
            del self._next_version[actor]

    def _receive(self, timeout_seconds: float) -> None:
        for request in self._server.poll(timeout_seconds):
            if isinstance(request.message.body, Chunk):
                self._heard[request.message.body.actor] = time.monotonic()
                self._enqueue(request)
            else:
                if isinstance(request.message.body, Leaving):
                    self._next_version.pop(request.message.body.actor, None)
                self._server.answer(request, Done(self._accept(request)))

    def _refuse(self, request: Request) -> None:
        """A chunk of a policy too old to learn from, or of another session."""
        self._count_drop("stale")
        self._server.answer(request, Done("stale"))

    def _enqueue(self, request: Request) -> None:
        body = request.message.body
        session, version = self._current
        if body.session != session or not version - self._max_policy_lag <= body.version <= version:
            self._refuse(request)
            return
        try:
            trajectories = Trajectories.from_arrays(request.message.arrays, self._spec)
        except ProtocolError as error:
            self._count_drop(error.cause)
            log.warning("dropped a chunk of %s: %s", request.message.sender.name, error)
            self._server.answer(request, Done("dropped"))
            return
        self._next_version[body.actor] = body.next_version
        self._queue.append((request, trajectories))
        self._metrics.waiting.set(len(self._queue))


def _version(chunk: tuple[Request, Trajectories]) -> int:
    """Of the policy that played it."""
    return int(chunk[0].message.body.version)


class StreamedOffPolicy(OffPolicyImitation):
    """Algorithm 1 without its waits.

    The rewards of an iteration's batches are asked for during the iteration before, so they are there when they are
    needed; the particles are updated meanwhile. Their version is at most two updates behind.
    """

    _rewards: RemoteRewards

    def begin(self, session: str, learner: Arrays | None, rewards: Arrays | None, abort: Callable[[], None]) -> None:
        super().begin(session, learner, rewards, abort)
        self._updating: int | None = None

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        chunks = self._collect(abort)
        with self._telemetry.stage("observe"):
            fresh = self._replay.add_all(chunks)
        figures: dict[str, float] = {}
        if self._imitates:
            with self._telemetry.stage("observe"), self._waiting_for("particles"):
                if self._updating is not None:
                    _, figures = self._rewards.updated(self._updating)
            self._updating = self._rewards.update(fresh, progress)
        # In a session's first iteration only, and not before the server was shown the rows that are asked for.
        while len(self._asked) < self._settings.updates:
            self._ask()
        learned = Figures()
        for _ in range(self._settings.updates):
            # One is asked for as one is taken, also for the next iteration: so many are under way at any time.
            batch, rewards = self._answered()
            self._ask()
            self._train(batch, rewards, progress, learned)
        return sum(chunk.num_steps for chunk in chunks), merged(figures, learned.means())


class StreamedOnPolicy(OnPolicyImitation):
    """Clipped updates whose rewards are those of the particles of one update before: the particles learn from the fresh
    rows while the learner learns from their rewards."""

    _rewards: RemoteRewards

    def begin(self, session: str, learner: Arrays | None, rewards: Arrays | None, abort: Callable[[], None]) -> None:
        super().begin(session, learner, rewards, abort)
        self._updating: int | None = None
        self._is_first = True

    def _reward(self, segments: Segments, progress: float) -> tuple[list[torch.Tensor], dict[str, float]]:
        if self._is_first or not self._imitates:  # the first rewards shall not be of particles that have seen nothing
            self._is_first = False
            return super()._reward(segments, progress)
        rows, figures = segments.rows(), dict[str, float]()
        if self._updating is not None:
            with self._telemetry.stage("observe"), self._waiting_for("particles"):
                _, figures = self._rewards.updated(self._updating)
        if (numbers := self._numbers(rows)) is not None:
            self._rewards.hold(rows)
        rewards = self._taken(self._rewards.submit(rows, numbers=numbers))
        self._updating = self._rewards.update(rows, progress, numbers)
        return rewards, figures
