"""The evaluator's process, with a learner's sockets: which policies it evaluates, and what it says meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bm3il.actors import evaluation, process
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.process import _Evaluating, build_policy
from bm3il.actors.settings import ActorSettings, EvaluationSettings
from bm3il.learner.experience import Evaluated, RemoteExperience
from bm3il.learner.settings import Settings
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.messages import Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry

ENVIRONMENT = "rover_tower?pairs=2"
ACTOR = ActorSettings(steps_per_iteration=25, hidden=(4,))


class Run:
    """A learner's side, and an evaluator in the same thread."""

    def __init__(self, folder: Path) -> None:
        endpoints = Endpoints(*(f"ipc://{folder}/{name}" for name in ("e", "w", "r", "c")))
        spec = make_environment(ENVIRONMENT, 1).spec
        self.job = Job("run", folder, ENVIRONMENT, spec, "", 0, "maac", "lockstep", 0, 100, 1, "type", False, endpoints)
        self._telemetries = [Telemetry("learner", 0, Sender("run", "learner-0"))]
        self.shown = self._telemetries[0].numbers
        self.experience = RemoteExperience(self.job, Settings(actor=ACTOR), self._telemetries[0])
        self.evaluator = self.started_evaluator()
        self.policy = build_policy(self.job, ACTOR)

    def started_evaluator(self) -> _Evaluating:
        settings = EvaluationSettings(episodes=4, final_episodes=8, seconds=10.0)
        self._telemetries.append(telemetry := Telemetry("evaluator", 0, Sender("run", "evaluator-0")))
        evaluator = _Evaluating(self.job, ACTOR, settings, telemetry)
        for _ in range(50):  # a subscription takes a moment
            self.experience.evaluations()
            evaluator._weights._socket.poll(10)
        evaluator.play_baseline()
        self.registry = telemetry.registry
        return evaluator

    def publish(self, *versions: int, session: str = "s", episodes: int = 4) -> None:
        for version in versions:
            self.experience.publish(session, version, self.policy, episodes)

    def evaluated(self) -> list[Evaluated]:
        """What comes of the policies that were published."""
        found: list[Evaluated] = []
        for quiet in range(8):
            before = len(found)
            self.evaluator.follow()
            found += self.experience.evaluations(0.05)
            if quiet > 3 and len(found) == before and not self.evaluator._waiting:
                break
        return found

    def close(self) -> None:
        self.experience.close()
        for telemetry in self._telemetries:
            telemetry.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    built = Run(tmp_path)
    yield built
    built.close()


def versions(evaluated: list[Evaluated]) -> list[int]:
    return [one.version for one in evaluated]


def test_policies_are_evaluated_in_their_order_beside_the_uniform_one(run: Run) -> None:
    run.publish(0, 10, 20)
    evaluated = run.evaluated()
    assert versions(evaluated) == [0, 10, 20]
    random = evaluation.evaluate(ENVIRONMENT, UniformPolicy(run.job.spec), 8, 0)
    assert all(np.array_equal(one.random, random.mean(axis=0)) for one in evaluated)
    assert np.array_equal(evaluated[1].returns, evaluation.evaluate(ENVIRONMENT, run.policy, 4, 0))


def test_what_is_not_marked_or_came_before_is_not_evaluated(run: Run) -> None:
    run.publish(0)
    run.publish(1, 2, episodes=0)
    run.publish(3, 3)
    run.experience._weights.pump(repeat=True)
    assert versions(run.evaluated()) == [0, 3]


def test_an_evaluator_that_falls_behind_skips_to_the_newest(run: Run) -> None:
    """But the first policy may be the clone, and the last is the result."""
    run.evaluator._took = 6.0  # of the ten seconds that an evaluation may take
    run.publish(0, 10, 20, 30)
    run.evaluator.follow()
    run.evaluator._took = 6.0
    assert versions(run.evaluated()) == [0, 30]
    assert run.registry.get_sample_value("bm3il_evaluator_skipped_policies_total") == 2


def test_a_learner_that_went_back_has_its_policies_evaluated_again(run: Run) -> None:
    run.publish(0, 10)
    assert versions(run.evaluated()) == [0, 10]
    run.publish(20, session="s")
    run.publish(10, 20, session="again")
    assert versions(run.evaluated()) == [10, 20]


def test_an_evaluator_that_is_started_again_evaluates_the_newest(run: Run) -> None:
    run.publish(0, 10)
    run.evaluated()
    run.evaluator = run.started_evaluator()
    run.experience._weights.pump(repeat=True)
    assert versions(run.evaluated()) == [10]


def test_who_starts_late_evaluates_the_first_policy_too_unless_it_is_evaluated(run: Run) -> None:
    run.publish(0, 10)
    run.evaluator = run.started_evaluator()
    assert versions(run.evaluated()) == [0, 10]


def test_the_first_policy_is_evaluated_though_a_later_one_overtakes_it(run: Run) -> None:
    """A subscription holds before the learner has read of it, and only then does it send what it keeps."""
    run.publish(0, 10)
    first, second = (run.evaluator._weights.next(1.0) for _ in range(2))
    assert first is not None
    assert second is not None
    for message in (second, first, second, first):
        run.evaluator._queue(message)
    assert [message.body.version for message in run.evaluator._waiting] == [0, 10]
    assert versions(run.evaluated()) == [0, 10]


def test_the_first_policy_of_a_session_is_of_no_use_to_the_next(run: Run) -> None:
    run.publish(0)
    run.publish(10, session="again")
    assert versions(run.evaluated()) == [10]
    run.started_evaluator()
    assert versions(run.evaluated()) == []


def test_an_evaluator_at_work_is_heard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKING_SECONDS", 0.0)
    run.experience._published = run.experience._evaluator_heard = -1000.0
    assert run.experience.evaluator_silent_seconds() > 100
    run.evaluated()  # what it said of the baseline
    run.experience._evaluator_heard = -1000.0
    run.evaluator._say_so(3, 8)
    run.experience.evaluations(1.0)
    assert run.experience.evaluator_silent_seconds() < 100
    assert (run.shown["evaluated_episodes"], run.shown["episodes_to_evaluate"]) == (3, 8)


def test_who_hands_out_weights_waits_from_then_on(run: Run) -> None:
    run.experience._published = run.experience._evaluator_heard = -1000.0
    run.publish(5)
    assert run.experience.evaluator_silent_seconds() < 100
