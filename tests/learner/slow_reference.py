"""The equations of the design once more: one row, one agent, one action at a time, in plain loops.

Nothing here uses the layout, the mean field or the losses of the product; parameters are read off its modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bm3il.actors.policy import Policy
from bm3il.learner.critics import Critic
from bm3il.learner.mean_field import MeanField
from bm3il.learner.replay import Batch
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.observations import Observations
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.plain import observed, seen_by


@dataclass(frozen=True)
class Agent:
    """Where an agent is kept: its block, its place among the block's agents, its network, its slot, its type."""

    block: int
    place: int
    group: int
    slot: int
    type: int


def spec_of(*types: tuple[int, int, int], episode_length: int = 5) -> EnvironmentSpec:
    """types: (count, observation_dim, action_dim)."""
    return EnvironmentSpec("toy", tuple(TypeSpec(f"t{m}", *t) for m, t in enumerate(types)), episode_length)


def agents_of(layout: Layout) -> list[Agent]:
    """All agents, block by block: the types of one shape follow each other in the order of the spec."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for m, t in enumerate(layout.spec.types):
        shapes.setdefault((t.observation_dim, t.action_dim), []).append(m)
    agents = []
    for b, types in enumerate(shapes.values()):
        place = 0
        for t, m in enumerate(types):
            for x in range(layout.spec.types[m].count):
                group, slot = (place, 0) if layout.parameter_sharing == "agent" else (t, x)
                agents.append(Agent(b, place, group, slot, m))
                place += 1
    return agents


def random_rows(layout: Layout, batch: int, generator: torch.Generator, alive: float = 0.7) -> JointRows:
    """Rows of arbitrary values in which some agents are inactive, and may do everything."""
    dtype = torch.get_default_dtype()
    shapes = [(batch, block.num_agents) for block in layout.blocks]
    observations = [
        torch.randn(*shape, block.observation_dim, generator=generator, dtype=dtype)
        for shape, block in zip(shapes, layout.blocks, strict=True)
    ]
    return JointRows(
        seen_by(layout, observations),
        [
            torch.randint(block.action_dim, shape, generator=generator)
            if block.discrete
            else torch.rand(*shape, block.action_dim, generator=generator, dtype=dtype) * 2 - 1
            for shape, block in zip(shapes, layout.blocks, strict=True)
        ],
        [torch.rand(shape, generator=generator) < alive for shape in shapes],
    )


def masked(layout: Layout, rows: JointRows, generator: torch.Generator) -> list[Observations]:
    """What the rows show, with masks that allow the action taken and about half of the others."""
    observations = []
    for block, seen, actions in zip(layout.blocks, rows.observations, rows.actions, strict=True):
        mask = torch.rand(*actions.shape, block.action_dim, generator=generator) < 0.5
        mask = mask.scatter(-1, actions.unsqueeze(-1), True) if block.discrete else torch.ones_like(mask)
        observations.append(observed(seen.dense(), mask))
    return observations


def random_batch(layout: Layout, size: int, seed: int) -> Batch:
    """A batch in which agents are inactive, die, and episodes end, all at random."""
    generator = torch.Generator().manual_seed(seed)
    rows, following = (random_rows(layout, size, generator) for _ in range(2))
    return Batch(
        rows=JointRows(masked(layout, rows, generator), rows.actions, rows.active),
        next_observations=masked(layout, following, generator),
        next_active=following.active,
        rewards=[torch.randn(active.shape, generator=generator) for active in rows.active],
        terminated=torch.rand(size, generator=generator) < 0.3,
    )


def mlp(network: StackedMLP, group: int, slot: int, x: torch.Tensor, slope: float = 0.0) -> torch.Tensor:
    """One network on one vector; between layers a ReLU with the given slope below zero."""
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        own_bias = bias[group, slot] if bias.shape[1] > 1 else bias[group, 0]
        x = torch.stack([(weight[group, :, j] * x).sum() for j in range(weight.shape[2])]) + own_bias
        if layer < len(network.weights) - 1:
            x = torch.where(x > 0, x, slope * x)
    return x


def one_hot(action: int, width: int) -> torch.Tensor:
    return torch.tensor([float(a == action) for a in range(width)])


def observation(observations: list[Observations], row: int, agent: Agent) -> torch.Tensor:
    """What one agent observes in one row."""
    return observations[agent.block].dense()[row, agent.place]


def vector(rows: JointRows, layout: Layout, row: int, agent: Agent) -> torch.Tensor:
    """The action vector of one agent in one row."""
    action = rows.actions[agent.block][row, agent.place]
    return one_hot(int(action), layout.blocks[agent.block].action_dim) if action.ndim == 0 else action


def q_values(
    critic: Critic,
    rows: JointRows,
    heads: int,
    attend_own_type: bool,
    row: int,
    agent: Agent,
    mean_field: MeanField = "others",
) -> torch.Tensor:
    """Q^i(s^i, ·, ã^i) of one agent in one row, [A]."""
    own = mlp(critic.encoders[agent.block], agent.group, agent.slot, observation(rows.observations, row, agent))
    own = own.clamp(min=0)
    if critic.context != "none":
        seen = entities(critic, rows, attend_own_type, row, agent, mean_field)
        own = torch.cat([own, weighed(critic, heads, own, seen)])
    return mlp(critic.heads[agent.block], agent.group, agent.slot, own, slope=0.01)


def weighed(critic: Critic, heads: int, own: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """ã^i [H], the attention of e^i over embeddings (Eq. 11); 0 if there is nothing to see."""
    attention = critic.others
    width = len(own) // heads
    mixed = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        values = [(e.unsqueeze(1) * attention.value).sum(0)[columns] for e in seen]
        if critic.context == "uniform_types":
            weights = [1 / len(seen) for _ in seen]
        else:
            query = (own.unsqueeze(1) * attention.query).sum(0)[columns]
            keys = [(e.unsqueeze(1) * attention.key).sum(0)[columns] for e in seen]
            powers = [torch.exp((key * query).sum() / math.sqrt(width)) for key in keys]
            weights = [power / sum(powers) for power in powers]
        mixed.append(sum((w * v for w, v in zip(weights, values, strict=True)), start=torch.zeros(width)))
    return torch.cat(mixed)


def entities(
    critic: Critic, rows: JointRows, attend_own_type: bool, row: int, agent: Agent, mean_field: MeanField = "others"
) -> list[torch.Tensor]:
    """The embeddings that an agent may attend to: of the types with an active agent, or of the other active agents.

    With the mean field of the others, a type is its active agents but for the one that looks.
    """
    layout, everybody = critic.layout, agents_of(critic.layout)
    seen = []
    if critic.context == "agents":
        for other in everybody:
            if other != agent and rows.active[other.block][row, other.place]:
                both = torch.cat([observation(rows.observations, row, other), vector(rows, layout, row, other)])
                seen.append(mlp(critic.others.embeddings[other.block], other.group, 0, both).clamp(min=0))
        return seen
    for m in range(layout.spec.num_types):
        members = [other for other in everybody if other.type == m]
        seen_of_m = [other for other in members if rows.active[other.block][row, other.place]]
        if mean_field == "others":
            seen_of_m = [other for other in seen_of_m if other != agent]
        vectors = [vector(rows, layout, row, other) for other in seen_of_m]
        if vectors and (attend_own_type or agent.type != m):
            b = members[0].block
            number = layout.blocks[b].types.index(m)
            mean = sum(vectors, start=torch.zeros(layout.spec.types[m].action_dim)) / len(vectors)
            seen.append(mlp(critic.others.embeddings[b], number, 0, mean))
    return seen


def log_policy(policy: Policy, observations: list[Observations], row: int, agent: Agent) -> list[torch.Tensor | None]:
    """log π^i(a|s^i) of one agent in one row, [A]; None for a forbidden action."""
    logits = mlp(policy.networks[agent.block], agent.group, agent.slot, observation(observations, row, agent))
    mask = observations[agent.block].masks()[row, agent.place]
    total = sum(torch.exp(logits[a]) for a in range(len(logits)) if mask[a])
    return [logits[a] - torch.log(total) if mask[a] else None for a in range(len(logits))]
