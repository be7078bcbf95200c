"""Gradient clipping for stacked networks, and states as plain named arrays."""

from __future__ import annotations

from collections.abc import Iterator

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
                norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
                scale = (self._largest_norm / norm.clamp(min=self._largest_norm)).view(-1, 1, 1)
                torch._foreach_mul_(gradients, [scale] * len(gradients))
        if self._shared:
            nn.utils.clip_grad_norm_(self._shared, self._largest_norm)


def recordable_adam(network: nn.Module) -> torch.optim.Adam:
    """Adam, its step still to be set by `set_rate`. On a GPU the step is a number of the device, which a recorded graph
    reads anew each time."""
    parameters = list(network.parameters())
    if parameters[0].device.type == "cuda":
        return torch.optim.Adam(parameters, torch.zeros((), device=parameters[0].device), fused=True, capturable=True)
    return torch.optim.Adam(parameters, fused=True)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The step of all further updates."""
    group = optimiser.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def adam_arrays(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, np.ndarray]]:
    """The state of an Adam optimiser as named arrays; empty before its first step."""
    for index, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            yield f"{index}/{key}", value.detach().cpu().numpy()


def load_adam_arrays(optimiser: torch.optim.Optimizer, arrays: dict[str, np.ndarray]) -> None:
    """The inverse of `adam_arrays`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in arrays.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = torch.tensor(value)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix/`, without it."""
    return {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(prefix + "/")}
