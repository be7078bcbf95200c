"""What a run has learned, as functions of plain arrays: of each type its policy and its reward, for other runtimes.

Observations are expanded here, [B, X_m, O_m], and products are plain ones: no tiles, nothing looked up. Networks that
agents share without telling them apart (`agents` is None) take any number X of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from bm3il.actors import gaussian
from bm3il.actors.policy import Policy
from bm3il.protocol.layout import Block, Layout
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.specs import ArrayTable
from bm3il.reward_server.discriminator import Activation
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.sees import Seen

Layer = tuple[torch.Tensor, torch.Tensor]
"""Weights [L, K, in, out] and biases [L, K, S, out] of L particles of K networks, with S biases for their agents."""


@dataclass(frozen=True)
class Function:
    """A function of the agents of type m.

    agents: how many of them it takes, None for any number.
    inputs, outputs: name → (dtype, shape without [B, X] in front), in the order of the module's.
    """

    m: int
    module: nn.Module
    agents: int | None
    inputs: ArrayTable
    outputs: ArrayTable


def policies(policy: Policy) -> Iterator[Function]:
    """π(a|s) of each type, block by block."""
    for block, networks in zip(policy.layout.blocks, policy.networks, strict=True):
        assert isinstance(networks, StackedMLP)
        width = (block.action_dim,)
        for m, which, agents in _types(policy.layout, block):
            pairs = zip(networks.weights, networks.biases, strict=True)
            layers = [(weight.detach()[None, which], bias.detach()[None, which]) for weight, bias in pairs]
            stack = _Networks(layers, "relu", policy.layout.spec.types[m].count)
            inputs: ArrayTable = {"observations": ("float32", (block.observation_dim,))}
            if block.discrete:
                names = "log_probabilities", "probabilities"
                module: nn.Module = _DiscretePolicy(stack)
                inputs |= {"action_masks": ("bool", width)}
            else:
                names, module = ("mean", "scale"), _ContinuousPolicy(stack)
            yield Function(m, module, agents, inputs, dict.fromkeys(names, ("float32", width)))


def rewards(model: RewardModel) -> Iterator[Function]:
    """r(s, a) of each type (Eq. 9), block by block, and its standard deviation over the particles."""
    for block, (architecture, layers) in zip(model.layout.blocks, model.discriminators, strict=True):
        for m, which, agents in _types(model.layout, block):
            cut = [(layer[which].transpose(0, 1).mT, architecture.split(k)) for k, layer in enumerate(layers)]
            stack = _Networks(
                [(layer[:, :, :split], layer[:, :, split:]) for layer, split in cut],
                architecture.activation,
                model.layout.spec.types[m].count,
            )
            module = _Reward(stack, architecture.seen, block.action_dim if block.discrete else 0)
            action: ArrayTable = {"actions": ("int64", ()) if block.discrete else ("float32", (block.action_dim,))}
            inputs: ArrayTable = {"observations": ("float32", (block.observation_dim,)), **action}
            yield Function(m, module, agents, inputs, {"reward": ("float32", ()), "deviation": ("float32", ())})


def _types(layout: Layout, block: Block) -> Iterator[tuple[int, slice, int | None]]:
    """The types of a block, the networks of each, and how many agents these take."""
    first = 0
    for group, m in enumerate(block.types):
        count = layout.spec.types[m].count
        if layout.parameter_sharing == "agent":
            yield m, slice(first, first + count), count
        else:
            yield m, slice(group, group + 1), count if block.identity_slots > 1 else None
        first += count


class _Networks(nn.Module):
    """L networks that X agents share, or L of each agent, and between layers an activation."""

    def __init__(self, layers: Sequence[Layer], activation: Activation, agents: int) -> None:
        super().__init__()
        self.activate = {"relu": torch.relu, "sigmoid": torch.sigmoid}[activation]
        self.shapes = [tuple(weight.shape) for weight, _ in layers]
        # Copies: a file would hold all of what a view is of, the networks of all types.
        self.weights = nn.ParameterList(nn.Parameter(_copied(weight), False) for weight, _ in layers)
        # K or S is 1, so these are those of the agents; there may be more slots than agents.
        biases = (bias.flatten(1, 2)[:, :agents, None] for _, bias in layers)
        self.biases = nn.ParameterList(nn.Parameter(_copied(bias), False) for bias in biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, X, in] → [L, B, X, out]."""
        batch, agents = x.shape[:2]
        h, particles = x.transpose(0, 1), 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            networks, width, out = self.shapes[k][1:]
            rows = h.reshape(particles, networks, -1, width)
            particles = self.shapes[k][0]
            h = torch.matmul(rows, weight).reshape(particles, agents, batch, out) + bias
            if k < len(self.shapes) - 1:
                h = self.activate(h)
        return h.transpose(1, 2)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class _DiscretePolicy(nn.Module):
    def __init__(self, networks: _Networks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, observations: torch.Tensor, action_masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log π(a|s) and π(a|s) [B, X, A]; of a forbidden action about −1e9 and exactly 0."""
        logits = self.networks(observations)[0].masked_fill(~action_masks, FORBIDDEN_LOGIT)
        log_policy = logits.log_softmax(-1)
        return log_policy, log_policy.exp()


class _ContinuousPolicy(nn.Module):
    def __init__(self, networks: _Networks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and σ [B, X, A] of what is squashed: a = tanh(μ + σ·ε)."""
        output, width = self.networks(observations)[0], self.networks.shapes[-1][-1] // 2
        return output[..., :width], output[..., width:].clamp(*gaussian.LOG_STD_RANGE).exp()


class _Reward(nn.Module):
    def __init__(self, networks: _Networks, seen: Seen, choices: int) -> None:
        """choices: how many discrete actions there are; 0 of continuous ones."""
        super().__init__()
        self.networks, self.seen, self.choices = networks, seen, choices

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation over the particles, [B, X] each."""
        parts = [observations[..., first:end] for first, end in self.seen.runs]
        if self.seen.action and self.choices:
            parts.append((actions.unsqueeze(-1) == torch.arange(self.choices)).to(observations.dtype))
        elif self.seen.action:
            parts.append(actions)
        reward = functional.softplus(-self.networks(torch.cat(parts, dim=-1))[..., 0])
        mean = reward.mean(0)
        return mean, (reward - mean).square().mean(0).sqrt()
