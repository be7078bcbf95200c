"""benchmarks/contexts.py: who the others are, what is still to come, and that a context is told from none."""

from __future__ import annotations

import contexts
import numpy as np
import pytest

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol.registry import make_environment
from bm3il.protocol.trajectories import Trajectories


@pytest.fixture(scope="module")
def played() -> Trajectories:
    environment = make_environment("berlin?scenario=berlin46&types=5&agents=10&sight=near", 2)
    return rollout(environment, UniformPolicy(environment.spec), 0)


def test_the_others_are_all_but_oneself(played: Trajectories) -> None:
    everybody, types = contexts.others(played, False), contexts.others(played, True)
    actions = contexts.one_hot(played, played.spec)
    assert everybody.shape == actions.shape
    np.testing.assert_allclose(everybody[3, 1, 4], np.delete(actions[3, 1], 4, axis=0).mean(axis=0), atol=1e-6)
    wide = actions.shape[-1]
    own, other = types[3, 1, 4, 2 * wide : 3 * wide], types[3, 1, 4, :wide]  # agent 4 is the first of type 2
    np.testing.assert_array_equal(own, actions[3, 1, 5])
    np.testing.assert_allclose(other, actions[3, 1, :2].mean(axis=0))


def test_what_is_still_to_come_is_discounted(played: Trajectories) -> None:
    rewards = np.concatenate(played.rewards, axis=2)
    sums = contexts.to_go(played, 0.5)
    np.testing.assert_allclose(sums[-1], rewards[-1])
    np.testing.assert_allclose(sums[-3], rewards[-3] + 0.5 * rewards[-2] + 0.25 * rewards[-1], rtol=1e-5)


def test_parts_are_hidden_by_name(played: Trajectories) -> None:
    spec = played.spec
    whole, without = contexts.observed(played, spec, ())[0], contexts.observed(played, spec, ("loads.",))[0]
    hidden = sum(part.width for part in spec.types[0].parts if part.name.startswith("loads."))
    assert whole.shape[-1] - without.shape[-1] == hidden > 0


def test_only_what_tells_something_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "TRAINED_ROWS", 6_000)
    random = np.random.default_rng(0)
    told, noise = (random.normal(size=(20, 40, 5, 1)).astype(np.float32) for _ in range(2))
    target = (3 * told + 0.5 * noise)[..., 0]
    assert contexts.explained((told,), target, 0) == pytest.approx(9 / 9.25, abs=0.01)
    assert abs(contexts.explained((noise * 0,), target, 0)) < 0.01
