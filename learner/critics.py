"""Q-functions of all agents: own state and action, and an attention over what the others do.

Every algorithm's critic is this one network with another `Context`, the part that sees the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from learner.mean_field import action_vectors, mean_actions
from protocol.layout import Block, JointRows, Layout
from protocol.stacked import TILE_NUMBERS, StackedMLP, uniform

Context = Literal["types", "uniform_types", "agents", "none"]
"""Attention over types' mean fields (BM3IL); their unweighted mean (MTMFIL); attention over every other agent
(MA-DAAC); nothing (MA-GAIL)."""


LEAKY_SLOPE = 0.01
FORBIDDEN_SCORE = -1e9

_softmax_backward = torch.ops.aten._softmax_backward_data


class Critic(nn.Module):
    """Q^i(s^i, ·, ã^i) for every agent and every own action, in one pass.

    e^i = relu(W^i s^i); ã^i as `Attention` says; Q^i = head^i([e^i, ã^i]) with one hidden layer.
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
        ends = [self._ends(block) for block in layout.blocks]
        self.encoders = nn.ModuleList(
            StackedMLP(
                b.groups,
                (width_in, hidden),
                generator,
                activate_output=True,
                identity_slots=b.slots if agent_identity else 1,
            )
            for b, (width_in, _) in zip(layout.blocks, ends, strict=True)
        )
        self.heads = nn.ModuleList(
            StackedMLP(b.groups, (width, hidden, width_out), generator, slope=LEAKY_SLOPE)
            for b, (_, width_out) in zip(layout.blocks, ends, strict=True)
        )
        self.others = (
            None if context == "none" else Attention(layout, context, hidden, heads, attend_own_type, generator)
        )

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows (their actions are those that the others took) → per block Q [G, B, S, A]."""
        observations = [
            block.grid(observation).flatten(1, 2)
            for block, observation in zip(self.layout.blocks, rows.observations, strict=True)
        ]
        encoded = self.encode(observations)
        contexts = self.contexts(encoded, rows)
        return [
            head(*inputs).unflatten(1, (len(rows), block.slots))
            for block, head, *inputs in zip(self.layout.blocks, self.heads, encoded, *contexts, strict=True)
        ]

    @torch.no_grad()
    def attention(self, rows: JointRows) -> torch.Tensor | None:
        """α of every agent slot over the entities, mean over heads, [B, slots, K]; None where nothing is weighed.

        Slots are those of the grids, block after block; entities are types (or agents) block after block.
        """
        if self.others is None or self.context == "uniform_types":
            return None
        grids = [block.grid(x).flatten(1, 2) for block, x in zip(self.layout.blocks, rows.observations, strict=True)]
        return self.others.weights(self.encode(grids), rows)

    def _ends(self, block: Block) -> tuple[int, int]:
        """Widths of what the encoders see and of what the heads say."""
        return block.observation_dim, block.action_dim

    def encode(self, observations: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """e^i per block [G, B·S, H], from the observations as grids [G, B·S, O]."""
        return [encoder(x) for encoder, x in zip(self.encoders, observations, strict=True)]

    def contexts(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[list[torch.Tensor]]:
        """What the heads see beside e^i: one list with ã^i per block [G, B·S, H], or none without a context."""
        return [] if self.others is None else [self.others(encoded, rows)]


class ValueCritic(Critic):
    """V^i(s^i, ã^i) of every agent: the same network with one output, for a policy's baseline.

    The own action is not an input, so actions of either kind will do.
    """

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows → per block V [G, B, S]."""
        return [value.squeeze(-1) for value in super().forward(rows)]

    def _ends(self, block: Block) -> tuple[int, int]:
        return block.observation_dim, 1


@dataclass(frozen=True)
class Scene:
    """What there is to look at in B joint rows: keys W_k e_k/√d (None if all weigh the same) and values V e_k
    [B, K, H] of K entities, and whether each is present [B, K]."""

    keys: torch.Tensor | None
    values: torch.Tensor
    present: torch.Tensor


class Attention(nn.Module):
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
        self.visible = _others(layout, context) if context == "agents" or not attend_own else None

    def forward(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[torch.Tensor]:
        """encoded: per block e^i [G, B·S, H] → per block ã^i [G, B·S, H]."""
        shapes = [(block.groups, block.slots) for block in self.layout.blocks]
        parts = [e.unflatten(1, (len(rows), -1)).movedim(1, 0).flatten(1, 2) for e in encoded]
        agents = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        mixed = self.mix(agents, self.scene(rows))
        return [
            part.unflatten(1, shape).movedim(0, 1).flatten(1, 2)
            for part, shape in zip(mixed.split([g * s for g, s in shapes], dim=1), shapes, strict=True)
        ]

    def scene(self, rows: JointRows) -> Scene:
        """What the others do in these rows."""
        entities, present = self._entities(rows)
        if self.context == "uniform_types":
            return Scene(None, entities @ self.value, present)
        keys = (entities @ self.key) / math.sqrt(self.key.shape[-1] // self.heads)
        return Scene(keys, entities @ self.value, present)

    def mix(self, agents: torch.Tensor, scene: Scene, slots: slice = slice(None)) -> torch.Tensor:
        """ã^i [B, n, H] of the agents e^i [B, n, H] in these n slots, which are numbered block after block."""
        visible = scene.present.unsqueeze(1)
        if self.visible is not None:
            visible = visible & self.visible[slots].to(visible.device)
        if scene.keys is None:
            weights = visible / visible.sum(-1, keepdim=True).clamp(min=1)
            return torch.bmm(weights.to(scene.values.dtype), scene.values).expand(-1, agents.shape[1], -1)
        return _Mixture.apply(agents, scene.keys, scene.values, self.query, visible, self.heads)

    def weights(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> torch.Tensor:
        """The attention as it reads in Eq. 11, for people to look at: [B, slots, K], mean over heads."""
        agents = torch.cat([e.unflatten(1, (len(rows), -1)).movedim(1, 0).flatten(1, 2) for e in encoded], dim=1)
        entities, present = self._entities(rows)
        visible = present.unsqueeze(1)
        if self.visible is not None:
            visible = visible & self.visible.to(present.device)
        queries = (agents @ self.query).unflatten(2, (self.heads, -1)).transpose(1, 2)
        keys = (entities @ self.key).unflatten(2, (self.heads, -1)).transpose(1, 2)
        scores = queries @ keys.mT / math.sqrt(keys.shape[-1])
        return (scores.masked_fill(~visible.unsqueeze(1), FORBIDDEN_SCORE).softmax(-1) * visible.unsqueeze(1)).mean(1)

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


class _Mixture(torch.autograd.Function):
    """The attention of all agents, some rows after others, so that what lies between its products stays cached.

    agents e^i [B, N, H], keys W_k e_k/√d and values V e_k [B, K, H], query W_q [H, H], visible [B, 1 or N, K] bool
    → ã [B, N, H]; 0 for an agent that sees nobody.
    """

    @staticmethod
    def forward(
        ctx: Any,
        agents: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        visible: torch.Tensor,
        heads: int,
    ) -> torch.Tensor:
        batch, count, width = agents.shape
        mixture = agents.new_empty(batch, count, width)
        weights = agents.new_empty(batch, heads, keys.shape[1], count)
        seen = visible.mT.unsqueeze(1).to(query.dtype)
        hidden = (1 - seen) * FORBIDDEN_SCORE
        for rows in _row_tiles(agents):
            # Agents last: a softmax along any other axis than the short one of the entities is twenty times as fast.
            scores = (
                torch.bmm(_folded(keys[rows], query, heads), agents[rows].mT).view_as(weights[rows]).to(query.dtype)
            )
            weights[rows] = scores.add_(hidden[rows]).softmax(2).mul_(seen[rows])
            torch.bmm(weights[rows].flatten(1, 2).mT, _block_diagonal(values[rows], heads), out=mixture[rows])
        ctx.save_for_backward(agents, keys, values, query, weights)
        return mixture

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        agents, keys, values, query, weights = ctx.saved_tensors
        heads = weights.shape[1]
        d_agents = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        d_keys, d_values, d_query = torch.empty_like(keys), torch.empty_like(values), torch.zeros_like(query)
        for rows in _row_tiles(agents):
            d, w = gradient[rows], weights[rows]
            d_weights = torch.bmm(_block_diagonal(values[rows], heads), d.mT).view_as(w)
            d_values[rows] = _diagonal(torch.bmm(w.flatten(1, 2), d), heads)
            d_scores = _softmax_backward(d_weights, w, 2, w.dtype).flatten(1, 2)
            torch.bmm(d_scores.mT, _folded(keys[rows], query, heads), out=d_agents[rows])
            d_folded = _by_head(torch.bmm(d_scores, agents[rows]), heads)
            d_keys[rows] = (
                torch.bmm(d_folded, _per_head(query.to(keys.dtype), heads)).transpose(0, 1).reshape(keys[rows].shape)
            )
            d_query += torch.bmm(d_folded.mT, _per_head(keys[rows].flatten(0, 1), heads)).transpose(0, 1).flatten(1)
        return d_agents, d_keys, d_values, d_query, None, None


def _row_tiles(agents: torch.Tensor) -> Iterator[slice]:
    batch, count, width = agents.shape
    height = max(1, TILE_NUMBERS // (count * width)) if agents.device.type == "cpu" else batch
    for first in range(0, batch, height):
        yield slice(first, first + height)


def _per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, H] → [heads, R, d]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, heads·K, H] → [heads, B·K, H]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def _folded(keys: torch.Tensor, query: torch.Tensor, heads: int) -> torch.Tensor:
    """W_q k per head: keys [B, K, H], query [H, H] → [B, heads·K, H]."""
    folded = torch.bmm(_per_head(keys.flatten(0, 1), heads), _per_head(query.to(keys.dtype), heads).mT)
    return folded.unflatten(1, keys.shape[:2]).transpose(0, 1).flatten(1, 2)


def _block_diagonal(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Values [B, K, heads·d] → [B, heads·K, heads·d] with every head in its own rows and columns.

    One product with all heads' weights then writes [B, N, H] at once, where a product per head would write small
    pieces that must be put together again.
    """
    batch, count, width = values.shape
    spread = values.new_zeros(batch, heads, count, heads, width // heads)
    spread.diagonal(dim1=1, dim2=3).copy_(values.unflatten(2, (heads, -1)).movedim(2, 3))
    return spread.view(batch, heads * count, width)


def _diagonal(spread: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_block_diagonal`, which forgets what is not on the diagonal."""
    batch, rows, width = spread.shape
    blocks = spread.view(batch, heads, rows // heads, heads, width // heads)
    return blocks.diagonal(dim1=1, dim2=3).movedim(3, 2).flatten(2)


def _others(layout: Layout, context: Context) -> torch.Tensor:
    """[N slots, K] bool: whether the entity is another one than the agent itself, or than its own type."""
    counts = [block.num_agents if context == "agents" else len(block.types) for block in layout.blocks]
    visible, first = [], 0
    for block, count in zip(layout.blocks, counts, strict=True):
        number = torch.arange(count) if context == "agents" else block.type_of_agent
        own = torch.cat([first + number, torch.tensor([-1])])[block.agent_of_slot]
        visible.append(own.unsqueeze(1) != torch.arange(sum(counts)))
        first += count
    return torch.cat(visible)
