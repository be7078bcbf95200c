"""Q-functions of all agents: own state and action, and an attention over what the others do.

Every algorithm's critic is this one network with another `Context`, the part that sees the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from learner.mean_field import action_vectors, mean_actions
from protocol.layout import JointRows, Layout
from protocol.stacked import TILE_NUMBERS, StackedMLP, uniform

Context = Literal["types", "uniform_types", "agents", "none"]
"""Attention over types' mean fields (BM3IL); their unweighted mean (MTMFIL); attention over every other agent
(MA-DAAC); nothing (MA-GAIL)."""


LEAKY_SLOPE = 0.01


class Critic(nn.Module):
    """Q^i(s^i, ·, ã^i) for every agent and every own action, in one pass.

    e^i = relu(W^i s^i); ã^i as `_Attention` says; Q^i = head^i([e^i, ã^i]) with one hidden layer.
    """

    def __init__(
        self,
        layout: Layout,
        context: Context,
        hidden: int,
        heads: int,
        attend_own_type: bool,
        generator: torch.Generator,
        agent_identity: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.context = layout, context
        width = hidden if context == "none" else 2 * hidden
        self.encoders = nn.ModuleList(
            StackedMLP(
                b.groups,
                (b.observation_dim, hidden),
                generator,
                activate_output=True,
                identity_slots=b.slots if agent_identity else 1,
            )
            for b in layout.blocks
        )
        self.heads = nn.ModuleList(
            StackedMLP(b.groups, (width, hidden, b.action_dim), generator, slope=LEAKY_SLOPE) for b in layout.blocks
        )
        self.others = (
            None if context == "none" else _Attention(layout, context, hidden, heads, attend_own_type, generator)
        )

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows (their actions are those that the others took) → per block Q [G, B, S, A]."""
        observations = [
            block.grid(observation).flatten(1, 2)
            for block, observation in zip(self.layout.blocks, rows.observations, strict=True)
        ]
        seen = self.perceive(observations, rows)
        return [
            head(*inputs).unflatten(1, (len(rows), block.slots))
            for block, head, inputs in zip(self.layout.blocks, self.heads, seen, strict=True)
        ]

    def perceive(self, observations: Sequence[torch.Tensor], rows: JointRows) -> list[tuple[torch.Tensor, ...]]:
        """What the heads look at, per block: e^i and, if there is a context, ã^i, each [G, B·S, H].

        observations: those of `rows` as grids [G, B·S, O].
        """
        encoded = [encoder(x) for encoder, x in zip(self.encoders, observations, strict=True)]
        if self.others is None:
            return [(own,) for own in encoded]
        return list(zip(encoded, self.others(encoded, rows), strict=True))


class _Attention(nn.Module):
    """ã^i = Σ_k α_k V e_k, α = softmax_k((W_k e_k)·(W_q e^i)/√d): §3.2.3, Eq. 11.

    The entities k are the M types, e_m = relu(E_m ā_m), or the N agents, e_j = relu(E^j [s^j, a^j]).
    W_q, W_k, V [H, H] are shared by all agents; the columns of each are divided among `heads` heads of width d.
    Scores are computed as e^i · (W_qᵀ W_k e_k): entities are few, so folding both maps into the key leaves no product
    that runs over all agents but those with the entities, O(N·M).
    """

    def __init__(
        self, layout: Layout, context: Context, hidden: int, heads: int, attend_own: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layout, self.context, self.heads = layout, context, heads
        self.embeddings = nn.ModuleList(
            StackedMLP(
                b.groups if context == "agents" else len(b.types),
                ((b.observation_dim if context == "agents" else 0) + b.action_dim, hidden),
                generator,
                activate_output=True,
            )
            for b in layout.blocks
        )
        self.query, self.key, self.value = (uniform((hidden, hidden), hidden, generator) for _ in range(3))
        self.own = _own_entity(layout, context) if context == "agents" or not attend_own else None

    def forward(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[torch.Tensor]:
        """encoded: per block e^i [G, B·S, H] → per block ã^i [G, B·S, H]."""
        entities, present = self._entities(rows)
        batch, _, width = entities.shape
        per_row = [own.unflatten(1, (batch, -1)).movedim(1, 0) for own in encoded]
        height = batch
        if entities.device.type == "cpu":
            height = max(1, TILE_NUMBERS // (width * self.layout.spec.num_agents))
        tiles = zip(
            zip(*(own.split(height) for own in per_row), strict=True),
            entities.split(height),
            present.split(height),
            strict=True,
        )
        mixed = [self._mix([part.flatten(1, 2) for part in own], *others) for own, *others in tiles]
        return [
            torch.cat(parts).unflatten(1, own.shape[1:3]).movedim(0, 1).flatten(1, 2)
            for parts, own in zip(zip(*mixed, strict=True), per_row, strict=True)
        ]

    def _entities(self, rows: JointRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, K, H] and presence [B, K] of what can be attended to, block after block."""
        entities, present = [], []
        for b, (block, embed) in enumerate(zip(self.layout.blocks, self.embeddings, strict=True)):
            if self.context == "agents":
                seen = torch.cat([rows.observations[b], action_vectors(block, rows.actions[b])], dim=-1)
                embedded = block.rows(embed(block.grid(seen).flatten(1, 2)).unflatten(1, (len(rows), block.slots)))
                here = rows.active[b]
            else:
                means, here = mean_actions(block, rows.actions[b], rows.active[b])
                embedded = embed(means.transpose(0, 1)).transpose(0, 1)
            entities.append(embedded)
            present.append(here)
        return torch.cat(entities, dim=1), torch.cat(present, dim=1)

    def _mix(
        self, encoded: Sequence[torch.Tensor], entities: torch.Tensor, present: torch.Tensor
    ) -> list[torch.Tensor]:
        """Some rows: per block e^i [B, G·S, H], entities [B, K, H], present [B, K] → per block ã^i [B, G·S, H]."""
        # A value of 0 for whoever is absent: where nobody is present, the weights mean nothing and ã is 0.
        values = (entities @ self.value) * present.unsqueeze(-1)
        if self.context == "uniform_types":
            return [self._uniform(b, agents, values, present) for b, agents in enumerate(encoded)]
        batch, count, _ = entities.shape
        keys, values = self._folded_keys(entities), _block_diagonal(values.unflatten(-1, (self.heads, -1)))
        mixed = []
        for b, agents in enumerate(encoded):
            visible = self._visible(b, present).mT.unsqueeze(1)
            # Agents last: a softmax along any other axis than the short one of the entities is twenty times as fast.
            scores = torch.bmm(keys, agents.mT).view(batch, self.heads, count, -1)
            weights = scores.masked_fill_(~visible, -1e9).softmax(2).to(values.dtype)
            if self.own is not None:
                weights = weights * visible.any(2, keepdim=True)
            mixed.append(torch.bmm(weights.flatten(1, 2).mT, values))
        return mixed

    def _uniform(self, b: int, agents: torch.Tensor, values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        visible = self._visible(b, present).to(values.dtype)
        return torch.bmm(visible / visible.sum(-1, keepdim=True).clamp(min=1), values).expand(-1, agents.shape[1], -1)

    def _folded_keys(self, entities: torch.Tensor) -> torch.Tensor:
        """(W_q W_kᵀ e_k)/√d per head: [B, K, H] → [B, heads·K, H]."""
        batch, count, width = entities.shape
        keys = ((entities @ self.key) / math.sqrt(width // self.heads)).view(batch * count, self.heads, -1)
        queries = self.query.view(width, self.heads, -1).permute(1, 2, 0)
        folded = torch.bmm(keys.transpose(0, 1), queries)
        return folded.view(self.heads, batch, count, width).transpose(0, 1).flatten(1, 2)

    def _visible(self, b: int, present: torch.Tensor) -> torch.Tensor:
        """[B, 1 or G·S, K]: which entities an agent of block b may attend to."""
        visible = present.unsqueeze(1)
        if self.own is None:
            return visible
        own = functional.one_hot(self.own[b].to(present.device), present.shape[1] + 1)[:, :-1].bool()
        return visible & ~own


def _own_entity(layout: Layout, context: Context) -> list[torch.Tensor]:
    """Per block and slot: the number of the entity that is the agent itself, or its own type; K for an empty slot."""
    own, first = [], 0
    counts = [block.num_agents if context == "agents" else len(block.types) for block in layout.blocks]
    for block, count in zip(layout.blocks, counts, strict=True):
        number = torch.arange(count) if context == "agents" else block.type_of_agent
        padded = torch.cat([number + first, torch.tensor([sum(counts)])])
        own.append(padded[block.agent_of_slot])
        first += count
    return own


def _block_diagonal(values: torch.Tensor) -> torch.Tensor:
    """Values [B, K, heads, d] → [B, heads·K, heads·d] with every head in its own columns.

    One product with all heads' weights then writes [B, N, H] at once, where a product per head would write small
    pieces that must be put together again.
    """
    batch, count, heads, width = values.shape
    spread = values.new_zeros(batch, heads, count, heads, width)
    spread.diagonal(dim1=1, dim2=3).copy_(values.permute(0, 1, 3, 2))
    return spread.view(batch, heads * count, heads * width)
