"""The newest joint rows of all actors, in the form in which the critics eat them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protocol.device import check_room, moved
from protocol.errors import InputError
from protocol.layout import JointRows, Layout
from protocol.trajectories import Trajectories


@dataclass
class Batch:
    """B transitions; one tensor per block in each list, joint rows [B, N_b, …] (see `protocol.layout`).

    `action_masks` belong to `observations`, `next_action_masks` to `next_observations`. `rewards` are true rewards,
    which only runs with `source="environment"` look at. `terminated` [B] means that nothing follows; a truncated
    row is an ordinary one whose next observation is bootstrapped from.
    """

    rows: JointRows
    action_masks: list[torch.Tensor]
    next_observations: list[torch.Tensor]
    next_action_masks: list[torch.Tensor]
    next_active: list[torch.Tensor]
    rewards: list[torch.Tensor]
    terminated: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All of them, for `of`."""
        rows = (self.rows.observations, self.rows.actions, self.rows.active)
        following = (self.next_observations, self.next_action_masks, self.next_active)
        parts = (*rows, self.action_masks, *following, self.rewards, [self.terminated])
        return [tensor for part in parts for tensor in part]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], blocks: int) -> tuple[Batch, Sequence[torch.Tensor]]:
        """The inverse of `tensors`, and what comes behind."""
        observations, actions, active, masks, following, next_masks, next_active, rewards = (
            list(tensors[first : first + blocks]) for first in range(0, 8 * blocks, blocks)
        )
        rows = JointRows(observations, actions, active)
        batch = cls(rows, masks, following, next_masks, next_active, rewards, tensors[8 * blocks])
        return batch, tensors[8 * blocks + 1 :]

    def to(self, device: torch.device) -> Batch:
        """Itself on another device."""

        return Batch(
            rows=self.rows.to(device),
            action_masks=moved(self.action_masks, device),
            next_observations=moved(self.next_observations, device),
            next_action_masks=moved(self.next_action_masks, device),
            next_active=moved(self.next_active, device),
            rewards=moved(self.rewards, device),
            terminated=self.terminated.to(device, non_blocking=True),
        )


class Replay:
    """A ring of joint rows. An episode of n steps takes n + 1 rows: a row's successor is the next row of the ring."""

    def __init__(self, layout: Layout, window_steps: int) -> None:
        length = layout.spec.episode_length
        self.layout = layout
        self.capacity = max(1, math.ceil(window_steps / length)) * (length + 1)
        self._cursor = 0
        one = Trajectories.zeros(layout.spec, 1).arrays
        fields = ("observations", "action_masks", "active", "actions", "rewards")
        table = {
            name: (str(array.dtype), (self.capacity, *array.shape[2:]))
            for name, array in one.items()
            if name.partition(".")[2] in fields
        }
        check_room(table, torch.device("cpu"), "learner.window-steps", window_steps)
        self._columns = {
            field: [
                torch.from_numpy(np.zeros((self.capacity, *array.shape[2:]), array.dtype))
                for array in (one[f"{b}.{field}"] for b in range(len(layout.blocks)))
            ]
            for field in fields
        }
        self._terminated = torch.zeros(self.capacity, dtype=torch.bool)
        self._has_successor = torch.zeros(self.capacity, dtype=torch.bool)

    def __len__(self) -> int:
        """Transitions held."""
        return int(self._has_successor.sum())

    def add(self, trajectories: Trajectories) -> torch.Tensor:
        """Take in whole episodes, overwriting the oldest rows; returns where the fresh transitions are, for `rows`.

        Raises InputError if they do not fit all at once.
        """
        needed = _num_rows(trajectories)
        if needed > self.capacity:
            raise InputError(f"{needed} rows do not fit a window of {self.capacity}: raise learner.window-steps")
        return self._add_whole(trajectories) if self._fits_whole(trajectories) else self._add(trajectories)

    def add_all(self, chunks: Sequence[Trajectories]) -> JointRows:
        """`add` each; returns the rows of all fresh transitions, copied, even if some overwrite others."""
        if sum(map(_num_rows, chunks)) <= self.capacity:
            return self.rows(torch.cat([self.add(chunk) for chunk in chunks]))
        return JointRows.joined([self.rows(self.add(chunk)) for chunk in chunks])

    def rows(self, index: torch.Tensor) -> JointRows:
        """The transitions at these places, copied."""
        return JointRows(*(self._take(field, index) for field in ("observations", "actions", "active")))

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """B transitions, uniformly and with replacement."""
        held = self._has_successor.nonzero().squeeze(1)
        index = held[torch.randint(len(held), (batch_size,), generator=generator)]
        following = (index + 1) % self.capacity
        return Batch(
            rows=self.rows(index),
            action_masks=self._take("action_masks", index),
            next_observations=self._take("observations", following),
            next_action_masks=self._take("action_masks", following),
            next_active=self._take("active", following),
            rewards=self._take("rewards", index),
            terminated=self._terminated[index],
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for a checkpoint."""
        arrays = {f"{field}.{b}": t.numpy() for field, blocks in self._columns.items() for b, t in enumerate(blocks)}
        arrays |= {"terminated": self._terminated.numpy(), "has_successor": self._has_successor.numpy()}
        return arrays | {"cursor": np.array([self._cursor])}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`, for arrays that were checked against `state_table`."""
        for field, blocks in self._columns.items():
            for b, stored in enumerate(blocks):
                stored.copy_(torch.tensor(arrays[f"{field}.{b}"]))
        self._terminated.copy_(torch.tensor(arrays["terminated"]))
        self._has_successor.copy_(torch.tensor(arrays["has_successor"]))
        self._cursor = int(arrays["cursor"][0])

    def _add(self, trajectories: Trajectories) -> torch.Tensor:
        lengths = torch.as_tensor(trajectories.lengths)
        step = torch.arange(trajectories.terminated.shape[0] + 1)
        kept = step <= lengths.unsqueeze(1)
        index = (self._cursor + torch.arange(int(kept.sum()))) % self.capacity
        for field, stored in self._columns.items():
            for column, values in zip(stored, self._episode_major(trajectories, field), strict=True):
                column[index] = values[kept]
        self._terminated[index] = _with_last_row(torch.as_tensor(trajectories.terminated)).T[kept]
        self._has_successor[index] = (step < lengths.unsqueeze(1))[kept]
        self._cursor = (self._cursor + len(index)) % self.capacity
        return index[self._has_successor[index]]

    def _fits_whole(self, trajectories: Trajectories) -> bool:
        """Whether all episodes have full length and can go to where such ones lie, without touching the ring's end."""
        rows = self.layout.spec.episode_length + 1
        ends = self._cursor + trajectories.num_episodes * rows
        return self._cursor % rows == 0 and ends <= self.capacity and bool((trajectories.lengths == rows - 1).all())

    def _add_whole(self, trajectories: Trajectories) -> torch.Tensor:
        """As `_add`, with one copy from where the arrays lie: what streams in are mostly whole episodes."""
        rows, episodes = self.layout.spec.episode_length + 1, trajectories.num_episodes
        end = self._cursor + episodes * rows
        place = slice(self._cursor, end)
        for field, stored in self._columns.items():
            for b, column in enumerate(stored):
                steps = torch.from_numpy(trajectories.arrays[f"{b}.{field}"]).transpose(0, 1)
                target = column[place].unflatten(0, (episodes, rows))
                target[:, : steps.shape[1]] = steps
                if steps.shape[1] < rows:
                    target[:, -1] = 0  # as `_with_last_row`
        step = torch.arange(rows)
        self._terminated[place] = _with_last_row(torch.as_tensor(trajectories.terminated)).T.flatten()
        self._has_successor[place] = (step < rows - 1).repeat(episodes)
        index = torch.arange(self._cursor, end)[self._has_successor[place]]
        self._cursor = end % self.capacity
        return index

    def _episode_major(self, trajectories: Trajectories, field: str) -> list[torch.Tensor]:
        """A field of the trajectories per block, [E, T+1, N_b, …]."""
        per_step = [torch.from_numpy(trajectories.arrays[f"{b}.{field}"]) for b in range(len(self.layout.blocks))]
        longest = trajectories.terminated.shape[0] + 1
        return [(steps if len(steps) == longest else _with_last_row(steps)).transpose(0, 1) for steps in per_step]

    def _take(self, field: str, index: torch.Tensor) -> list[torch.Tensor]:
        return [stored.index_select(0, index) for stored in self._columns[field]]


def _num_rows(trajectories: Trajectories) -> int:
    return trajectories.num_steps + trajectories.num_episodes


def _with_last_row(steps: torch.Tensor) -> torch.Tensor:
    """[T, …] → [T+1, …]: actions and rewards have no entry for an episode's last observation; it is never read."""
    return torch.cat([steps, steps.new_zeros(1, *steps.shape[1:])])
