from __future__ import annotations

import pytest
import torch

from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.reward_server.discriminator import Activation, Architecture, Workspace, backward, forward
from bm3il.reward_server.sees import Seen
from tests.plain import seen_by
from tests.reward_server.small_model import encoded

torch.set_num_threads(1)

UNEVEN = EnvironmentSpec("uneven", (TypeSpec("a", 3, 4, 5), TypeSpec("b", 2, 4, 5)), 10)


def random_rows(layout: Layout, count: int, generator: torch.Generator) -> JointRows:
    observations, actions, active = [], [], []
    for block in layout.blocks:
        shape = (count, block.num_agents)
        observations.append(torch.randn(*shape, block.observation_dim, generator=generator))
        if block.discrete:
            actions.append(torch.randint(block.action_dim, shape, generator=generator))
        else:
            actions.append(torch.rand(*shape, block.action_dim, generator=generator) * 2 - 1)
        active.append(torch.rand(shape, generator=generator) < 0.8)
    return JointRows(seen_by(layout, observations), actions, active)


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
    layout = Layout.of(UNEVEN, sharing, identity)
    (block,) = layout.blocks
    architecture = Architecture(block, 2, hidden, activation, Seen(((0, 4),), action=True))
    layers = [layer.double().requires_grad_() for layer in architecture.initial(generator)]
    rows = random_rows(layout, 7, generator)
    chosen = rows.select(torch.tensor([5, 0, 5]))
    x = encoded(architecture, layout, 0, chosen, torch.float64)
    assert x.shape == (block.groups, block.slots, 3, layers[0].shape[-1])

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
                observation, one_hot = torch.zeros(4), torch.zeros(5)
                if agent >= 0:
                    observation = chosen.observations[0].dense()[row, agent]
                one_hot[chosen.actions[0][row, agent] if agent >= 0 else 0] = 1
                bias = torch.eye(block.slots)[slot] if identity else torch.ones(1)
                inputs = torch.cat([observation, one_hot, bias]).double()
                for particle in range(2):
                    expected = slow_logit(layers, g, particle, inputs, activation)
                    found = logits[g, particle, slot * 3 + row]
                    torch.testing.assert_close(found, expected.detach())
                    total = total + expected * cotangent[g, particle, slot * 3 + row]
    for gradient, expected in zip(gradients, torch.autograd.grad(total, layers), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_continuous_actions_enter_as_they_are() -> None:
    spec = EnvironmentSpec("continuous", (TypeSpec("a", 2, 3, 2, discrete=False),), 10)
    layout = Layout.of(spec, "agent")
    rows = random_rows(layout, 4, torch.Generator().manual_seed(0))
    architecture = Architecture(layout.blocks[0], 1, (4,), "relu", Seen(((0, 3),), action=True))
    x = encoded(architecture, layout, 0, rows)
    assert x.shape == (2, 1, 4, 6)
    torch.testing.assert_close(x[1, 0, :, 3:5], rows.actions[0][:, 1])


def test_tensors_are_the_weights_and_biases_of_the_layers_in_place() -> None:
    architecture = Architecture(
        Layout.of(UNEVEN, "type", True).blocks[0], 2, (6, 3), "relu", Seen(((0, 4),), action=True)
    )
    layers = architecture.initial(torch.Generator().manual_seed(0))
    tensors = architecture.tensors(layers)
    assert [t.shape[2:] for t in tensors] == [(6, 9), (6, 3), (3, 6), (3, 1), (1, 3), (1, 1)]
    for tensor in tensors:
        tensor.zero_()
    assert not any(layer.any() for layer in layers)


def test_a_workspace_gives_the_same_memory_again_with_rows_an_odd_number_of_cache_lines_apart() -> None:
    work = Workspace()
    first = work.take("a", 3, 4, 64)
    assert first.shape == (3, 4, 64)
    assert first.stride() == (4 * 80, 80, 1)
    assert work.take("a", 2, 17).data_ptr() == first.data_ptr()
    assert work.take("a", 2, 17).stride(0) == 48
    assert work.take("b", 3).data_ptr() != first.data_ptr()
    assert work.take("a", 30, 4, 64).shape == (30, 4, 64)
