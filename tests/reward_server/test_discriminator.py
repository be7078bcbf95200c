from __future__ import annotations

import pytest
import torch

from protocol.layout import JointRows, Layout, ParameterSharing
from protocol.specs import EnvironmentSpec, TypeSpec
from reward_server.discriminator import Activation, Architecture, Workspace, backward, forward

torch.set_num_threads(1)

UNEVEN = EnvironmentSpec("uneven", (TypeSpec("a", 3, 4, 5), TypeSpec("b", 2, 4, 5)), 10)


def random_rows(layout: Layout, count: int, generator: torch.Generator) -> JointRows:
    rows = JointRows([], [], [])
    for block in layout.blocks:
        shape = (count, block.num_agents)
        rows.observations.append(torch.randn(*shape, block.observation_dim, generator=generator))
        if block.discrete:
            rows.actions.append(torch.randint(block.action_dim, shape, generator=generator))
        else:
            rows.actions.append(torch.rand(*shape, block.action_dim, generator=generator) * 2 - 1)
        rows.active.append(torch.rand(shape, generator=generator) < 0.8)
    return rows


def slow_logit(layers: list[torch.Tensor], group: int, particle: int, x: torch.Tensor, activation: str) -> torch.Tensor:
    for number, layer in enumerate(layers):
        weight = layer[group, particle]
        if number:
            x = torch.cat([getattr(torch, activation)(x), torch.ones(1, dtype=x.dtype)])
        x = weight @ x
    return x.squeeze()


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("hidden", [(6, 3), ()])
def test_logits_of_every_agent_and_gradients_equal_the_slow_way(
    sharing: ParameterSharing, identity: bool, activation: Activation, hidden: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    layout = Layout.of(UNEVEN, sharing)
    (block,) = layout.blocks
    architecture = Architecture(block, 2, hidden, activation, identity)
    layers = [layer.double().requires_grad_() for layer in architecture.initial(generator)]
    rows = random_rows(layout, 7, generator)
    index = torch.tensor([5, 0, 5])
    x = torch.full((block.groups, 3, block.slots, layers[0].shape[-1]), torch.nan, dtype=torch.float64)
    active = architecture.encode(rows, 0, index, slice(None), x, Workspace())

    with torch.no_grad():
        work = Workspace(torch.float64)
        logits, activations = forward(layers, x.flatten(1, 2), activation, work)
        cotangent = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        gradients = [torch.full_like(layer, torch.nan) for layer in layers]
        backward(layers, x.flatten(1, 2), activations, cotangent, activation, work, gradients)

    total = torch.zeros((), dtype=torch.float64)
    for g in range(block.groups):
        for row in range(3):
            for slot in range(block.slots):
                agent = int(block.agent_of_slot[g * block.slots + slot])
                assert bool(active[g, row, slot]) == (agent >= 0 and bool(rows.active[0][index[row], agent]))
                one_hot = torch.zeros(5)
                one_hot[rows.actions[0][index[row], max(agent, 0)]] = 1
                bias = torch.eye(block.slots)[slot] if identity else torch.ones(1)
                inputs = torch.cat([rows.observations[0][index[row], max(agent, 0)], one_hot, bias]).double()
                for particle in range(2):
                    expected = slow_logit(layers, g, particle, inputs, activation)
                    found = logits[g, particle, row * block.slots + slot]
                    torch.testing.assert_close(found, expected.detach())
                    total = total + expected * cotangent[g, particle, row * block.slots + slot]
    for gradient, expected in zip(gradients, torch.autograd.grad(total, layers), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_continuous_actions_enter_as_they_are() -> None:
    spec = EnvironmentSpec("continuous", (TypeSpec("a", 2, 3, 2, discrete=False),), 10)
    layout = Layout.of(spec, "agent")
    rows = random_rows(layout, 4, torch.Generator().manual_seed(0))
    architecture = Architecture(layout.blocks[0], 1, (4,), "relu", False)
    x = torch.empty(2, 4, 1, 6)
    architecture.encode(rows, 0, torch.arange(4), slice(None), x, Workspace())
    torch.testing.assert_close(x[1, :, 0, 3:5], rows.actions[0][:, 1])


def test_tensors_and_join_are_inverses() -> None:
    architecture = Architecture(Layout.of(UNEVEN, "type").blocks[0], 2, (6, 3), "relu", True)
    layers = architecture.initial(torch.Generator().manual_seed(0))
    tensors = architecture.tensors(layers)
    assert [t.shape[-1] for t in tensors] == [6 * 9, 6 * 3, 3 * 6, 3, 3, 1]
    for layer, joined in zip(layers, architecture.join(tensors), strict=True):
        assert torch.equal(layer, joined)
