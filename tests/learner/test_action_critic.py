"""Critics of one own action at a time: against loops in float64, and learning to move in a continuous task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.critics import Context
from bm3il.learner.replay import Replay
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.learner.slow_reference import agents_of, entities, mlp, observation, one_hot, random_rows, spec_of, weighed

HEADS = 2
DISCRETE = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))
MIXED = EnvironmentSpec("mixed", (TypeSpec("a", 2, 3, 3), TypeSpec("b", 3, 4, 2, discrete=False)), 5)
CONTEXTS: tuple[Context, ...] = ("types", "uniform_types", "agents", "none")


def build(spec: EnvironmentSpec, sharing: ParameterSharing, context: Context, own_type: bool = True) -> ActionCritic:
    generator = torch.Generator().manual_seed(1)
    return ActionCritic(Layout.of(spec, sharing, True), context, 6, HEADS, own_type, generator)


@pytest.mark.usefixtures("float64", "both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("spec", [DISCRETE, MIXED], ids=["discrete", "mixed"])
def test_the_query_comes_from_state_and_action(
    spec: EnvironmentSpec, context: Context, sharing: ParameterSharing
) -> None:
    for own_type in (True, False):
        critic = build(spec, sharing, context, own_type)
        rows = random_rows(critic.layout, 3, torch.Generator().manual_seed(2))
        blocks = critic.layout.blocks
        fast = [block.rows(q) for block, q in zip(blocks, critic(rows), strict=True)]
        for agent in agents_of(critic.layout):
            block = blocks[agent.block]
            for row in range(len(rows)):
                taken = rows.actions[agent.block][row, agent.place]
                own = [one_hot(a, block.action_dim) for a in range(block.action_dim)] if block.discrete else [taken]
                slow = []
                for action in own:
                    both = torch.cat([observation(rows.observations, row, agent), action])
                    encoded = mlp(critic.encoders[agent.block], agent.group, agent.slot, both).clamp(min=0)
                    seen = encoded
                    if context != "none":
                        others = entities(critic, rows, own_type, row, agent)
                        seen = torch.cat([encoded, weighed(critic, HEADS, encoded, others)])
                    slow.append(mlp(critic.heads[agent.block], agent.group, agent.slot, seen, slope=0.01)[0])
                found = fast[agent.block][row, agent.place]
                torch.testing.assert_close(found.reshape(-1), torch.stack(slow), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64", "both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_others_do_does_not_depend_on_the_own_action_taken(context: Context, sharing: ParameterSharing) -> None:
    """Q^i(s, a', ã) of a fixed a' stays when the action a^i in the rows changes."""
    critic = build(MIXED, sharing, context)
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(4), alive=0.8)
    moved_somebody = False
    for agent in agents_of(critic.layout):
        block, changed = critic.layout.blocks[agent.block], [a.clone() for a in rows.actions]
        own = changed[agent.block][:, agent.place]
        own.copy_((own + 1) % block.action_dim if block.discrete else own.flip(-1) - 0.5)
        observations = block.grid(rows.observations[agent.block].dense()).flatten(1, 2)
        fixed = torch.full((*observations.shape[:2], block.action_dim), 0.3)
        before, after = (
            critic.of(
                agent.block,
                observations,
                fixed,
                critic.scenes(JointRows(rows.observations, actions, rows.active))[agent.block],
            ).unflatten(1, (block.slots, 4))
            for actions in (rows.actions, changed)
        )
        torch.testing.assert_close(after[agent.group, agent.slot], before[agent.group, agent.slot], rtol=1e-10, atol=0)
        moved_somebody |= not torch.allclose(after, before)
    assert moved_somebody == (context != "none")


@pytest.mark.usefixtures("float64")
def test_the_policies_step_leaves_the_critics_alone() -> None:
    """With rewards that the critics already predict, only the policies have a gradient from Q."""
    layout = Layout.of(MIXED, "type")
    generator = torch.Generator().manual_seed(0)
    critic = ActionCritic(layout, "types", 8, HEADS, True, generator)
    learner = ActionActorCritic(
        Policy(layout, (8,), generator), critic, LearnerSettings(hidden=8, heads=HEADS), torch.device("cpu"), 0
    )
    rows = random_rows(layout, 6, torch.Generator().manual_seed(3))
    b = next(b for b, block in enumerate(layout.blocks) if not block.discrete)
    observations = layout.blocks[b].grid(rows.observations[b].dense()).flatten(1, 2)
    weight = torch.ones(observations.shape[:2])
    figures = learner._improve_continuous(b, observations, critic.scenes(rows)[b], 0.1, weight)
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad.abs().sum() > 0 for p in learner.policy.networks[b].parameters())
    assert set(figures) == {"policy_loss", "policy_entropy"}


class Targets:
    """Every agent sees a goal in the square and is paid for an action near it; one step is an episode."""

    spec = EnvironmentSpec("targets", (TypeSpec("a", 2, 2, 2, discrete=False), TypeSpec("b", 1, 2, 2, False)), 1)

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        random = np.random.default_rng(seed)
        self._goals = [
            random.uniform(-0.9, 0.9, (self.num_envs, t.count, 2)).astype(np.float32) for t in self.spec.types
        ]
        return self._show([np.zeros(goal.shape[:2], np.float32) for goal in self._goals], False)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        far = [((a - g) ** 2).sum(-1) for a, g in zip(actions, self._goals, strict=True)]
        return self._show([-d.astype(np.float32) for d in far], True)

    def _show(self, rewards: list[np.ndarray], ended: bool) -> TimeStep:
        masks = [np.ones(goal.shape, bool) for goal in self._goals]
        active = [np.ones(goal.shape[:2], bool) for goal in self._goals]
        flags = np.full(self.num_envs, ended)
        return TimeStep(self._goals, masks, active, rewards, flags, ~flags & False)


def test_squashed_gaussian_policies_learn_where_to_go() -> None:
    torch.set_num_threads(1)
    environment = Targets(64)
    layout = Layout.of(environment.spec, "type")
    generator = torch.Generator().manual_seed(0)
    settings = LearnerSettings(hidden=32, temperature=0.05, final_temperature=0.005, policy_gradient_norm=5.0)
    policy = Policy(layout, (32,), generator)
    learner = ActionActorCritic(
        policy, ActionCritic(layout, "types", 32, 4, True, generator), settings, torch.device("cpu"), 0
    )
    replay = Replay(layout, 2_000)
    uniform = rollout(environment, UniformPolicy(environment.spec), 10_000).returns().mean()
    for iteration in range(40):
        replay.add(rollout(environment, policy, iteration))
        for _ in range(10):
            batch = replay.sample(128, generator)[0]
            learner.update(batch, batch.rewards, iteration / 40)
    learned = rollout(environment, policy, 10_000, greedy=True).returns().mean()
    assert uniform < -1.0
    assert learned > 0.05 * uniform
