"""Squashed Gaussian actions, a = tanh(u) with u ~ N(μ, σ²): the policies of continuous actions.

The functions take the output of a policy network [..., 2·A]: μ and log σ side by side. Densities are those of a, over
the A independent numbers of an action vector.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

LOG_STD_RANGE = (-5.0, 2.0)
"""Below, an action half a unit off the centre has a log-density of minus thousands; above, nearly all draws are ±1."""
LARGEST_ACTION = 1 - 1e-6
"""A recorded ±1 is taken for this: the density of a squashed Gaussian has no value at its bounds."""


def draw(output: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A reparameterised action [..., A] and the logarithm of its density [...]."""
    mean, log_std = _parameters(output)
    noise = torch.randn(mean.shape, generator=generator).to(mean, non_blocking=True)
    free = mean + log_std.exp() * noise
    return torch.tanh(free), _log_density(free, noise, log_std)


def mode(output: torch.Tensor) -> torch.Tensor:
    """The action tanh(μ), [..., A]."""
    return torch.tanh(_parameters(output)[0])


def log_density(output: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Of given actions [..., A] in [-1, 1] → [...]."""
    mean, log_std = _parameters(output)
    free = torch.atanh(action.clamp(-LARGEST_ACTION, LARGEST_ACTION))
    return _log_density(free, (free - mean) * torch.exp(-log_std), log_std)


def divergence(output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ π_other) of two outputs [..., 2·A] → [...]: that of the Gaussians before the squashing, which is the same
    one-to-one map on both sides."""
    (mean, log_std), (other_mean, other_log_std) = _parameters(output), _parameters(other)
    apart = (torch.exp(2 * log_std) + (mean - other_mean) ** 2) * torch.exp(-2 * other_log_std)
    return (other_log_std - log_std + 0.5 * (apart - 1)).sum(-1)


def _parameters(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, log_std = output.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD_RANGE)


def _log_density(free: torch.Tensor, noise: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; μ, σ²) − log(1 − tanh² u), the second written so that it stays finite for a large |u|."""
    gaussian = -0.5 * (noise**2 + math.log(2 * math.pi)) - log_std
    squashing = 2 * (math.log(2) - free - functional.softplus(-2 * free))
    return (gaussian - squashing).sum(-1)
