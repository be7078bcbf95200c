"""Babbling: what agents do who know nothing and mean nothing, for a learned reward to know what is wrong.

A discriminator holds against agents only what it has seen of them. A run that starts from the clone shows it nothing
but what is nearly right, and then nobody is told that staying at home all day is wrong. Networks as they are drawn, the
last layer of each enlarged by another factor, do all kinds of things: near 1 they choose at random, far above it they
have fixed habits, to stay where they are among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bm3il.actors.policy import Policy
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.seeds import derive_seed

NETWORKS = 16
LARGEST_FACTOR = 100.0


class Babble:
    """Plays each of the E environments by one of at most `NETWORKS` random policies; `seed` decides which these are."""

    def __init__(self, layout: Layout, hidden: Sequence[int], num_envs: int, seed: int) -> None:
        count = min(NETWORKS, num_envs)
        self._policies = [Policy(layout, hidden, _generator(seed, number)) for number in range(count)]
        for number, policy in enumerate(self._policies):
            # A single environment cannot show the whole range at once: it has another place in it each time.
            place = number / (count - 1) if count > 1 else float(torch.rand((), generator=_generator(seed, count)))
            factor = LARGEST_FACTOR**place
            for stack in policy.networks:
                assert isinstance(stack, StackedMLP)
                for part in (stack.weights[-1], stack.biases[-1]):
                    # Through `data`: autograd refuses to change a parameter in place.
                    part.data.mul_(factor)

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """As `Policy.act`."""
        return self.decide(now, generator, greedy)[0]

    def decide(
        self, now: TimeStep, generator: torch.Generator, greedy: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As `Policy.decide`: environment e is played by policy e modulo their number."""
        count, seen = len(self._policies), now.seen(self._policies[0].layout.spec)
        parts = [
            policy.choose([block[k::count] for block in seen], generator, greedy)
            for k, policy in enumerate(self._policies)
        ]
        actions, chances = ([part[half] for part in parts] for half in (0, 1))
        return _woven(actions, len(seen[0])), _woven(chances, len(seen[0]))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "babbling", number))


def _woven(parts: Sequence[Sequence[np.ndarray]], envs: int) -> list[np.ndarray]:
    """Of each type the rows k, k + count, … from part k, in one array."""
    woven = [np.empty((envs, *array.shape[1:]), array.dtype) for array in parts[0]]
    for k, arrays in enumerate(parts):
        for whole, array in zip(woven, arrays, strict=True):
            whole[k :: len(parts)] = array
    return woven
