"""The newest joint rows of all actors, in the form in which the critics eat them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bm3il.protocol.device import CPU, check_room
from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import JointRows, Layout, widened
from bm3il.protocol.observations import COLUMNS, Observations
from bm3il.protocol.specs import ArrayTable
from bm3il.protocol.trajectories import Trajectories


@dataclass
class Batch:
    """B transitions; one entry per block in each list, joint rows [B, N_b, …] (see `protocol.layout`).

    Observations hold their action masks. `rewards` are true rewards, which only runs with `source="environment"` look
    at. `terminated` [B] means that nothing follows; a truncated row is an ordinary one whose next observation is
    bootstrapped from.
    """

    rows: JointRows
    next_observations: list[Observations]
    next_active: list[torch.Tensor]
    rewards: list[torch.Tensor]
    terminated: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Every array changed in the same way, along the axis of the transitions."""
        return Batch(
            rows=self.rows.map(change),
            next_observations=[seen.map(change) for seen in self.next_observations],
            next_active=[change(active) for active in self.next_active],
            rewards=[change(reward) for reward in self.rewards],
            terminated=change(self.terminated),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All of them, for `taken`."""
        following = [tensor for seen in self.next_observations for tensor in seen.columns.values()]
        return [*self.rows.tensors(), *following, *self.next_active, *self.rewards, self.terminated]

    @classmethod
    def taken(cls, layout: Layout, tensors: Iterator[torch.Tensor]) -> Batch:
        """The inverse of `tensors`: of the next ones."""
        blocks = layout.blocks
        rows = JointRows.taken(layout, tensors)
        following = [Observations.taken(block.form, tensors) for block in blocks]
        next_active, rewards = ([next(tensors) for _ in blocks] for _ in ("next_active", "rewards"))
        return cls(rows, following, next_active, rewards, next(tensors))

    def to(self, device: torch.device) -> Batch:
        """Itself on another device, without waiting for it."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Replay:
    """A ring of joint rows. An episode of n steps takes n + 1 rows: a row's successor is the next row of the ring.

    The rows are where they are learned from; which of them are whose successors, and their numbers, stay on the host,
    so that no draw waits for a GPU.
    """

    def __init__(self, layout: Layout, window_steps: int, device: torch.device = CPU) -> None:
        self.layout = layout
        self.capacity = self.capacity_of(layout, window_steps)
        self._cursor = 0
        table = self.table(layout, window_steps)
        check_room(table, device, "learner.window-steps", window_steps)
        self._device = device
        self._columns = {
            name: torch.from_numpy(np.zeros(shape, dtype)).to(device) for name, (dtype, shape) in table.items()
        }
        self._terminated = torch.zeros(self.capacity, dtype=torch.bool, device=device)
        self._has_successor = np.zeros(self.capacity, bool)
        self._number = np.zeros(self.capacity, np.int64)
        self.observed = 0
        """Transitions taken in since the start of the run: the number of the next one."""

    @staticmethod
    def capacity_of(layout: Layout, window_steps: int) -> int:
        """Rows of a window of so many steps: whole episodes."""
        length = layout.spec.episode_length
        return max(1, math.ceil(window_steps / length)) * (length + 1)

    @staticmethod
    def table(layout: Layout, window_steps: int) -> ArrayTable:
        """Name → (dtype, shape) of what is kept of every row."""
        capacity = Replay.capacity_of(layout, window_steps)
        one = Trajectories.array_table(layout.spec, layout.spec.episode_length, 1)
        return {
            name: (dtype, (capacity, *shape[2:]))
            for name, (dtype, shape) in one.items()
            # Off-policy updates do not ask how likely an action was; what has no dot is of no block's agents.
            if "." in name and not name.endswith(".log_probabilities")
        }

    def __len__(self) -> int:
        """Transitions held."""
        return int(self._has_successor.sum())

    def add(self, trajectories: Trajectories) -> np.ndarray:
        """Take in whole episodes, overwriting the oldest rows; returns where the fresh transitions are, for `rows`.

        Raises InputError if they do not fit all at once.
        """
        needed = _num_rows(trajectories)
        if needed > self.capacity:
            raise InputError(f"{needed} rows do not fit a window of {self.capacity}: raise learner.window-steps")
        index = self._add_whole(trajectories) if self._fits_whole(trajectories) else self._add(trajectories)
        self._number[index] = np.arange(self.observed, self.observed + len(index))
        self.observed += len(index)
        return index

    def add_all(self, chunks: Sequence[Trajectories]) -> JointRows:
        """`add` each; returns the rows of all fresh transitions, copied, even if some overwrite others."""
        # Gathered once, when all chunks are in; where later ones overwrite earlier ones, each before the next.
        if sum(map(_num_rows, chunks)) <= self.capacity:
            return self.rows(np.concatenate([self.add(chunk) for chunk in chunks]))
        return JointRows.joined([self.rows(self.add(chunk)) for chunk in chunks])

    def rows(self, index: np.ndarray) -> JointRows:
        """The transitions at these places, copied."""
        # Kept as the smallest integers, as they came; indices of tensors must be int64.
        actions = [widened(action) for action in self._take("actions", index)]
        return JointRows(self._seen(index), actions, self._take("active", index))

    def kept(self) -> tuple[int, JointRows] | None:
        """The number of the oldest transition held, and all of them in the order of their numbers; None if none is."""
        held = np.flatnonzero(self._has_successor)
        if not len(held):
            return None
        in_order = held[self._number[held].argsort()]
        return int(self._number[in_order[0]]), self.rows(in_order)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
        """B transitions, uniformly and with replacement, and their numbers [B]."""
        held = np.flatnonzero(self._has_successor)
        index = held[torch.randint(len(held), (batch_size,), generator=generator).numpy()]
        return self._batch(index), torch.from_numpy(self._number[index])

    def _batch(self, index: np.ndarray) -> Batch:
        # Never overwritten before its predecessor: the ring is written in its own order, the oldest row first.
        following = (index + 1) % self.capacity
        return Batch(
            rows=self.rows(index),
            next_observations=self._seen(following),
            next_active=self._take("active", following),
            rewards=self._take("rewards", index),
            terminated=self._terminated.index_select(0, self._there(torch.from_numpy(index))),
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for a checkpoint."""
        arrays = {name: column.cpu().numpy() for name, column in self._columns.items()}
        arrays |= {"terminated": self._terminated.cpu().numpy(), "has_successor": self._has_successor}
        return arrays | {"cursor": np.array([self._cursor, self.observed]), "number": self._number}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`. Raises InputError for one of a release that kept observations in another form."""
        if missing := sorted(self._columns.keys() - arrays.keys()):
            raise InputError(
                f"the checkpoint's replay has no {', '.join(missing)}: it was written by a release that kept "
                "observations in another form; start the run anew"
            )
        for name, column in self._columns.items():
            column.copy_(torch.tensor(arrays[name]))
        self._terminated.copy_(torch.tensor(arrays["terminated"]))
        self._has_successor[:], self._number[:] = arrays["has_successor"], arrays["number"]
        self._cursor, self.observed = (int(value) for value in arrays["cursor"])

    def _add(self, trajectories: Trajectories) -> np.ndarray:
        longest = trajectories.terminated.shape[0] + 1
        step, lengths = np.arange(longest), trajectories.lengths[:, None]
        kept = step <= lengths
        index = (self._cursor + np.arange(kept.sum())) % self.capacity
        place = self._there(torch.from_numpy(index))
        for name, column in self._columns.items():
            steps = trajectories.arrays[name]
            self._write(column, place, (steps if len(steps) == longest else _with_last_row(steps)), kept)
        self._write(self._terminated, place, _with_last_row(trajectories.terminated), kept)
        self._has_successor[index] = (step < lengths)[kept]
        self._cursor = (self._cursor + len(index)) % self.capacity
        return index[self._has_successor[index]]

    def _fits_whole(self, trajectories: Trajectories) -> bool:
        """Whether all episodes have full length and can go to where such ones lie, without touching the ring's end."""
        rows = self.layout.spec.episode_length + 1
        ends = self._cursor + trajectories.num_episodes * rows
        return self._cursor % rows == 0 and ends <= self.capacity and bool((trajectories.lengths == rows - 1).all())

    def _add_whole(self, trajectories: Trajectories) -> np.ndarray:
        """As `_add`, with one copy from where the arrays lie: what streams in are mostly whole episodes."""
        rows, episodes = self.layout.spec.episode_length + 1, trajectories.num_episodes
        end = self._cursor + episodes * rows
        place = slice(self._cursor, end)
        for name, column in self._columns.items():
            steps = torch.from_numpy(trajectories.arrays[name]).transpose(0, 1)
            target = column[place].unflatten(0, (episodes, rows))
            target[:, : steps.shape[1]] = self._there(steps)
            if steps.shape[1] < rows:
                target[:, -1] = 0  # as `_with_last_row`
        self._terminated[place] = self._there(torch.from_numpy(_with_last_row(trajectories.terminated).T.reshape(-1)))
        self._has_successor[place] = np.tile(np.arange(rows) < rows - 1, episodes)
        index = self._cursor + np.flatnonzero(self._has_successor[place])
        self._cursor = end % self.capacity
        return index

    def _seen(self, places: np.ndarray) -> list[Observations]:
        """What was observed at these places, copied."""
        index = self._there(torch.from_numpy(places))
        return [
            Observations(
                block.form,
                {
                    name: self._columns[f"{b}.{name}"].index_select(0, index)
                    for name in COLUMNS
                    if f"{b}.{name}" in self._columns
                },
            )
            for b, block in enumerate(self.layout.blocks)
        ]

    def _take(self, field: str, places: np.ndarray) -> list[torch.Tensor]:
        index = self._there(torch.from_numpy(places))
        return [self._columns[f"{b}.{field}"].index_select(0, index) for b in range(len(self.layout.blocks))]

    def _write(self, column: torch.Tensor, place: torch.Tensor, steps: np.ndarray, kept: np.ndarray) -> None:
        """The kept ones [E, T+1] of an array of steps [T+1, E, …], episode after episode."""
        column.index_copy_(0, place, self._there(torch.from_numpy(steps.swapaxes(0, 1)[kept])))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def _num_rows(trajectories: Trajectories) -> int:
    return trajectories.num_steps + trajectories.num_episodes


def _with_last_row(steps: np.ndarray) -> np.ndarray:
    """[T, …] → [T+1, …]: actions and rewards have no entry for an episode's last observation; it is never read."""
    return np.concatenate([steps, np.zeros_like(steps, shape=(1, *steps.shape[1:]))])
