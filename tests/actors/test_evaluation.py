"""Return estimates, and evaluations on fixed start states."""

from __future__ import annotations

import numpy as np
import pytest

from actors import evaluation
from actors.evaluation import ReturnEstimate, evaluate
from actors.policy import UniformPolicy
from protocol.environment import Environment
from protocol.registry import make_environment


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


def test_evaluations_repeat_and_their_episodes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EPISODES_AT_ONCE", 4)
    environment = "rover_tower?pairs=2"
    uniform = UniformPolicy(make_environment(environment, 1).spec)
    one, again, other = (evaluate(environment, uniform, 10, seed) for seed in (3, 3, 4))
    assert one.shape == (10, 4)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(np.unique(one[:, 0])) == 10


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
