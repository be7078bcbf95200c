"""The fresh episodes of one iteration, in the order of their steps: what on-policy updates learn from, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protocol.device import moved
from protocol.layout import JointRows, Layout
from protocol.trajectories import Trajectories


@dataclass
class Segments:
    """E episodes side by side, padded to T steps; one tensor per block in each list.

    observations [T+1, E, N_b, O_b], action_masks [T+1, E, N_b, A_b], active [T+1, E, N_b] bool.
    actions [T, E, N_b] int64, or [T, E, N_b, A_b] float32.   log_probabilities [T, E, N_b]: log μ(a|s).
    rewards [T, E, N_b]: true rewards, which only runs with `source="environment"` look at.
    terminated [T, E] bool.   played [T, E] bool: whether the episode had this step.
    index [R]: where the steps that were played lie among all T·E, step by step of all episodes.
    """

    observations: list[torch.Tensor]
    action_masks: list[torch.Tensor]
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

        fields = ("observations", "action_masks", "active", "actions", "log_probabilities", "rewards")
        lengths = torch.cat([torch.from_numpy(chunk.lengths) for chunk in chunks])
        terminated = joined("terminated")
        played = torch.arange(len(terminated)).unsqueeze(1) < lengths
        observations, action_masks, active, actions, log_probabilities, rewards = map(columns, fields)
        # Found here, on the CPU: a GPU would be waited for to learn how many there are.
        index = played.flatten().nonzero().squeeze(1)
        return cls(observations, action_masks, active, actions, log_probabilities, rewards, terminated, played, index)

    @property
    def num_steps(self) -> int:
        """R: joint steps that were played."""
        return len(self.index)

    def rows(self) -> JointRows:
        """The R joint steps: what is shown to the reward server, and rewarded."""
        return JointRows(*(self.of_rows(part) for part in (self.observations, self.actions, self.active)))

    def of_rows(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[T or T+1, E, …] → the R steps that were played, [R, …], in the order of `rows`; a view if these are all."""
        flat = [tensor[: len(self.played)].flatten(0, 1) for tensor in tensors]
        if len(self.index) == self.played.numel():
            return flat
        return [tensor.index_select(0, self.index) for tensor in flat]

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
            moved(self.observations, device),
            moved(self.action_masks, device),
            moved(self.active, device),
            moved(self.actions, device),
            moved(self.log_probabilities, device),
            moved(self.rewards, device),
            self.terminated.to(device, non_blocking=True),
            self.played.to(device, non_blocking=True),
            self.index.to(device, non_blocking=True),
        )
