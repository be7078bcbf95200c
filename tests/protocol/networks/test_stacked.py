"""Stacked networks against one network at a time."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bm3il.protocol.networks import stacked
from bm3il.protocol.networks.stacked import StackedMLP, uniform


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3])
def test_each_network_is_an_ordinary_mlp(slope: float) -> None:
    stack = StackedMLP(3, (4, 5, 2), torch.Generator().manual_seed(0), slope).double()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    for k in range(3):
        hidden = functional.leaky_relu(functional.linear(x[k], stack.weights[0][k].T, stack.biases[0][k, 0]), slope)
        expected = functional.linear(hidden, stack.weights[1][k].T, stack.biases[1][k, 0])
        torch.testing.assert_close(stack(x)[k], expected)


def test_an_identity_is_a_one_hot_input() -> None:
    """Rows [S, B]: slot s sees its number beside its observation."""
    generator = torch.Generator().manual_seed(0)
    stack = StackedMLP(2, (4, 5, 2), generator, identity_slots=3, agents=(3, 3)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    numbers = torch.eye(3, dtype=torch.float64)[:, None]
    numbered = torch.cat([x, numbers.expand(2, 3, 4, 3)], dim=-1)
    for k in range(2):
        weight = torch.cat([stack.weights[0][k], stack.biases[0][k]])
        expected = torch.relu(numbered[k] @ weight) @ stack.weights[1][k] + stack.biases[1][k]
        torch.testing.assert_close(stack(x.flatten(1, 2)).unflatten(1, (3, 4))[k], expected)


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


@pytest.mark.parametrize("rows", [6, 6_000])
@pytest.mark.parametrize("slots", [1, 3])
def test_an_actor_computes_the_same_bits(slots: int, rows: int) -> None:
    """Without gradients there is a shorter way; parameters that are loaded, copied or converted are seen on it."""
    generator = torch.Generator().manual_seed(3)
    agents = (slots, slots)
    first, other = (StackedMLP(2, (4, 64, 5), generator, 0.1, False, slots, agents) for _ in range(2))
    first.load_state_dict(other.state_dict())
    x = torch.randn(2, rows, 4, generator=generator)
    for stack in (first, deepcopy(first), first.double().float()):
        stack.weights[0].data += 1
        with torch.no_grad():
            short = stack(x)
        assert torch.equal(short, stack(x.requires_grad_()))


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("agents", [(1, 1, 1), (3, 3, 3), (1, 3, 2), (2, 1, 3)])
@pytest.mark.parametrize(("tile", "wasted"), [(1 << 17, 100), (1 << 17, 0), (1 << 17, 24), (80, 0), (20, 0)])
def test_tiles_backpropagate_as_autograd_does(
    identity: bool, agents: tuple[int, ...], tile: int, wasted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two inputs side by side, gradients added to what is there; what empty slots say counts for nothing."""
    monkeypatch.setattr(stacked, "TILE_NUMBERS", tile)
    monkeypatch.setattr(stacked, "WASTED_ROWS", wasted)
    slots = max(agents)
    there = (torch.arange(slots) < torch.tensor(agents).unsqueeze(1)).repeat_interleave(24 // slots, dim=1)[..., None]
    generator = torch.Generator().manual_seed(2)
    stack = StackedMLP(3, (5, 4, 2), generator, 0.1, False, slots if identity else 1, agents).double()
    inputs = [torch.randn(3, 24, width, generator=generator, dtype=torch.float64).requires_grad_() for width in (2, 3)]
    hidden = functional.leaky_relu(
        torch.cat(inputs, -1) @ stack.weights[0]
        + stack.biases[0].repeat_interleave(24 // len(stack.biases[0][0]), dim=1),
        0.1,
    )
    output = (hidden @ stack.weights[1] + stack.biases[1]) * there
    wanted = [*inputs, *stack.parameters()]
    expected = torch.autograd.grad(output.square().sum(), wanted, retain_graph=True)
    torch.testing.assert_close(stack(*inputs) * there, output)
    said = stack(*inputs) * there
    for found, gradient in zip(torch.autograd.grad(said.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient)
    for part, y in stack.outputs(*inputs):
        torch.testing.assert_close(y * there[part], output[part])
    for times in (1, 2):
        detached = [x.detach() for x in inputs]
        d_inputs = stack.backpropagate(detached, lambda part, y: 2 * y * there[part], to_inputs=True)
        for x, gradient in zip(d_inputs, expected, strict=False):
            torch.testing.assert_close(x, gradient)
        for parameter, gradient in zip(stack.parameters(), expected[2:], strict=True):
            torch.testing.assert_close(parameter.grad, times * gradient)


def test_parameters_start_within_the_customary_bound_and_depend_on_the_generator_alone() -> None:
    first, again, other = (uniform((3, 50, 4), 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.9 / math.sqrt(50) < float(first.detach().abs().max()) <= 1 / math.sqrt(50)


@pytest.mark.parametrize("slots", [1, 3])
def test_no_rows_have_no_gradient(slots: int) -> None:
    stack = StackedMLP(2, (3, 4, 5), torch.Generator().manual_seed(2), 0.0, False, slots, (slots, 1))
    output = stack(torch.empty(2, 0, 3))
    assert output.shape == (2, 0, 5)
    output.sum().backward()
    assert not any(p.grad.any() for p in stack.parameters())
    stack.zero_grad(set_to_none=True)
    stack.backpropagate([torch.empty(2, 0, 3)], lambda tile, output: output, to_inputs=False)
    assert not any(p.grad.any() for p in stack.parameters())
