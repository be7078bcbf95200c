"""A small reward model, and its directions one row and one particle at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.reward_server.discriminator import Architecture, Source, Workspace
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.settings import RewardSettings
from bm3il.reward_server.svgd import svgd_direction
from tests.plain import seen_by

torch.set_num_threads(1)

SPEC = EnvironmentSpec(
    "uneven", (TypeSpec("a", 3, 4, 5), TypeSpec("b", 2, 4, 5), TypeSpec("c", 2, 3, 2, discrete=False)), 10
)
SETTINGS = RewardSettings(particles=3, hidden=(8, 6), batch_size=16, window_steps=40, updates=2, label_smoothing=0.1)


def some_rows(layout: Layout, count: int, seed: int, shift: float = 0.0) -> JointRows:
    generator = torch.Generator().manual_seed(seed)
    observations, actions, active = [], [], []
    for block in layout.blocks:
        shape = (count, block.num_agents)
        observations.append(torch.randn(*shape, block.observation_dim, generator=generator) + shift)
        if block.discrete:
            actions.append(torch.randint(block.action_dim, shape, generator=generator))
        else:
            actions.append(torch.rand(*shape, block.action_dim, generator=generator) * 2 - 1)
        active.append(torch.rand(shape, generator=generator) < 0.8)
    return JointRows(seen_by(layout, observations), actions, active)


def encoded(
    architecture: Architecture, layout: Layout, b: int, rows: JointRows, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The input [G, S, B, in + biases] of a block's discriminators, written over what is no number."""
    block = layout.blocks[b]
    x = Workspace(dtype).take("x", block.groups, block.slots, len(rows), architecture.shapes[0][-1]).fill_(torch.nan)
    source = Source(block.see(rows.observations[b]), slice(0, len(rows)), 0, block.observation_dim)
    architecture.encode([source], block.grid(rows.actions[b]), slice(None), x)
    return x


def make_model(
    sharing: ParameterSharing = "type", settings: RewardSettings = SETTINGS, seed: int = 0, identity: bool = False
) -> RewardModel:
    layout = Layout.of(SPEC, sharing, identity)
    model = RewardModel(layout, some_rows(layout, 30, 1, shift=1.0), settings, seed)
    model.observe(some_rows(layout, 50, 2))
    return model


def slow_logits(
    model: RewardModel, b: int, layers: list[torch.Tensor], rows: JointRows, row: int, agent: int
) -> torch.Tensor:
    """[L]: the agent's logits, particle by particle."""
    block = model.layout.blocks[b]
    place = block.agent_of_slot.tolist().index(agent)
    action = rows.actions[b][row, agent]
    inputs = functional.one_hot(action.long(), block.action_dim) if block.discrete else action
    x = torch.cat([rows.observations[b].dense()[row, agent], inputs, torch.ones(1)]).double()
    logits = []
    for particle in range(model.settings.particles):
        h = x
        for number, layer in enumerate(layers):
            if number:
                h = torch.cat([torch.relu(h), torch.ones(1)])
            h = layer[place // block.slots, particle] @ h
        logits.append(h[0])
    return torch.stack(logits)


def double_layers(model: RewardModel, b: int) -> list[torch.Tensor]:
    arrays, count = model.state(), len(model.settings.hidden) + 1
    return [torch.tensor(arrays[f"{b}.{k}.parameter"]).double().requires_grad_() for k in range(count)]


def slow_kernel(x: torch.Tensor) -> torch.Tensor:
    """[..., L, d] → [..., L, L], with the median of all L × L squared distances."""
    distances = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    h = torch.quantile(distances.flatten(-2), 0.5, dim=-1) / (2 * math.log(x.shape[-2] + 1))
    return torch.exp(-distances / (2 * h + 1e-8)[..., None, None])


def slow_directions(
    model: RewardModel, b: int, agent: torch.Tensor, expert_rows: JointRows, expert: torch.Tensor
) -> list[torch.Tensor]:
    settings, block, layers = model.settings, model.layout.blocks[b], double_layers(model, b)
    window = JointRows.from_arrays(
        {n.removeprefix("memory."): a for n, a in model.state().items() if n.startswith("memory.")}, model.layout
    )
    moved = [torch.zeros_like(layer) for layer in layers]
    mass = torch.ones(block.groups, settings.particles, dtype=torch.float64)
    steps = settings.likelihood_episodes * model.layout.spec.episode_length
    for group in range(block.groups):
        logits, scores, log_p = [], [], torch.zeros((), dtype=torch.float64)
        members = [a for a in block.agent_of_slot.view(block.groups, -1)[group].tolist() if a >= 0]
        halves = ((window, agent, 1 - settings.label_smoothing), (expert_rows, expert, settings.label_smoothing))
        for rows, index, label in halves:
            places = [(r, a) for r in index.tolist() for a in members if rows.active[b][r, a]]
            for r, a in places:
                weight = steps / len(places)
                z = slow_logits(model, b, layers, rows, r, a)
                logits.append(z)
                scores.append((label - torch.sigmoid(z)) * weight)
                log_p = log_p + weight * (-label * functional.softplus(-z) - (1 - label) * functional.softplus(z)).sum()
        f, score = torch.stack(logits, -1), torch.stack(scores, -1).detach()
        if settings.kernel_scope == "function":
            log_p = (f * svgd_direction(f.detach(), score)).sum()
            mass[group] = slow_kernel(f.detach()).mean(dim=0)
        gradients = torch.autograd.grad(log_p, layers)
        for k, gradient in enumerate(gradients):
            moved[k][group] += gradient[group]
    if settings.prior_stddev:
        priors = [-layer.detach() / settings.prior_stddev**2 for layer in layers]
        moved = [m + mass[..., None, None] * prior for m, prior in zip(moved, priors, strict=True)]
    if settings.kernel_scope == "network":
        flat = [torch.cat([t.detach().flatten(2) for t in part], -1) for part in (layers, moved)]
        parts = svgd_direction(*flat).split([layer[0, 0].numel() for layer in layers], -1)
        # One kernel over weights and biases: the order of the numbers within a particle does not matter.
        return [part.view(layer.shape) for part, layer in zip(parts, layers, strict=True)]
    if settings.kernel_scope == "tensor":
        for layer, m in zip(layers, moved, strict=True):
            for columns in (slice(None, -1), slice(-1, None)):
                direction = svgd_direction(layer.detach()[..., columns].flatten(2), m[..., columns].flatten(2)).clone()
                m[..., columns] = direction.view(m[..., columns].shape)
    return moved
