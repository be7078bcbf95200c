"""Stacked networks against one network at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from protocol.stacked import StackedMLP, uniform


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3])
def test_each_network_is_an_ordinary_mlp(slope: float) -> None:
    stack = StackedMLP(3, (4, 5, 2), torch.Generator().manual_seed(0), slope).double()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    for k in range(3):
        hidden = functional.leaky_relu(functional.linear(x[k], stack.weights[0][k].T, stack.biases[0][k, 0]), slope)
        expected = functional.linear(hidden, stack.weights[1][k].T, stack.biases[1][k, 0])
        torch.testing.assert_close(stack(x)[k], expected)


def test_an_identity_is_a_one_hot_input() -> None:
    """Rows [B, S]: slot s sees its number beside its observation."""
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(2, (4, 5, 2), generator, identity_slots=3).double()
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    numbered = torch.cat([x, torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3)], dim=-1)
    for k in range(2):
        weight = torch.cat([stack.weights[0][k], stack.biases[0][k]])
        expected = torch.relu(numbered[k] @ weight) @ stack.weights[1][k] + stack.biases[1][k]
        torch.testing.assert_close(stack(x.flatten(1, 2)).unflatten(1, (4, 3))[k], expected)


def test_gradients_are_those_of_ordinary_layers() -> None:
    stack = StackedMLP(2, (3, 4, 1), torch.Generator().manual_seed(1)).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    stack(x).square().sum().backward()
    for k in range(2):
        layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
        with torch.no_grad():
            for layer, number in ((layers[0], 0), (layers[2], 1)):
                layer.weight.copy_(stack.weights[number][k].T)
                layer.bias.copy_(stack.biases[number][k, 0])
        layers(x[k]).square().sum().backward()
        torch.testing.assert_close(stack.weights[0].grad[k], layers[0].weight.grad.T)
        torch.testing.assert_close(stack.biases[1].grad[k, 0], layers[2].bias.grad)


def test_parameters_start_within_the_customary_bound_and_depend_on_the_generator_alone() -> None:
    first, again, other = (uniform((3, 50, 4), 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.9 / math.sqrt(50) < float(first.detach().abs().max()) <= 1 / math.sqrt(50)
