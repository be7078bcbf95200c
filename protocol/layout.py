"""How agents are laid out for stacked networks: every process that holds parameters uses the same layout.

Types whose observations and actions are alike form a *block*; their agents' networks have one shape and are
stacked. Two forms of an array, per block:

- **joint rows** `[B, N_b, …]`: B joint steps of the block's N_b agents, in the order of the spec. Replay and wire;
  observations are compact there (`protocol.observations`).
- **grid** `[G, S, B, …]`: G parameter groups with S agent slots each. Computation; `[G, S·B, …]` feeds one batched
  matrix product. With `parameter_sharing="agent"` G = N_b, S = 1, and the grid is a view of the joint rows. With
  `"type"` G is the number of types and S the largest count. A group's agents come first, so that the rows which its
  network need not look at are its last; these are inactive, and what they hold is finite and means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from bm3il.protocol.job import Job
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.observations import Form, Observations, forms, integers
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec, ParameterSharing
from bm3il.protocol.trajectories import actions_entry, check_actions, columns_of

_Placing = Callable[[torch.Tensor], torch.Tensor]
IndexName = Literal["agent_of_slot", "slot_of_agent", "type_of_agent"]


@dataclass(frozen=True)
class Block:
    """The agents of one shape.

    types: indices into `spec.types`.   num_agents: N_b.   groups, slots: G, S.   agents: of each group, at most S.
    identity_slots: S if networks tell the agents of their slots apart, else 1.
    agent_of_slot: [G·S] index into the block's agents, -1 where the slot is empty.   slot_of_agent: [N_b].
    type_of_agent: [N_b] index into `types`.   form: how they observe.
    """

    types: tuple[int, ...]
    form: Form
    observation_dim: int
    action_dim: int
    discrete: bool
    num_agents: int
    groups: int
    slots: int
    agents: tuple[int, ...]
    identity_slots: int
    agent_of_slot: torch.Tensor
    slot_of_agent: torch.Tensor
    type_of_agent: torch.Tensor
    _copies: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device, name: IndexName) -> torch.Tensor:
        """One of the index tensors on a device, to which it is copied once."""
        if device.type == "cpu":
            index: torch.Tensor = getattr(self, name)
            return index
        if (name, device) not in self._copies:
            self._copies[name, device] = getattr(self, name).to(device)
        return self._copies[name, device]

    @property
    def is_full(self) -> bool:
        """Whether every slot has an agent, in the order of the joint rows."""
        return self.groups * self.slots == self.num_agents

    def grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Joint rows [B, N_b, …] → grid [G, S, B, …]; a view where every slot has an agent, else zeros in some."""
        if rows.requires_grad and not self.is_full:
            placed: torch.Tensor = _Placed.apply(rows, self.grid, self.rows)
            return placed
        agents = rows.transpose(0, 1)
        if not self.is_full:
            slots = agents.new_zeros(self.groups * self.slots, *agents.shape[1:])
            agents = slots.index_copy_(0, self.on(rows.device, "slot_of_agent"), agents)
        return agents.unflatten(0, (self.groups, self.slots))

    def see(self, observations: Observations) -> ObservationGrid:
        """Observations [B] as networks see them, [G, S·B]."""
        return ObservationGrid(observations, self.groups, self.slots, self.grid)

    def joint(self, values: torch.Tensor) -> torch.Tensor:
        """What networks say, [G, S·B, …] → joint rows [B, N_b, …]."""
        return self.rows(values.unflatten(1, (self.slots, values.shape[1] // self.slots)))

    def rows(self, grid: torch.Tensor) -> torch.Tensor:
        """Grid [G, S, B, …] → joint rows [B, N_b, …]: the inverse of `grid`."""
        slots = grid.flatten(0, 1)
        if self.is_full:
            return slots.transpose(0, 1)
        if grid.requires_grad:
            placed: torch.Tensor = _Placed.apply(grid, self.rows, self.grid)
            return placed
        return slots.index_select(0, self.on(grid.device, "slot_of_agent")).transpose(0, 1)


class _Placed(torch.autograd.Function):
    """`Block.grid` or `Block.rows`, of which each is the other's gradient: autograd would add rows up one by one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: _Placing, back: _Placing) -> torch.Tensor:
        ctx.back = back
        return there(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(gradient), None, None


@dataclass(frozen=True)
class Layout:
    """The blocks of an environment under a parameter sharing."""

    spec: EnvironmentSpec
    parameter_sharing: ParameterSharing
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, spec: EnvironmentSpec, parameter_sharing: ParameterSharing, agent_identity: bool = False) -> Layout:
        """The blocks of `spec`, with the networks that its agents have.

        agent_identity: whether networks that agents share tell them apart.
        """
        blocks = (_block(spec, types, parameter_sharing, agent_identity) for types in spec.blocks)
        return cls(spec, parameter_sharing, tuple(blocks))

    @classmethod
    def of_job(cls, job: Job) -> Layout:
        """That of all networks of a run."""
        return cls.of(job.spec, job.parameter_sharing, job.agent_identity)


@dataclass
class JointRows:
    """B joint steps as the reward server sees them: what was observed and done; one entry per block in each list.

    observations: compact, [B] in front.   active [B, N_b] bool.
    actions [B, N_b], the smallest integers that hold them, or [B, N_b, A_b] float32; integers are widened to int64
    where rows are taken out to be computed with (`widened`).
    """

    observations: list[Observations]
    actions: list[torch.Tensor]
    active: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.active[0])

    @classmethod
    def joined(cls, parts: Sequence[JointRows]) -> JointRows:
        """The rows of all parts, in their order."""
        blocks = range(len(parts[0].observations))
        return cls(
            [Observations.joined([part.observations[b] for part in parts]) for b in blocks],
            [torch.cat([part.actions[b] for part in parts]) for b in blocks],
            [torch.cat([part.active[b] for part in parts]) for b in blocks],
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> JointRows:
        """Every array changed in the same way, along the leading axes."""
        return JointRows(
            [seen.map(change) for seen in self.observations],
            [change(action) for action in self.actions],
            [change(active) for active in self.active],
        )

    def select(self, index: torch.Tensor) -> JointRows:
        """The rows of these numbers, copied where they are."""
        index = index.to(self.active[0].device, non_blocking=True)
        return self.map(lambda tensor: tensor.index_select(0, index))

    def without_masks(self) -> JointRows:
        """Itself without the masks that nobody observes."""
        return JointRows([seen.without_masks() for seen in self.observations], self.actions, self.active)

    def widened(self) -> JointRows:
        """Itself with actions that are indices."""
        return JointRows(self.observations, [widened(action) for action in self.actions], self.active)

    def to(self, device: torch.device) -> JointRows:
        """Itself on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def on_host(self) -> JointRows:
        """Itself in the memory of the process, once it is there."""
        return self.map(lambda tensor: tensor.cpu())

    def tensors(self) -> list[torch.Tensor]:
        """All of them, for `taken`."""
        columns = [tensor for seen in self.observations for tensor in seen.columns.values()]
        return [*columns, *self.actions, *self.active]

    @classmethod
    def taken(cls, layout: Layout, tensors: Iterator[torch.Tensor]) -> JointRows:
        """The inverse of `tensors`, of rows that hold masks: of the next ones."""
        blocks = layout.blocks
        observations = [Observations.taken(block.form, tensors) for block in blocks]
        return cls(observations, *([next(tensors) for _ in blocks] for _ in ("actions", "active")))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for a message, of the dtypes of `array_table`; copied only where actions are widened."""
        named: dict[str, np.ndarray] = {}
        for b, seen in enumerate(self.observations):
            named |= {f"{b}.{name}": tensor.numpy() for name, tensor in seen.without_masks().columns.items()}
            action = self.actions[b].numpy()
            if action.dtype == np.int64:
                action = action.astype(integers(seen.form.action_dim))
            named |= {f"{b}.actions": action, f"{b}.active": self.active[b].numpy()}
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], layout: Layout) -> JointRows:
        """Copy out of a message whose arrays were checked against `array_table`.

        Raises ProtocolError (cause `bad_value`) for actions and codes out of range, and observations that are not
        finite.
        """
        rows = cls(
            [
                Observations(block.form, {name: torch.tensor(array) for name, array in columns_of(arrays, b).items()})
                for b, block in enumerate(layout.blocks)
            ],
            *(
                [torch.tensor(arrays[f"{b}.{name}"]) for b in range(len(layout.blocks))]
                for name in ("actions", "active")
            ),
        )
        for block, seen, actions in zip(layout.blocks, rows.observations, rows.actions, strict=True):
            kind = layout.spec.types[block.types[0]]
            whose = f"type '{kind.name}'" + (" or one like it" if len(block.types) > 1 else "")
            seen.check(whose)
            check_actions(kind, actions, whose)
        return rows

    @staticmethod
    def array_table(layout: Layout, rows: int) -> ArrayTable:
        """Name → (dtype, shape) of `rows` joint rows; without masks, which nobody observes."""
        table: ArrayTable = {}
        for b, block in enumerate(layout.blocks):
            shape = (rows, block.num_agents)
            table |= {f"{b}.{name}": entry for name, entry in block.form.table_of(rows, masks=False).items()}
            table[f"{b}.actions"] = actions_entry(layout.spec.types[block.types[0]], shape)
            table[f"{b}.active"] = ("bool", shape)
        return table


def widened(actions: torch.Tensor) -> torch.Tensor:
    """Integers as indices; real numbers as they are."""
    return actions if actions.is_floating_point() else actions.long()


def _block(
    spec: EnvironmentSpec, types: tuple[int, ...], parameter_sharing: ParameterSharing, agent_identity: bool
) -> Block:
    counts = [spec.types[m].count for m in types]
    num_agents = sum(counts)
    groups, slots = (num_agents, 1) if parameter_sharing == "agent" else (len(types), max(counts))
    agent_of_slot = torch.full((groups, slots), -1)
    if parameter_sharing == "agent":
        agent_of_slot[:, 0] = torch.arange(num_agents)
    else:
        for group, (start, count) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
            agent_of_slot[group, :count] = torch.arange(start, start + count)
    agent_of_slot = agent_of_slot.flatten()
    first = spec.types[types[0]]
    return Block(
        types=types,
        form=forms(spec)[spec.blocks.index(types)],
        observation_dim=first.observation_dim,
        action_dim=first.action_dim,
        discrete=first.discrete,
        num_agents=num_agents,
        groups=groups,
        slots=slots,
        agents=(1,) * num_agents if parameter_sharing == "agent" else tuple(counts),
        identity_slots=slots if agent_identity else 1,
        agent_of_slot=agent_of_slot,
        slot_of_agent=(agent_of_slot >= 0).nonzero().squeeze(1),
        type_of_agent=torch.repeat_interleave(torch.arange(len(types)), torch.tensor(counts)),
    )
