"""benchmarks/critics.py: how much of a critic's advantages hangs on the others."""

from __future__ import annotations

import critics
import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import rollout
from bm3il.learner.critics import Context, Critic
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.registry import make_environment

EPISODES = 3


def played(context: Context) -> tuple[Critic, Policy, JointRows]:
    environment = make_environment("rover_tower?pairs=2", EPISODES)
    layout = Layout.of(environment.spec, "type", True)
    policy = Policy(layout, [8], torch.Generator().manual_seed(1))
    critic = Critic(layout, context, 8, 2, True, torch.Generator().manual_seed(2))
    days = Demonstrations.from_trajectories(rollout(environment, policy, 3), environment.spec, "")
    return critic, policy, days.rows(layout).widened()


@pytest.mark.parametrize("context", ["types", "uniform_types", "agents"])
def test_only_others_that_did_something_else_change_advantages(context: Context) -> None:
    critic, policy, rows = played(context)
    numbers = torch.arange(len(rows))
    taken = critics.advantages(critic, policy, rows, numbers)
    seen = zip(critic.layout.blocks, rows.observations, strict=True)
    assert len(taken) == sum(int(block.see(observation).options().allowed.sum()) for block, observation in seen)
    assert torch.equal(taken, critics.advantages(critic, policy, rows, numbers))
    assert not torch.allclose(taken, critics.advantages(critic, policy, rows, numbers.flip(0)))
    own, moment, day = critics.spreads(critic, policy, rows, EPISODES)
    assert own > moment > 0
    assert own > day > 0


def test_another_day_is_the_same_hour_of_another_episode() -> None:
    critic, policy, rows = played("types")
    rows = rows.select(torch.arange(len(rows) // EPISODES).repeat(EPISODES))  # all days are the same
    own, moment, day = critics.spreads(critic, policy, rows, EPISODES)
    assert day == pytest.approx(0.0, abs=1e-6)
    assert moment > 1e-3 * own


def test_evenness_is_of_those_who_are_seen() -> None:
    weights = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    assert critics.evenness(weights) == pytest.approx(1.0)
    assert critics.evenness(torch.tensor([[[0.9, 0.1, 0.0]]])) == pytest.approx(0.469, abs=1e-3)
