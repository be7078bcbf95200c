"""Stein variational gradient descent (Liu & Wang 2016; the paper's Eq. 5) as pure functions.

    φ*(x_l) = (1/L) Σ_j [k(x_j, x_l) ∇_{x_j} log p(x_j) + ∇_{x_j} k(x_j, x_l)]
    k(x, y) = exp(−‖x − y‖² / 2h),   h = median of the L×L squared distances / (2 log(L + 1))

Every function is batched: each leading index is an SVGD of its own over its L particles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

SMALLEST_BANDWIDTH = 1e-8
"""Added to 2h, as the authors' code does: h is 0 where half of the particles coincide."""


class Forces(NamedTuple):
    """What moves particles [..., L, d].

    attraction: (1/L) Σ_j k(x_j, x_l) ∇ log p(x_j), [..., L, d].
    repulsion: (1/L) Σ_j ∇_{x_j} k(x_j, x_l), [..., L, d].
    mass: (1/L) Σ_j k(x_j, x_l), [..., L]: what the scores weigh together; 1 where all particles coincide.
    """

    attraction: torch.Tensor
    repulsion: torch.Tensor
    mass: torch.Tensor


def squared_distances(particles: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances between particles, [..., L, d] → [..., L, L], the diagonal exactly zero."""
    return _distances(particles - particles[..., :1, :])


def inverse_bandwidth(distances: torch.Tensor) -> torch.Tensor:
    """1/2h of the kernel from squared distances [..., L, L]: true median, zero diagonal included → [..., 1, 1]."""
    particles = distances.shape[-1]
    ordered = distances.flatten(-2).sort(dim=-1).values
    # Not torch.median, which takes the lower of two middle values (L even): the design asks for the true median.
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
    attraction, repulsion, _ = svgd_forces(particles, score)
    return attraction.add_(repulsion)


def svgd_forces(particles: torch.Tensor, score: torch.Tensor) -> Forces:
    """The two parts of `svgd_direction`, apart."""
    moved = particles - particles[..., :1, :]
    return _combine(*_coefficients(_distances(moved)), moved, score)


def svgd_forces_of(particles: Sequence[torch.Tensor], score: Sequence[torch.Tensor], one_kernel: bool) -> list[Forces]:
    """`svgd_forces` on particles that consist of several tensors, with a kernel for each, or with one over all.

    particles, score: [G, L, ...] each → forces of the same shapes.
    """
    moved = [(part - part[:, :1]).flatten(2) for part in particles]
    distances = torch.stack([_distances(part) for part in moved])
    if one_kernel:
        # Squared distances of the whole network are the sums of those of its tensors.
        distances = distances.sum(dim=0).expand_as(distances)
    parts = zip(*_coefficients(distances), moved, score, strict=True)
    forces = [(_combine(kernel, repulsion, x, s.flatten(2)), s.shape) for kernel, repulsion, x, s in parts]
    return [Forces(f.attraction.view(shape), f.repulsion.view(shape), f.mass) for f, shape in forces]


# Only differences of particles matter. The functions below take them `moved`, one of them to the origin: what is left
# to cancel in products is then of the size of the differences, and not of the particles.


def _distances(moved: torch.Tensor) -> torch.Tensor:
    products = moved @ moved.mT
    norms = products.diagonal(dim1=-2, dim2=-1)
    # From products: differences [L, L, d] would be L times as large as the particles. Rounding may leave less than 0.
    distances = (norms[..., :, None] + norms[..., None, :] - 2 * products).clamp_min_(0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def _coefficients(distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of every score and of every particle a direction holds, from squared distances [..., L, L]."""
    inverse = inverse_bandwidth(distances)
    kernel = torch.exp(-distances * inverse) / distances.shape[-1]
    # Σ_j ∇_{x_j} k(x_j, x_l) = Σ_j k(x_j, x_l) (x_l − x_j) / h: a combination of particles whose weights add up to 0.
    return kernel, (torch.diag_embed(kernel.sum(dim=-1)) - kernel) * (2 * inverse)


def _combine(kernel: torch.Tensor, repulsion: torch.Tensor, moved: torch.Tensor, score: torch.Tensor) -> Forces:
    return Forces(kernel @ score, repulsion @ moved, kernel.sum(dim=-1))
