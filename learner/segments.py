"""The fresh episodes of one iteration, in the order of their steps: what on-policy updates learn from, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bm3il.protocol.device import moved
from bm3il.protocol.layout import JointRows, Layout, widened
from bm3il.protocol.observations import Observations
from bm3il.protocol.trajectories import Trajectories, columns_of


@dataclass
class Segments:
    """E episodes side by side, padded to T steps; one entry per block in each list.

    observations compact, with their action masks, [T+1, E] in front.   active [T+1, E, N_b] bool.
    actions [T, E, N_b] int64, or [T, E, N_b, A_b] float32.   log_probabilities [T, E, N_b]: log μ(a|s).
    rewards [T, E, N_b]: true rewards, which only runs with `source="environment"` look at.
    terminated [T, E] bool.   played [T, E] bool: whether the episode had this step.
    index [R]: where the steps that were played lie among all T·E, step by step of all episodes.
    """

    observations: list[Observations]
    active: list[torch.Tensor]
    actions: list[torch.Tensor]
    log_probabilities: list[torch.Tensor]
    rewards: list[torch.Tensor]
    terminated: torch.Tensor
    played: torch.Tensor
    index: torch.Tensor

    @classmethod
    def of(cls, chunks: Sequence[Trajectories], layout: Layout) -> Segments:
        """The episodes of all chunks, in their order; a view of the chunk if there is one only."""

        def joined(name: str) -> torch.Tensor:
            parts = [torch.from_numpy(chunk.arrays[name]) for chunk in chunks]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        def columns(field: str) -> list[torch.Tensor]:
            return [joined(f"{b}.{field}") for b in range(len(layout.blocks))]

        observations = [
            Observations(block.form, {name: joined(f"{b}.{name}") for name in columns_of(chunks[0].arrays, b)})
            for b, block in enumerate(layout.blocks)
        ]
        lengths = torch.cat([torch.from_numpy(chunk.lengths) for chunk in chunks])
        terminated = joined("terminated")
        played = torch.arange(len(terminated)).unsqueeze(1) < lengths
        active, log_probabilities, rewards = map(columns, ("active", "log_probabilities", "rewards"))
        actions = [widened(action) for action in columns("actions")]
        # Found here, on the CPU: a GPU would be waited for to learn how many there are.
        index = played.flatten().nonzero().squeeze(1)
        return cls(observations, active, actions, log_probabilities, rewards, terminated, played, index)

    @property
    def num_steps(self) -> int:
        """R: joint steps that were played."""
        return len(self.index)

    def rows(self) -> JointRows:
        """The R joint steps: what is shown to the reward server, and rewarded."""
        observations = [seen.map(self._of_rows) for seen in self.observations]
        return JointRows(observations, self.of_rows(self.actions), self.of_rows(self.active))

    def of_rows(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[T or T+1, E, …] → the R steps that were played, [R, …], in the order of `rows`; a view if these are all."""
        return [self._of_rows(tensor) for tensor in tensors]

    def _of_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor[: len(self.played)].flatten(0, 1)
        return flat if len(self.index) == self.played.numel() else flat.index_select(0, self.index)

    def spread(self, rewards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Values of `rows`, [R, N_b] per block → [T, E, N_b], 0 where nothing was played."""
        result = []
        for values in rewards:
            room = values.new_zeros(self.played.numel(), values.shape[1])
            result.append(room.index_copy_(0, self.index, values).view(*self.played.shape, -1))
        return result

    def to(self, device: torch.device) -> Segments:
        """Itself on another device."""

        return Segments(
            [seen.to(device) for seen in self.observations],
            moved(self.active, device),
            moved(self.actions, device),
            moved(self.log_probabilities, device),
            moved(self.rewards, device),
            self.terminated.to(device, non_blocking=True),
            self.played.to(device, non_blocking=True),
            self.index.to(device, non_blocking=True),
        )
