"""What updates say of themselves, summed where it was computed and read once an iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bm3il.protocol.errors import NumericalError

MUST_BE_FINITE = ("critic_loss", "policy_loss", "cloning_loss")


def merged(*parts: Mapping[str, float]) -> dict[str, float]:
    """All figures of all parts. Raises ValueError if two are called the same: one would hide the other."""
    together: dict[str, float] = {}
    for part in parts:
        if twice := together.keys() & part.keys():
            raise ValueError(f"two figures are called '{min(twice)}': name them after whose they are")
        together |= part
    return together


class Figures:
    """Means over some updates. Reading a number of a GPU waits for all that runs there, so that sums stay there."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._updates = 0

    def add(self, figures: Mapping[str, torch.Tensor | float]) -> None:
        """Figures of one update, scalars."""
        self._updates += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Of all updates. Raises NumericalError if a loss was not finite: then networks may hold anything."""
        known = {name: value for name, value in self._sums.items() if isinstance(value, float)}
        others = [name for name in self._sums if name not in known]
        if others:
            known |= dict(zip(others, torch.stack([self._sums[name] for name in others]).tolist(), strict=True))  # type: ignore[misc]
        for name in MUST_BE_FINITE:
            if not math.isfinite(known.get(name, 0.0)):
                raise NumericalError(f"{name} is {known[name]}")
        return {name: value / self._updates for name, value in known.items()}
