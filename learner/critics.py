"""Q-functions of all agents: own state and action, and an attention over what the others do.

Every algorithm's critic is this one network with another `Context`, the part that sees the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from bm3il.learner.few_actions import FEW_ACTIONS, FewActions
from bm3il.learner.mean_field import MeanField, action_vectors, mean_actions, total_actions
from bm3il.learner.mixture import Projected, Scene
from bm3il.protocol.layout import Block, JointRows, Layout
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.stacked import StackedMLP, uniform

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
                agents=b.agents,
            )
            for b, (width_in, _) in zip(layout.blocks, ends, strict=True)
        )
        self.heads = nn.ModuleList(
            StackedMLP(b.groups, (width, hidden, width_out), generator, slope=LEAKY_SLOPE, agents=b.agents)
            for b, (_, width_out) in zip(layout.blocks, ends, strict=True)
        )
        self.others: Attention | None = None
        if context != "none":
            self.others = Attention(layout, context, hidden, heads, attend_own_type, generator, mean_field)

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows (their actions are those that the others took) → per block Q [G, S, B, A]."""
        observations = [
            block.see(observation) for block, observation in zip(self.layout.blocks, rows.observations, strict=True)
        ]
        encoded = self.encode(observations)
        contexts = self.contexts(encoded, rows)
        return [
            head(*inputs).unflatten(1, (block.slots, len(rows)))
            for block, head, *inputs in zip(self.layout.blocks, self.heads, encoded, *contexts, strict=True)
        ]

    @torch.no_grad()
    def attention(self, rows: JointRows) -> torch.Tensor | None:
        """α of every agent over the entities, mean over heads, [B, N, K]; None where nothing is weighed.

        Agents, and entities (types or agents), are in the order of joint rows, block after block.
        """
        if self.others is None:
            return None
        grids = [block.see(x) for block, x in zip(self.layout.blocks, rows.observations, strict=True)]
        return self.others.weights(self.encode(grids), rows)

    def _ends(self, block: Block) -> tuple[int, int]:
        """Widths of what the encoders see and of what the heads say."""
        return block.observation_dim, block.action_dim

    def encode(self, observations: Sequence[ObservationGrid]) -> list[torch.Tensor]:
        """e^i per block [G, S·B, H], from what agents see."""
        return [encoder(x) for encoder, x in zip(self.encoders, observations, strict=True)]

    def contexts(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[list[torch.Tensor]]:
        """What the heads see beside e^i: one list with ã^i per block [G, S·B, H], or none without a context."""
        return [] if self.others is None else [self.others(encoded, rows)]


class ValueCritic(Critic):
    """V^i(s^i, ã^i) of every agent: the same network with one output, for a policy's baseline.

    The own action is not an input, so actions of either kind will do; but with mean_field "all" it comes in through the
    own type's mean, and the baseline is biased.
    """

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows → per block V [G, S, B]."""
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
            StackedMLP(
                b.groups, (b.observation_dim + b.action_dim, hidden), generator, activate_output=True, agents=b.agents
            )
            if context == "agents"
            else StackedMLP(len(b.types), (b.action_dim, hidden), generator)
            for b in layout.blocks
        )
        self.query, self.key, self.value = (uniform((hidden, hidden), hidden, generator) for _ in range(3))
        # Among agents none attends to itself: e_j holds a^j, and Eq. 13's baseline must not depend on the own action.
        self._hides_own = context == "agents" or not attend_own
        self._leaves_out_own = not self._hides_own and mean_field == "others"
        self._most_actions = max(b.action_dim for b in layout.blocks)
        types = sum(len(b.types) for b in layout.blocks)
        self._few_actions = (
            context in ("types", "uniform_types")
            and all(b.discrete for b in layout.blocks)
            and types * self._most_actions <= FEW_ACTIONS
        )
        self.own: torch.Tensor
        # Follows from the layout: it moves with the critic, and no checkpoint needs it.
        self.register_buffer("own", _own(layout, context), persistent=False)

    def forward(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> list[torch.Tensor]:
        """encoded: per block e^i [G, S·B, H] → per block ã^i [G, S·B, H]."""
        if self._few_actions:
            return [self.mix(b, *seen) for b, seen in enumerate(zip(encoded, self.scenes(rows), strict=True))]
        scene = self._scene(rows)  # of all blocks together, since agents are what its sums go across
        agents = _side_by_side([block.joint(e) for block, e in zip(self.layout.blocks, encoded, strict=True)])
        mixed = scene.mix(agents if scene.keys is None else agents @ self.query, self.heads).split(self._sizes, dim=1)
        return [block.grid(part).flatten(1, 2) for block, part in zip(self.layout.blocks, mixed, strict=True)]

    def mix(self, b: int, encoded: torch.Tensor, scene: Scene | FewActions) -> torch.Tensor:
        """ã^i [G, S·B, H] of the agents e^i of one block, who see this scene."""
        queries = encoded if scene.keys is None else encoded @ self.query
        if isinstance(scene, FewActions):
            return scene.mix(queries.flatten(0, 1), self.heads).view_as(queries)
        block = self.layout.blocks[b]
        return block.grid(scene.mix(block.joint(queries), self.heads)).flatten(1, 2)

    def weights(self, encoded: Sequence[torch.Tensor], rows: JointRows) -> torch.Tensor | None:
        """α [B, N, K], mean over heads, for people to look at; None if all weigh the same."""
        found = []
        for block, agents, scene in zip(self.layout.blocks, encoded, self.scenes(rows), strict=True):
            if scene.keys is None:
                return None
            if isinstance(scene, FewActions):
                weights = scene.weights((agents @ self.query).flatten(0, 1), self.heads)
                found.append(block.joint(weights.unflatten(0, agents.shape[:2])))
            else:
                found.append(scene.weights(block.joint(agents @ self.query), self.heads))
        return _side_by_side(found)

    def scenes(self, rows: JointRows) -> Sequence[Scene | FewActions]:
        """What the agents of each block see the others do in these rows."""
        if self._few_actions:
            return self._of_few_actions(rows)
        scene, ends = self._scene(rows), list(accumulate(self._sizes))
        return [scene.of(slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def _sizes(self) -> list[int]:
        """Agents of each block."""
        return [block.num_agents for block in self.layout.blocks]

    @property
    def _scaled_key(self) -> torch.Tensor:
        """W_k/√d."""
        # The H² numbers of W_k are divided once, and not the scores of every agent and entity.
        return self.key / math.sqrt(self.key.shape[-1] // self.heads)

    def _scene(self, rows: JointRows) -> Scene:
        """What all agents see, block after block."""
        if self.context == "agents":
            entities, present = self._agents(rows)
            keys, values = Projected(entities @ self._scaled_key), Projected(entities @ self.value)
            return Scene(keys, values, present.unsqueeze(2) & ~self.own)
        means, counts = zip(*map(mean_actions, self.layout.blocks, rows.actions, rows.active), strict=True)
        of_types = None if self.context == "uniform_types" else self._types(means, rows, self._scaled_key)
        values = self._types(means, rows, self.value)
        number = torch.cat(counts, dim=1).unsqueeze(2)
        if not self._leaves_out_own:
            return Scene(of_types, values, (number > 0) & ~self.own if self._hides_own else number > 0)
        taken = _side_by_side(rows.active).unsqueeze(1) & self.own  # an inactive agent is in no mean
        left = number - taken.to(number.dtype)
        return Scene(of_types, values, left > 0, taken / left.clamp(min=1), self._own_actions(rows))

    def _of_few_actions(self, rows: JointRows) -> list[FewActions]:
        """What the agents of each block see of the types' mean actions."""
        keys = None if self.context == "uniform_types" else self._tables(self._scaled_key)
        values = self._tables(self.value)
        found = map(total_actions, self.layout.blocks, rows.actions, rows.active)
        totals, counts = zip(*found, strict=True)
        # Types of different blocks may have different numbers of actions; nobody takes those that are added.
        padded = [functional.pad(total, (0, self._most_actions - total.shape[2])) for total in totals]
        of_types = torch.cat(padded, dim=1).permute(1, 2, 0)[:, :, None, None]
        number = torch.cat(counts, dim=1).mT[:, None, None]
        action = torch.arange(self._most_actions, device=number.device).view(-1, 1, 1, 1)
        scenes, owns = [], self.own.split(self._sizes, dim=1)
        for block, actions, active, own in zip(self.layout.blocks, rows.actions, rows.active, owns, strict=True):
            own = block.grid(own).movedim(2, 0).unsqueeze(3)
            left, shares = number.expand(-1, block.groups, block.slots, -1), of_types
            if self._leaves_out_own:
                taken = block.grid(active) & own  # an inactive agent is in no mean
                left = left - taken.to(left.dtype)
                shares = of_types - (taken.unsqueeze(1) & (block.grid(actions) == action)).to(of_types.dtype)
            visible = (left > 0) & ~own if self._hides_own else left > 0
            # A type without others has shares of 0, not NaN; `visible` hides it.
            shares = shares / left.clamp(min=1).unsqueeze(1)
            scenes.append(FewActions(keys, values, shares.flatten(2), visible.flatten(1)))
        return scenes

    def _tables(self, projection: torch.Tensor) -> torch.Tensor:
        """The keys or values of every type's every action, [K, A, H]; zeros beyond those that a type has."""
        tables = []
        for embed in self.embeddings:
            weight, bias = embed.parameters()
            with torch.autocast(projection.device.type, enabled=False):  # gradients of many rows meet here
                # W a + b of a one-hot a is a row of W, plus b; and shares that add up to 1 give the mean's b once.
                table = (weight + bias) @ projection
            tables.append(functional.pad(table, (0, 0, 0, self._most_actions - table.shape[1])))
        return torch.cat(tables)

    def _agents(self, rows: JointRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, N, H] of all agents, and which are active [B, N]."""
        embedded = []
        for b, (block, embed) in enumerate(zip(self.layout.blocks, self.embeddings, strict=True)):
            actions = action_vectors(block, rows.actions[b])
            output = embed(block.see(rows.observations[b]), block.grid(actions).flatten(1, 2))
            embedded.append(block.rows(output.unflatten(1, (block.slots, len(rows)))))
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
        """Which of the projected actions of `_types` each agent took, [B, N]."""
        numbers, before = [], 0
        for block, actions in zip(self.layout.blocks, rows.actions, strict=True):
            if block.discrete:
                number = block.on(actions.device, "type_of_agent") * block.action_dim + actions
                count = len(block.types) * block.action_dim
            else:
                count = len(actions) * block.num_agents
                number = torch.arange(count, device=actions.device).unflatten(0, (-1, block.num_agents))
            numbers.append(number + before)
            before += count
        return _side_by_side(numbers)


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, n_b, …] of all blocks → [B, Σ n_b, …]; one part is not copied."""
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]


def _own(layout: Layout, context: Context) -> torch.Tensor:
    """[K, N] bool: whether the entity is the agent itself, or its own type."""
    counts = [block.num_agents if context == "agents" else len(block.types) for block in layout.blocks]
    own, first = [], 0
    for block, count in zip(layout.blocks, counts, strict=True):
        own.append(first + (torch.arange(count) if context == "agents" else block.type_of_agent))
        first += count
    return torch.cat(own) == torch.arange(sum(counts)).unsqueeze(1)
