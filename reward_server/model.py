"""What a reward service answers from, and the simplest: the environment's own rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from bm3il.protocol.errors import NumericalError, ProtocolError
from bm3il.protocol.layout import JointRows
from bm3il.protocol.messages import Arrays

Answer = tuple[list[torch.Tensor], list[torch.Tensor] | None]
"""Rewards, and their standard deviations over the particles if asked for: [B, N_b] float32 per block."""


class Model(Protocol):
    """What a reward service answers from."""

    version: int

    def observe(self, rows: JointRows) -> None:
        """Take in fresh rows of the agents."""

    def update(self, progress: float) -> dict[str, float]:
        """Learn from what was observed; `progress` is the part of the run that is done, 0..1."""

    def query(self, rows: JointRows, deviation: bool = False, true_rewards: list[torch.Tensor] | None = None) -> Answer:
        """Rewards of joint rows."""

    def state(self) -> Arrays:
        """Everything that a restart needs, copied."""

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`."""


class TrueRewards:
    """Answers the environment's rewards as they came: trains experts, and checks everything around the rewards."""

    def __init__(self) -> None:
        self.version = 0

    def observe(self, rows: JointRows) -> None:
        pass

    def update(self, progress: float) -> dict[str, float]:
        self.version += 1
        return {}

    def query(self, rows: JointRows, deviation: bool = False, true_rewards: list[torch.Tensor] | None = None) -> Answer:
        if true_rewards is None:
            raise ProtocolError("body", "rewards of source 'environment' were asked for without the true rewards")
        rewards = [r * active for r, active in zip(true_rewards, rows.active, strict=True)]
        check_rewards(rewards)
        return rewards, [torch.zeros_like(r) for r in rewards] if deviation else None

    def state(self) -> Arrays:
        return {"counters": np.array([self.version], np.int64)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.version = int(arrays["counters"][0])


def check_rewards(rewards: Sequence[torch.Tensor]) -> None:
    """Raise NumericalError for a reward that is not finite, [B, N_b] per block."""
    for b, values in enumerate(rewards):
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"a reward of block {b} is not finite")
