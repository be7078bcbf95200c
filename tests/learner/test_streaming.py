"""Async mode: which chunks are taken when, how far policies may lag, and that a run outlives its processes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bm3il.actors import process
from bm3il.actors.policy import Policy
from bm3il.actors.process import CREDITS
from bm3il.actors.settings import ActorSettings
from bm3il.learner import streaming
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.learner.streaming import StreamedExperience
from bm3il.protocol import channels
from bm3il.protocol.channels import Client
from bm3il.protocol.errors import DeadlineError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Chunk, Done, Leaving, Sender, Working
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

ENVIRONMENT = "rover_tower?pairs=2"
SPEC = make_environment(ENVIRONMENT, 1).spec
MAX_LAG = 2


class Learner:
    """A learner's side with a share of two chunks, and clients that play actors."""

    def __init__(self, folder: Path) -> None:
        endpoints = Endpoints(*(f"ipc://{folder}/{name}" for name in ("e", "w", "r", "c")))
        self.job = Job("run", folder, ENVIRONMENT, SPEC, "", 0, "maac", "async", 0, 1000, 2, "type", False, endpoints)
        self.telemetry = Telemetry("learner", 0, Sender("run", "learner-0"), 0, "127.0.0.1")
        self.policy = Policy(Layout.of(SPEC, "type"), (4,), torch.Generator().manual_seed(0))
        learner = LearnerSettings(max_policy_lag=MAX_LAG, deadline_seconds=3.0)
        self.settings = Settings(learner, actor=ActorSettings(steps_per_iteration=50, hidden=(4,)))
        self.experience = StreamedExperience(self.job, self.settings, self.telemetry)
        self.actors = [
            Client(endpoints.experience, Sender("run", f"actor-{i}"), lambda _: {}, lambda _: None) for i in range(3)
        ]
        self.publish(0)

    def begin(self) -> StreamedExperience:
        """A learner that was started again."""
        self.experience.close()
        self.telemetry.close()
        self.telemetry = Telemetry("learner", 0, Sender("run", "learner-0"), 0, "127.0.0.1")
        self.experience = StreamedExperience(self.job, self.settings, self.telemetry)
        self.publish(0)
        return self.experience

    def publish(self, version: int, session: str = "s") -> None:
        self.experience.publish(session, version, self.policy, 0)

    def send(self, actor: int, version: int, next_version: int, mark: float, session: str = "s") -> int:
        """A chunk of one episode whose rovers' own numbers are all `mark`; returns its ticket."""
        steps = SPEC.episode_length
        arrays = Trajectories.zeros(SPEC, 1).arrays
        arrays["0.own"][:] = mark
        return self.actors[actor].submit(Chunk(session, version, next_version, actor, steps, 1, 0.0), arrays)

    def collect(self) -> list[float]:
        return [float(chunk.arrays["0.own"][0, 0, 0, 0]) for chunk in self.experience.collect(lambda: None)]

    def note(self, actor: int, ticket: int) -> str:
        answer = self.actors[actor].result(ticket, 3.0)
        assert isinstance(answer.body, Done)
        return answer.body.note

    def close(self) -> None:
        self.experience.close()
        for actor in self.actors:
            actor.close()
        self.telemetry.close()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    built = Learner(tmp_path)
    yield built
    built.close()


def test_an_iteration_takes_its_share_from_whoever_sent(learner: Learner) -> None:
    tickets = [learner.send(2, 0, 0, mark) for mark in (1, 2)] + [learner.send(0, 0, 0, 3)]
    learner.experience._receive(1.0)
    assert len(learner.collect()) == 2
    assert learner.note(2, tickets[0]) == "taken"
    with pytest.raises(DeadlineError, match="1 of 2 chunks"):
        learner.collect()


def test_an_actor_that_says_that_it_is_at_work_is_waited_for(learner: Learner) -> None:
    began = told = time.monotonic()

    def tell() -> None:
        nonlocal told
        learner.actors[0].pump()
        if told + 1 < time.monotonic() < began + 5:
            told = time.monotonic()
            learner.actors[0].tell(Working(0))

    with pytest.raises(DeadlineError, match="0 of 2 chunks"):
        learner.experience.collect(tell)
    assert time.monotonic() - began > 3.0 + 4.0


def test_a_chunk_is_acknowledged_when_it_is_taken(learner: Learner) -> None:
    first = [learner.send(0, 0, 0, 1), learner.send(0, 0, 0, 2)]
    learner.collect()
    assert [learner.note(0, ticket) for ticket in first] == ["taken", "taken"]
    waiting = learner.send(0, 0, 0, 3)
    learner.experience._receive(0.5)
    learner.actors[0].pump(0.2)
    assert learner.actors[0].take(waiting) is None
    assert learner.actors[0].pending == 1


def test_the_learner_waits_for_an_actor_that_would_fall_back_too_far(learner: Learner) -> None:
    learner.send(0, 0, 0, 1)
    learner.send(1, 0, 0, 2)
    learner.collect()
    for version in (1, 2):  # meanwhile actor 1 is at work on a chunk of version 0
        learner.publish(version)
        learner.send(0, version, version, 10 + version)
        learner.send(0, version, version, 20 + version)
        if version == 2:
            threading.Timer(0.5, lambda: learner.send(1, 0, 2, 99)).start()
        taken = learner.collect()
    assert taken == [99, 12]  # it was waited for, though two were there, and comes first: it could not wait


def test_no_chunk_is_trained_on_beyond_the_bound(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever chunks come, of whatever versions, and though nobody is waited for."""
    monkeypatch.setattr(streaming, "PATIENCE_SECONDS", 0.0)
    dice = random.Random(1)
    lags = learner.experience._metrics.policy_lag
    for version in range(40):
        learner.publish(version)
        for _ in range(dice.randrange(2, 5)):
            learner.send(dice.randrange(3), max(0, version - dice.randrange(MAX_LAG + 2)), version, 0)
        learner.experience._receive(0.2)
        while len(learner.experience._queue) < 2:
            learner.send(0, version, version, 0)
            learner.experience._receive(0.2)
        learner.collect()
    (metric,) = lags.collect()
    counts = {s.labels["le"]: s.value for s in metric.samples if s.name.endswith("_bucket")}
    assert counts["+Inf"] == 80
    assert counts[f"{MAX_LAG}.0"] == 80
    assert counts["0.0"] < counts["1.0"] < counts[f"{MAX_LAG}.0"]


def test_an_actor_that_is_gone_is_not_waited_for_for_ever(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streaming, "PATIENCE_SECONDS", 0.3)
    learner.send(0, 0, 0, 1)
    learner.send(1, 0, 0, 2)
    learner.collect()
    learner.publish(2)
    for mark in (3, 4):
        learner.send(0, 2, 2, mark)
    assert learner.collect() == [3, 4]
    assert "goes on without actor-1" in caplog.text


def test_a_host_that_is_gone_is_waited_for_once(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streaming, "PATIENCE_SECONDS", 0.3)
    for actor, next_version in ((1, 0), (2, 1)):  # the second may be waited for an iteration later than the first
        learner.send(actor, 0, next_version, actor)
    learner.collect()
    for version in (2, 3):
        learner.publish(version)
        for mark in (3, 4):
            learner.send(0, version, version, mark)
        learner.collect()
    assert [r.getMessage()[:24] for r in caplog.records if "goes on" in r.getMessage()] == [
        "goes on without actor-1,",
        "goes on without actor-2,",
    ]
    first, second = (r.created for r in caplog.records if "goes on" in r.getMessage())
    assert second - first < 0.1


@pytest.mark.parametrize("chunks", [1, CREDITS])
def test_an_actor_that_leaves_is_not_waited_for(
    learner: Learner, caplog: pytest.LogCaptureFixture, chunks: int
) -> None:
    """Its chunks count; with credit for none more, too."""
    learner.send(0, 0, 0, 1)
    for _ in range(chunks):
        learner.send(1, 0, 0, 2)
    learner.actors[1].tell(Leaving(1))
    deadline = time.monotonic() + 5
    while learner.actors[1].pending_of(Leaving):
        assert time.monotonic() < deadline
        learner.experience._receive(0.05)
        learner.actors[1].pump(0.05)
    assert learner.collect() == [1, 2]
    learner.publish(2)
    for mark in (3, 4):
        learner.send(0, 2, 2, mark)
    learner.collect()
    assert "goes on without" not in caplog.text


def test_an_actor_without_credit_is_not_behind(learner: Learner) -> None:
    learner.publish(2)
    for mark in range(CREDITS):
        learner.send(0, 2, 0, mark)
    assert learner.collect() == [0, 1]


@pytest.mark.parametrize(("credit_bytes", "credits"), [(1 << 28, CREDITS), (1, 1)])
def test_an_actor_pauses_with_so_many_chunks_or_bytes_not_taken(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, credit_bytes: int, credits: int
) -> None:
    """One chunk is always allowed. What has come is not sent again; bytes that came are those that are trained on."""
    monkeypatch.setattr(process, "CREDIT_BYTES", credit_bytes)
    monkeypatch.setattr(channels, "FIRST_INQUIRY_SECONDS", 0.02)
    monkeypatch.setattr(channels, "LAST_INQUIRY_SECONDS", 0.05)
    experience = learner.begin()
    telemetry = Telemetry("actor", 0, Sender("run", "actor-0"), 0, "127.0.0.1")
    actor = process._Actor(learner.job, ActorSettings(steps_per_iteration=50, hidden=(4,)), 0, telemetry)
    begun = time.monotonic()
    while time.monotonic() < begun + 3:
        experience._weights.pump(repeat=True)
        actor.stream()
        experience._receive(0.0)
    assert len(experience._queue) == credits
    assert experience._pausing() == [0]
    learner.send(1, 0, 0, 0)
    experience._receive(1.0)
    taken = experience.collect(lambda: None)
    for _ in range(credits + 2):
        actor.stream()
    assert actor._sent > credits
    assert actor._learner.pending_of(Chunk) == credits
    sample, size = learner.telemetry.registry.get_sample_value, sum(a.nbytes for a in taken[0].arrays.values())
    assert sample("bm3il_learner_taken_bytes_total") == 2 * size
    received = sample("bm3il_learner_received_bytes_total", {"kind": "sent"})
    assert received is not None
    assert (credits + 1) * size < received < (credits + 1) * (size + 3000)
    assert not sample("bm3il_learner_received_bytes_total", {"kind": "resent"})
    sample = telemetry.registry.get_sample_value
    assert (sample("bm3il_actor_sent_bytes_total", {"kind": "sent"}) or 0) > (credits + 1) * size
    assert not sample("bm3il_actor_sent_bytes_total", {"kind": "resent"})
    actor._learner.close()
    actor._weights.close()
    actor.close()
    telemetry.close()


@pytest.mark.parametrize(("session", "version"), [("old", 5), ("s", 1), ("s", 6)])
def test_what_is_too_old_is_not_trained_on(learner: Learner, session: str, version: int) -> None:
    learner.publish(5)
    ticket = learner.send(0, version, version, 1, session)
    learner.experience._receive(1.0)
    assert learner.note(0, ticket) == "stale"
    assert not learner.experience._queue


def test_a_new_session_forgets_the_chunks_of_the_last(learner: Learner) -> None:
    ticket = learner.send(0, 0, 0, 1)
    learner.experience._receive(1.0)
    assert len(learner.experience._queue) == 1
    learner.publish(0, "another")
    assert learner.note(0, ticket) == "stale"
    assert not learner.experience._queue


def test_an_actor_that_is_started_again_plays_other_episodes(learner: Learner) -> None:
    played = []
    for _ in range(2):
        telemetry = Telemetry("actor", 0, Sender("run", "actor-0"), 0, "127.0.0.1")
        actor = process._Actor(learner.job, ActorSettings(steps_per_iteration=50, hidden=(4,)), 0, telemetry)
        deadline = time.monotonic() + 10
        learner.experience._queue.clear()
        while not learner.experience._queue:
            assert time.monotonic() < deadline
            learner.experience._weights.pump(repeat=True)
            actor.stream()
            learner.experience._receive(0.01)
        played.append(learner.experience._queue[0][1].arrays["0.own"].copy())
        actor._learner.close()
        actor._weights.close()
        actor.close()
        telemetry.close()
    assert not np.array_equal(*played)
