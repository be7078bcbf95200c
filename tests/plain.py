"""Observations that nobody describes, for tests that make up numbers: all of them own, with masks of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bm3il.protocol.environment import TimeStep
from bm3il.protocol.layout import Layout
from bm3il.protocol.observations import Form, Observations


def plain_layout(layout: Layout) -> Layout:
    """The same agents, of whose observations nothing is said."""
    return Layout.of(layout.spec.plain(), layout.parameter_sharing)


def observed(observations: torch.Tensor, action_masks: torch.Tensor) -> Observations:
    """Of observations [..., N_b, O] and masks [..., N_b, A]."""
    form = Form.plain(observations.shape[-2], observations.shape[-1], action_masks.shape[-1])
    return Observations(form, {"own": observations, "masks": action_masks})


def seen_by(layout: Layout, observations: Sequence[torch.Tensor]) -> list[Observations]:
    """Of observations [..., N_b, O] per block of a layout, every action allowed."""
    return [
        observed(x, torch.ones(*x.shape[:-1], block.action_dim, dtype=torch.bool))
        for block, x in zip(layout.blocks, observations, strict=True)
    ]


def shown(observations: Sequence[np.ndarray], action_masks: Sequence[np.ndarray]) -> TimeStep:
    """A time step that shows these, [E, X_m, O_m] and [E, X_m, A_m] per type, to whoever acts on a plain spec."""
    ended = np.zeros(len(observations[0]), bool)
    active = [np.ones(o.shape[:2], bool) for o in observations]
    rewards = [np.zeros(o.shape[:2], np.float32) for o in observations]
    return TimeStep(list(observations), list(action_masks), active, rewards, ended, ended)


def to_rows(layout: Layout, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Per type [B, X_m, …] → joint rows per block, [B, N_b, …], copied."""
    return [torch.from_numpy(np.concatenate([arrays[m] for m in block.types], axis=1)) for block in layout.blocks]
