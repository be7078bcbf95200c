"""Q-functions of all agents: own state and action, and an attention over what the others do.

Every algorithm's critic is this one network with another `Context`, the part that sees the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from learner.mean_field import MeanField, action_vectors, mean_actions
from learner.mixture import Projected, Scene, attention, mixture
from protocol.layout import Block, JointRows, Layout
from protocol.networks.grid import ObservationGrid
from protocol.networks.stacked import StackedMLP, uniform

Context = Literal["types", "uniform_types", "agents", "none"]
"""Attention over types' mean fields (BM3IL); their unweighted mean (MTMFIL); attention over every other agent
(MA-DAAC); nothing (MA-GAIL)."""


LEAKY_SLOPE = 0.01


class Critic(nn.Module):
    """Q^i(s^i, ·, ã^i) for every agent and every own action, in one pass.

    e^i = relu(W^i s^i); ã^i as `Attention` says; Q^i = head^i([e^i, ã^i]) with one hidden layer.
    attend_own_type: whether an agent sees its own type.   mean_field: whose mean action that is then.
    """

    def __init__(
        self,
        layout: Layout,
        context: Context,
        hidden: int,
        heads: int,
        attend_own_type: bool,
        generator: torch.Generator,
        mean_field: MeanField = "others",
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
                identity_slots=b.identity_slots,
            )
            for b, (width_in, _) in zip(layout.blocks, ends, strict=True)
        )
        self.heads = nn.ModuleList(
            StackedMLP(b.groups, (width, hidden, width_out), generator, slope=LEAKY_SLOPE)
            for b, (_, width_out) in zip(layout.blocks, ends, strict=True)
        )
        self.others: Attention | None = None
        if context != "none":
            self.others = Attention(layout, context, hidden, heads, attend_own_type, generator, mean_field)

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows (their actions are those that the others took) → per block Q [G, B, S, A]."""
        observations = [
            block.see(observation) for block, observation in zip(self.layout.blocks, rows.observations, strict=True)
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
        if self.others is None:
            return None
        grids = [block.see(x) for block, x in zip(self.layout.blocks, rows.observations, strict=True)]
        return self.others.weights(self.encode(grids), rows)

    def _ends(self, block: Block) -> tuple[int, int]:
        """Widths of what the encoders see and of what the heads say."""
        return block.observation_dim, block.action_dim

    def encode(self, observations: Sequence[ObservationGrid]) -> list[torch.Tensor]:
        """e^i per block [G, B·S, H], from what agents see."""
        return [encoder(x) for encoder, x in zip(self.encoders, observations, strict=True)]

    def contexts(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[list[torch.Tensor]]:
        """What the heads see beside e^i: one list with ã^i per block [G, B·S, H], or none without a context."""
        return [] if self.others is None else [self.others(encoded, rows)]


class ValueCritic(Critic):
    """V^i(s^i, ã^i) of every agent: the same network with one output, for a policy's baseline.

    The own action is not an input, so actions of either kind will do; but with mean_field "all" it comes in through the
    own type's mean, and the baseline is biased.
    """

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows → per block V [G, B, S]."""
        return [value.squeeze(-1) for value in super().forward(rows)]

    def _ends(self, block: Block) -> tuple[int, int]:
        return block.observation_dim, 1


class Attention(nn.Module):
    """ã^i = Σ_k α_k V e_k, α = softmax_k((W_k e_k)·(W_q e^i)/√d): §3.2.3, Eq. 11.

    The entities k are the M types, e_m = E_m ā_m + b_m, or the N agents, e_j = relu(E^j [s^j, a^j]).
    W_q, W_k, V [H, H] are shared by all agents; the columns of each are divided among `heads` heads of width d.
    Of its own type an agent sees the mean of the others' actions, ā_m^{−i} = ā_m + (ā_m − a^i)/(X_m − 1), with X_m
    active agents of the type; so nothing that it sees depends on its own action. As e_m is linear, keys and values of
    ā_m^{−i} are those of ā_m and a^i added up in the same proportions, and the cost remains O(N·M).
    """

    def __init__(
        self,
        layout: Layout,
        context: Context,
        hidden: int,
        heads: int,
        attend_own: bool,
        generator: torch.Generator,
        mean_field: MeanField = "others",
    ) -> None:
        super().__init__()
        self.layout, self.context, self.heads = layout, context, heads
        self.embeddings = nn.ModuleList(
            StackedMLP(b.groups, (b.observation_dim + b.action_dim, hidden), generator, activate_output=True)
            if context == "agents"
            else StackedMLP(len(b.types), (b.action_dim, hidden), generator)
            for b in layout.blocks
        )
        self.query, self.key, self.value = (uniform((hidden, hidden), hidden, generator) for _ in range(3))
        self._hides_own = context == "agents" or not attend_own
        self._leaves_out_own = not self._hides_own and mean_field == "others"
        self.own: torch.Tensor
        self.register_buffer("own", _own(layout, context), persistent=False)

    def forward(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[torch.Tensor]:
        """encoded: per block e^i [G, B·S, H] → per block ã^i [G, B·S, H]."""
        shapes = [(block.groups, block.slots) for block in self.layout.blocks]
        mixed = self.mix(_joined(encoded, len(rows)), self.scene(rows))
        return [
            part.unflatten(1, shape).movedim(0, 1).flatten(1, 2)
            for part, shape in zip(mixed.split([g * s for g, s in shapes], dim=1), shapes, strict=True)
        ]

    def mix(self, agents: torch.Tensor, scene: Scene) -> torch.Tensor:
        """ã^i [B, n, H] of the agents e^i [B, n, H] that see this scene."""
        return mixture(agents if scene.keys is None else agents @ self.query, scene, self.heads)

    def weights(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> torch.Tensor | None:
        """α [B, slots, K], mean over heads, for people to look at; None if all weigh the same."""
        scene = self.scene(rows)
        if scene.keys is None:
            return None
        return attention(_joined(encoded, len(rows)) @ self.query, scene.keys, scene, self.heads)

    def scene(self, rows: JointRows) -> Scene:
        """What the others do in these rows, for all slots, block after block."""
        key = self.key / math.sqrt(self.key.shape[-1] // self.heads)
        if self.context == "agents":
            entities, present = self._agents(rows)
            return Scene(Projected(entities @ key), Projected(entities @ self.value), present.unsqueeze(2) & ~self.own)
        means, counts = zip(*map(mean_actions, self.layout.blocks, rows.actions, rows.active), strict=True)
        number = torch.cat(counts, dim=1).unsqueeze(2)
        keys = None if self.context == "uniform_types" else self._types(means, rows, key)
        values = self._types(means, rows, self.value)
        if not self._leaves_out_own:
            return Scene(keys, values, (number > 0) & ~self.own if self._hides_own else number > 0)
        active = _side_by_side([_slots(*pair) for pair in zip(self.layout.blocks, rows.active, strict=True)])
        taken = active.unsqueeze(1) & self.own  # an inactive agent is in no mean
        left = number - taken.to(number.dtype)
        return Scene(keys, values, left > 0, taken / left.clamp(min=1), self._own_actions(rows))

    def _agents(self, rows: JointRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, N, H] of all agents, and which are active [B, N]."""
        embedded = []
        for b, (block, embed) in enumerate(zip(self.layout.blocks, self.embeddings, strict=True)):
            actions = action_vectors(block, rows.actions[b])
            output = embed(block.see(rows.observations[b]), block.grid(actions).flatten(1, 2))
            embedded.append(block.rows(output.unflatten(1, (len(rows), block.slots))))
        return torch.cat(embedded, dim=1), torch.cat(rows.active, dim=1)

    def _types(self, means: Sequence[torch.Tensor], rows: JointRows, projection: torch.Tensor) -> Projected:
        """The keys or values of all types, and of own actions where those are to leave the means: of a block of
        discrete ones, of every type's every action; else of those that were taken, row after row."""
        types, own = [], []
        for b, (block, embed) in enumerate(zip(self.layout.blocks, self.embeddings, strict=True)):
            with torch.autocast(projection.device.type, enabled=False):  # gradients of many rows meet in these two
                weight, bias = (parameter @ projection for parameter in embed.parameters())
            types.append((means[b].transpose(0, 1) @ weight + bias).transpose(0, 1))
            if self._leaves_out_own and block.discrete:
                own.append((weight + bias).flatten(0, 1))
            elif self._leaves_out_own:
                kind = block.on(weight.device, "type_of_agent")
                taken = rows.actions[b].transpose(0, 1) @ weight[kind] + bias[kind]
                own.append(taken.transpose(0, 1).flatten(0, 1))
        return Projected(_side_by_side(types), torch.cat(own) if own else None)

    def _own_actions(self, rows: JointRows) -> torch.Tensor:
        """Which of the projected actions of `_types` each slot took, [B, slots]."""
        numbers, before = [], 0
        for block, actions in zip(self.layout.blocks, rows.actions, strict=True):
            if block.discrete:
                number = block.on(actions.device, "type_of_agent") * block.action_dim + actions
                count = len(block.types) * block.action_dim
            else:
                count = len(actions) * block.num_agents
                number = torch.arange(count, device=actions.device).unflatten(0, (-1, block.num_agents))
            numbers.append(_slots(block, number + before))
            before += count
        return _side_by_side(numbers)


def _slots(block: Block, rows: torch.Tensor) -> torch.Tensor:
    """Joint rows [B, N_b, …] → [B, G·S, …], slot after slot."""
    return block.grid(rows).movedim(0, 1).flatten(1, 2)


def _joined(grids: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
    """Grids [G, B·S, H] → [B, slots, H], block after block."""
    return _side_by_side([grid.unflatten(1, (batch, -1)).movedim(1, 0).flatten(1, 2) for grid in grids])


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, n_b, …] of all blocks → [B, Σ n_b, …]; one part is not copied."""
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]


def _own(layout: Layout, context: Context) -> torch.Tensor:
    """[K, slots] bool: whether the entity is the agent itself, or its own type."""
    counts = [block.num_agents if context == "agents" else len(block.types) for block in layout.blocks]
    own, first = [], 0
    for block, count in zip(layout.blocks, counts, strict=True):
        number = torch.arange(count) if context == "agents" else block.type_of_agent
        own.append(torch.cat([first + number, torch.tensor([-1])])[block.agent_of_slot])
        first += count
    return torch.cat(own) == torch.arange(sum(counts)).unsqueeze(1)
