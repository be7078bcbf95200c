"""Gradient clipping for stacked networks, and parts of states, which are plain named arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bm3il.protocol.networks.stacked import StackedMLP


class NetworkClip:
    """Scales the gradient of every single network of a module's stacked ones to at most a norm.

    Parameters that are not stacked (shared by all agents) count as one network together.
    """

    def __init__(self, module: nn.Module, largest_norm: float) -> None:
        self._largest_norm = largest_norm
        self._stacks = [list(part.parameters()) for part in module.modules() if isinstance(part, StackedMLP)]
        stacked = {parameter for stack in self._stacks for parameter in stack}
        self._shared = [parameter for parameter in module.parameters() if parameter not in stacked]

    def __call__(self) -> None:
        """Scale what the parameters' `grad` hold now."""
        for stack in self._stacks:
            gradients = [p.grad for p in stack if p.grad is not None]
            if gradients:
                # Not clip_grad_norm_: with one norm over the stack, one network's gradient would shrink those of all.
                norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
                # The bound from below leaves small gradients as they are, and divides by no 0.
                scale = (self._largest_norm / norm.clamp(min=self._largest_norm)).view(-1, 1, 1)
                torch._foreach_mul_(gradients, [scale] * len(gradients))
        if self._shared:
            nn.utils.clip_grad_norm_(self._shared, self._largest_norm)


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix/`, without it."""
    return {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(prefix + "/")}
