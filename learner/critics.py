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
from protocol.stacked import StackedMLP, uniform

Context = Literal["types", "uniform_types", "agents", "none"]
"""Attention over types' mean fields (BM3IL); their unweighted mean (MTMFIL); attention over every other agent
(MA-DAAC); nothing (MA-GAIL)."""


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
                b.groups, (b.observation_dim, hidden), generator, identity_slots=b.slots if agent_identity else 1
            )
            for b in layout.blocks
        )
        self.heads = nn.ModuleList(
            StackedMLP(b.groups, (width, hidden, b.action_dim), generator, functional.leaky_relu) for b in layout.blocks
        )
        self.others = (
            None if context == "none" else _Attention(layout, context, hidden, heads, attend_own_type, generator)
        )

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows (their actions are those that the others took) → per block Q [G, B, S, A]."""
        batch = len(rows)
        encoded = [
            torch.relu(encoder(block.grid(observation).flatten(1, 2)))
            for block, encoder, observation in zip(self.layout.blocks, self.encoders, rows.observations, strict=True)
        ]
        if self.others is not None:
            encoded = [
                torch.cat([own, other], dim=-1) for own, other in zip(encoded, self.others(encoded, rows), strict=True)
            ]
        return [
            head(x).unflatten(1, (batch, block.slots))
            for block, head, x in zip(self.layout.blocks, self.heads, encoded, strict=True)
        ]


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
            )
            for b in layout.blocks
        )
        self.query, self.key, self.value = (uniform((hidden, hidden), hidden, generator) for _ in range(3))
        own = _own_entity(layout, context)
        hides_own = context == "agents" or not attend_own
        self.own: list[torch.Tensor] | None = own if hides_own else None

    def forward(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[torch.Tensor]:
        """encoded: per block e^i [G, B·S, H] → per block ã^i [G, B·S, H]."""
        entities, present = self._entities(rows)
        batch, count, _ = entities.shape
        values = (entities @ self.value).view(batch, count, self.heads, -1)
        folded = None if self.context == "uniform_types" else self._folded_keys(entities)
        mixed = []
        for b, own_rows in enumerate(encoded):
            agents = own_rows.unflatten(1, (batch, -1)).movedim(1, 0).flatten(1, 2)
            visible = self._visible(b, present)
            if folded is None:
                weights = visible.to(values.dtype).expand(batch, agents.shape[1], count).unsqueeze(-1)
                weights = (weights / weights.sum(2, keepdim=True).clamp(min=1)).expand(-1, -1, -1, self.heads)
            else:
                scores = torch.bmm(agents, folded).view(batch, agents.shape[1], count, self.heads)
                weights = scores.masked_fill(~visible.unsqueeze(-1), -1e9).softmax(2)
                weights = weights * visible.any(-1).unsqueeze(-1).unsqueeze(-1)
            mixture = torch.bmm(weights.flatten(2), _block_diagonal(values))
            groups = own_rows.shape[0]
            mixed.append(mixture.unflatten(1, (groups, -1)).movedim(1, 0).flatten(1, 2))
        return mixed

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
            entities.append(torch.relu(embedded))
            present.append(here)
        return torch.cat(entities, dim=1), torch.cat(present, dim=1)

    def _folded_keys(self, entities: torch.Tensor) -> torch.Tensor:
        """(W_q W_kᵀ e_k)/√d per head: [B, K, H] → [B, H, K·heads]."""
        batch, count, width = entities.shape
        head_width = width // self.heads
        keys = (entities @ self.key).view(batch * count, self.heads, head_width).transpose(0, 1)
        queries = self.query.view(width, self.heads, head_width).permute(1, 2, 0)
        folded = torch.bmm(keys, queries) / math.sqrt(head_width)
        return folded.view(self.heads, batch, count, width).permute(1, 3, 2, 0).flatten(2)

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
    """Values [B, K, heads, d] → [B, K·heads, heads·d] with every head in its own columns.

    One product with all heads' weights then writes [B, N, H] at once, where a product per head would write small
    pieces that must be put together again.
    """
    batch, count, heads, width = values.shape
    spread = values.unsqueeze(3) * torch.eye(heads, dtype=values.dtype, device=values.device).view(
        1, 1, heads, heads, 1
    )
    return spread.reshape(batch, count * heads, heads * width)
