"""What observations and actions in spaces of Gymnasium are in demonstrations."""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDING = 1e-6


def flat(space: Any, value: Any) -> np.ndarray:
    """The numbers of an observation side by side, [O] float32, copied."""
    from gymnasium.spaces.utils import flatten

    return np.array(flatten(space, value), np.float32)


def unit(space: Any, actions: np.ndarray) -> np.ndarray:
    """Actions [..., *shape] of a bounded box → [..., A] float32, −1 at its lower and 1 at its upper bounds."""
    width = space.high.astype(np.float64) - space.low
    part = (np.asarray(actions, np.float64) - space.low) / np.where(width > 0, width, 1)
    scaled = np.where(width > 0, 2 * part - 1, 0).reshape(*np.shape(actions)[: np.ndim(actions) - space.low.ndim], -1)
    # What lies farther out than by rounding stays there, for the recording's checks to refuse it with its place.
    return np.where(np.abs(scaled) <= 1 + ROUNDING, np.clip(scaled, -1, 1), scaled).astype(np.float32)
