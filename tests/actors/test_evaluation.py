"""Return estimates, and evaluations on fixed start states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from bm3il.actors import evaluation, rollout, simulator
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.evaluation import Evaluator, ReturnEstimate, Scale, evaluate
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.settings import EvaluationSettings
from bm3il.launch import demonstrations
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.registry import make_environment


def test_standard_error_over_independent_episodes() -> None:
    returns = np.random.default_rng(0).normal(size=(50, 3))
    estimate = ReturnEstimate.of(returns)
    means = returns.mean(axis=1)
    assert estimate.mean == pytest.approx(means.mean())
    assert estimate.stderr == pytest.approx(means.std(ddof=1) / 50**0.5)


def test_copies_of_an_episode_do_not_make_the_estimate_surer() -> None:
    returns = np.random.default_rng(1).normal(size=(20, 2))
    alone = ReturnEstimate.of(returns)
    repeated = ReturnEstimate.of(np.repeat(returns, 4, axis=0), groups=np.repeat(np.arange(20), 4))
    assert repeated.mean == pytest.approx(alone.mean)
    assert repeated.stderr == pytest.approx(alone.stderr)


def test_of_one_episode_or_one_start_nobody_knows_the_error() -> None:
    returns = np.random.default_rng(1).normal(size=(4, 2))
    assert ReturnEstimate.of(returns[:1]).stderr is None
    assert ReturnEstimate.of(returns, groups=np.zeros(4)).stderr is None


def test_evaluations_repeat_and_their_episodes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EPISODES_AT_ONCE", 4)
    environment = "rover_tower?pairs=2"
    uniform = UniformPolicy(make_environment(environment, 1).spec)
    one, again, other = (evaluate(environment, uniform, 10, seed) for seed in (3, 3, 4))
    assert one.shape == (10, 4)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(np.unique(one[:, 0])) == 10


def test_an_environment_says_how_many_of_it_are_played_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one does whose copies are processes; recorders hold to it, too."""
    played: list[int] = []
    reset = RoverTower.reset

    def counted(world: RoverTower, *args: Any) -> TimeStep:
        played.append(world.num_envs)
        return reset(world, *args)

    monkeypatch.setattr(RoverTower, "most_copies", 3, raising=False)
    monkeypatch.setattr(RoverTower, "reset", counted)
    environment = "rover_tower?pairs=2"
    uniform = UniformPolicy(make_environment(environment, 1).spec)
    assert evaluate(environment, uniform, 7, 1).shape == (7, 4)
    demonstrations.record(environment, 7, 1, tmp_path / "recorded.safetensors")
    assert played == [3, 3, 1, 3, 3, 3]


def test_what_would_not_fit_the_memory_is_played_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []

    def returns(environment: Environment, *_: object) -> np.ndarray:
        played.append(environment.num_envs)
        return np.zeros((environment.num_envs, environment.spec.num_agents))

    monkeypatch.setattr(evaluation.rollout, "returns", returns)
    spec = make_environment("rover_tower?pairs=2", 1).spec
    seen = sum(t.count * t.observation_dim for t in spec.types)
    monkeypatch.setattr(evaluation, "NUMBERS_AT_ONCE", 3 * seen + 1)
    assert evaluate("rover_tower?pairs=2", UniformPolicy(spec), 10, 3).shape == (10, 4)
    assert played == [3, 3, 3, 1]


class Clock:
    """Time that passes only where a simulator takes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow(RoverTower):
    """Steps that take a while for each copy, and remember what was played."""

    def __init__(self, num_envs: int, clock: Clock, seconds: float) -> None:
        super().__init__(num_envs, pairs=2)
        self._clock, self._seconds = clock, seconds

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        self._clock.now += self._seconds * self.num_envs
        return super().step(actions)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    name = "rover_tower?pairs=2"
    spec, none = make_environment(name, 1).spec, Endpoints("", "", "", "")
    return Job("run", tmp_path, name, spec, "rover_tower_4", 0, "maac", "lockstep", 0, 1000, 1, "type", False, none)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[Clock, list[int]]:
    """Makes simulators slow, by the step and copy; the clock, and how many copies each had."""
    clock, copies = Clock(), list[int]()

    def made(_: str, num_envs: int) -> Slow:
        copies.append(num_envs)
        return Slow(num_envs, clock, seconds)

    monkeypatch.setattr(simulator, "make_environment", made)
    monkeypatch.setattr(evaluation, "time", clock)
    return clock, copies


@pytest.mark.parametrize("starts", ["fresh", "demonstrations"])
@pytest.mark.parametrize("seconds", [0.001, 0.004, 0.01, 0.1])
def test_an_evaluation_takes_no_longer_than_it_may(
    job: Job, monkeypatch: pytest.MonkeyPatch, seconds: float, starts: Literal["fresh", "demonstrations"]
) -> None:
    """And is of as many episodes as that allows."""
    evaluator = Evaluator(job, EvaluationSettings(starts=starts, seconds=10.0))
    clock, copies = slow(monkeypatch, seconds)
    uniform = UniformPolicy(job.spec)
    evaluator.returns(uniform, 1000)
    began, _ = clock.now, copies.clear()
    returns = evaluator.returns(uniform, 1000)
    episode, wanted = 25 * seconds, 1000 if starts == "fresh" else 100
    assert clock.now - began <= 10 + episode
    assert len(returns) == sum(copies)
    assert min(wanted, 10 / episode - 2) <= len(returns) <= min(wanted, 10 / episode + 1)
    estimate = evaluator.estimate(returns)
    assert estimate.episodes == len(returns)
    assert np.isfinite(estimate.stderr)


def test_a_simulator_slower_than_the_budget_plays_one_episode(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(job, EvaluationSettings(seconds=10.0))
    _, copies = slow(monkeypatch, 3.0)
    assert len(evaluator.returns(UniformPolicy(job.spec), 1000)) == 1
    assert copies == [1, 1]


def test_a_slow_simulator_is_not_started_hundreds_of_times_to_find_that_out(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(job, EvaluationSettings(seconds=10.0))
    clock, copies = slow(monkeypatch, 0.1)
    evaluator.returns(UniformPolicy(job.spec), 1000)
    assert max(copies) <= 4
    assert clock.now <= 10 + 2.5 + 5 * 0.1  # the measurement is of a few steps


def test_time_that_is_not_needed_changes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow a simulator is: figures are those of the seed."""
    uniform = UniformPolicy(job.spec)
    wanted = evaluate(job.environment, uniform, 600, job.seed)
    slow(monkeypatch, 0.001)
    evaluator = Evaluator(job, EvaluationSettings(final_episodes=600, seconds=16.0))
    assert np.array_equal(evaluator.returns(uniform, 600), wanted)


def test_part_of_the_start_states_are_the_first_ones(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(job, EvaluationSettings(starts="demonstrations", seconds=10.0))
    slow(monkeypatch, 0.01)
    played: list[np.ndarray] = []
    returns = rollout.returns

    def noting(*args: Any) -> np.ndarray:
        played.append(args[4]["rover_positions"])
        return returns(*args)

    monkeypatch.setattr(rollout, "returns", noting)
    count = len(evaluator.returns(UniformPolicy(job.spec), 1))
    demonstrated = Demonstrations.load(resolve("rover_tower_4")).starts["rover_positions"]
    assert 30 < count < len(demonstrated)
    assert np.array_equal(np.concatenate(played), demonstrated[:count])


def test_the_uniform_policy_is_played_once_and_remembered(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluationSettings(final_episodes=30)
    first = Evaluator(job, settings).random_returns()
    assert np.array_equal(first, evaluate(job.environment, UniformPolicy(job.spec), 30, job.seed).mean(axis=0))
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert np.array_equal(Evaluator(job, settings).random_returns(), first)
    told = json.loads((job.run_folder / "baseline.json").read_text())
    assert told == {"random_returns": first.tolist(), "episodes": 30}


def test_each_type_is_held_against_its_own_random_and_expert(job: Job) -> None:
    """Rovers like the expert's and towers like random ones, or the other way round: on the mean nobody sees it."""
    scale = Scale(job.spec, np.array([0.0, 0.0, 10.0, 10.0], np.float32), np.array([2.0, 2.0, 14.0, 14.0]))
    returns = np.array([[2.0, 2.0, 10.0, 10.0], [2.0, 2.0, 10.0, 10.0]], np.float32)
    of = scale.of_types(returns)
    assert [of[name]["normalized_return"] for name in ("rover", "tower")] == [1.0, 0.0]
    assert of["tower"] == {
        "return_mean": 10.0,
        "return_stderr": 0.0,
        "random_return": 10.0,
        "expert_return": 14.0,
        "normalized_return": 0.0,
    }
    assert scale.normalized(float(returns.mean())) == pytest.approx(1 / 3)
    assert (scale.random_return, scale.expert_return) == (5.0, 8.0)
    assert Scale(job.spec).of_types(returns)["rover"]["normalized_return"] is None
    assert Scale(job.spec, scale.random, scale.random).normalized(1.0) is None


def test_of_one_type_all_is_said_by_the_mean(job: Job) -> None:
    alone = replace(job.spec, types=job.spec.types[:1])
    assert Scale(alone).of_types(np.zeros((2, 2), np.float32)) == {}


def test_the_expert_of_another_crowd_is_known_by_its_types(job: Job) -> None:
    spec = make_environment("rover_tower?pairs=3", 1).spec
    recorded = Demonstrations.load(resolve("rover_tower_4"))
    found, known = evaluation._per_agent(recorded, spec), recorded.returns_of_agents
    assert found is not None
    assert known is not None
    np.testing.assert_allclose(found, np.repeat([known[:2].mean(), known[2:].mean()], 3))


def test_the_expert_of_as_many_agents_of_other_types_is_known_by_its_types(job: Job) -> None:
    recorded = Demonstrations.load(resolve("rover_tower_4"))
    known = np.array([1.0, 1, 100, 100], np.float32)
    recorded = replace(recorded, returns=np.tile(known, (recorded.num_episodes, 1)))
    rover, tower = recorded.spec.types
    other = replace(recorded.spec, types=(replace(rover, count=3), replace(tower, count=1)), changes="rover_tower")
    np.testing.assert_array_equal(evaluation._per_agent(recorded, other), [1, 1, 1, 100])
    np.testing.assert_array_equal(evaluation._per_agent(recorded, recorded.spec), known)


def test_an_evaluator_says_how_far_it_is(job: Job) -> None:
    said: list[tuple[int, int]] = []
    settings = EvaluationSettings(final_episodes=300)
    Evaluator(job, settings, lambda *told: said.append(told)).returns(UniformPolicy(job.spec), 300)
    assert said[-50:] == 25 * [(0, 300)] + 25 * [(250, 300)]


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluations_are_greedy_if_they_are_to_be(job: Job, greedy: bool) -> None:
    class Noting(UniformPolicy):
        def __init__(self) -> None:
            super().__init__(job.spec)
            self.said: set[bool] = set()

        def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
            self.said.add(greedy)
            return super().act(now, generator, greedy)

    noting = Noting()
    Evaluator(job, EvaluationSettings(greedy=greedy)).returns(noting, 2)
    assert noting.said == {greedy}
