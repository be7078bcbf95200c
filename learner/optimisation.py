"""Gradient clipping for stacked networks, and states as plain named arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from protocol.stacked import StackedMLP


def clip_per_network(module: nn.Module, largest_norm: float) -> None:
    """Scale the gradient of every single network of the stacked ones to at most `largest_norm`.

    Parameters that are not stacked (shared by all agents) count as one network together.
    """
    stacks = [part for part in module.modules() if isinstance(part, StackedMLP)]
    stacked = {parameter for stack in stacks for parameter in stack.parameters()}
    for stack in stacks:
        gradients = [p.grad for p in stack.parameters() if p.grad is not None]
        if not gradients:
            continue
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (largest_norm / norm.clamp(min=largest_norm)).view(-1, 1, 1)
        for gradient in gradients:
            gradient.mul_(scale)
    if shared := [p for p in module.parameters() if p not in stacked]:
        nn.utils.clip_grad_norm_(shared, largest_norm)


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
