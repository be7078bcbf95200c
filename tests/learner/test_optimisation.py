"""Clipping per network, and Adam's state as arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bm3il.learner.optimisation import NetworkClip, part
from bm3il.protocol.networks.stacked import StackedMLP


class TwoStacksAndAShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one = StackedMLP(3, (4, 5, 2), generator)
        self.two = StackedMLP(2, (3, 2), generator)
        self.shared = nn.Parameter(torch.zeros(4, 4))
        self.also_shared = nn.Parameter(torch.zeros(4))


def test_each_network_is_clipped_by_its_own_norm() -> None:
    module, generator = TwoStacksAndAShared(), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    module.one.weights[0].grad[1] *= 100
    for parameter in module.one.parameters():
        parameter.grad[2] *= 1e-3
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    NetworkClip(module, 0.5)()
    for stack, networks in (("one", 3), ("two", 2)):
        for k in range(networks):
            names = [name for name in before if name.startswith(stack)]
            norm = sum(float((before[name][k].double() ** 2).sum()) for name in names) ** 0.5
            scale = min(1.0, 0.5 / norm)
            for name, parameter in module.named_parameters():
                if name in names:
                    torch.testing.assert_close(parameter.grad[k], before[name][k] * scale)
    shared = ["shared", "also_shared"]
    norm = sum(float((before[name] ** 2).sum()) for name in shared) ** 0.5
    for name, parameter in module.named_parameters():
        if name in shared:
            torch.testing.assert_close(parameter.grad, before[name] * 0.5 / norm)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    module = TwoStacksAndAShared()
    module.two.weights[0].grad = torch.ones(2, 3, 2)
    NetworkClip(module, 1.0)()
    assert module.one.weights[0].grad is None
    torch.testing.assert_close(module.two.weights[0].grad.flatten(1).norm(dim=1), torch.ones(2))


def test_part_takes_a_whole_name() -> None:
    arrays = {name: np.zeros(1) for name in ("policy/a", "policy/b/c", "policy_adam/a", "other")}
    assert list(part(arrays, "policy")) == ["a", "b/c"]
