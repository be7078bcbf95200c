"""Stein variational gradient descent (Liu & Wang 2016; the paper's Eq. 5) as pure functions.

    φ*(x_l) = (1/L) Σ_j [k(x_j, x_l) ∇_{x_j} log p(x_j) + ∇_{x_j} k(x_j, x_l)]
    k(x, y) = exp(−‖x − y‖² / 2h),   h = median of the L×L squared distances / (2 log(L + 1))

Every function is batched: each leading index is an SVGD of its own over its L particles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

SMALLEST_BANDWIDTH = 1e-8
"""Added to 2h, as the authors' code does: h is 0 where half of the particles coincide."""


def squared_distances(particles: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances between particles, [..., L, d] → [..., L, L], the diagonal exactly zero."""
    # Moved to one of them first: what is left to cancel in the products is then of the size of the distances.
    moved = particles - particles[..., :1, :]
    products = moved @ moved.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    distances = (norms[..., :, None] + norms[..., None, :] - 2 * products).clamp_min_(0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def inverse_bandwidth(distances: torch.Tensor) -> torch.Tensor:
    """1/2h of the kernel from squared distances [..., L, L]: true median, zero diagonal included → [..., 1, 1]."""
    particles = distances.shape[-1]
    ordered = distances.flatten(-2).sort(dim=-1).values
    middle = particles * particles // 2
    median = ordered[..., middle] if particles % 2 else (ordered[..., middle - 1] + ordered[..., middle]) / 2
    h = median / (2 * math.log(particles + 1))
    return 1 / (2 * h + SMALLEST_BANDWIDTH)[..., None, None]


def svgd_direction(particles: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The direction φ* in which each particle ascends.

    particles [..., L, d]; score [..., L, d] = ∇ log p at the particles → [..., L, d].
    One particle: k = 1 and its gradient 0, so the direction is the score itself, to the bit.
    """
    if particles.shape[-2] == 1:
        return score
    return _combine(*_coefficients(squared_distances(particles)), particles, score)


def svgd_directions(
    particles: Sequence[torch.Tensor], score: Sequence[torch.Tensor], one_kernel: bool
) -> list[torch.Tensor]:
    """`svgd_direction` of particles that consist of several tensors, with a kernel for each, or with one over all.

    particles, score: [..., L, d_k] each → the same shapes.
    """
    distances = torch.stack([squared_distances(part) for part in particles])
    if one_kernel:
        distances = distances.sum(dim=0).expand_as(distances)
    return [_combine(*parts) for parts in zip(*_coefficients(distances), particles, score, strict=True)]


def _coefficients(distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of every score and of every particle a direction holds, from squared distances [..., L, L]."""
    inverse = inverse_bandwidth(distances)
    kernel = torch.exp(-distances * inverse) / distances.shape[-1]
    # Σ_j ∇_{x_j} k(x_j, x_l) = Σ_j k(x_j, x_l) (x_l − x_j) / h: a combination of particles whose weights add up to 0.
    return kernel, (torch.diag_embed(kernel.sum(dim=-1)) - kernel) * (2 * inverse)


def _combine(
    kernel: torch.Tensor, repulsion: torch.Tensor, particles: torch.Tensor, score: torch.Tensor
) -> torch.Tensor:
    return (kernel @ score).add_(repulsion @ particles)
