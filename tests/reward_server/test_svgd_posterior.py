"""SVGD as a sampler: its particles recover distributions whose moments are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from bm3il.reward_server.svgd import svgd_direction


def sampled(
    score_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int, rate: float
) -> torch.Tensor:
    """Particles [L, d] after AdaGrad steps in SVGD's direction."""
    particles, history = start.clone(), torch.zeros_like(start)
    for _ in range(steps):
        direction = svgd_direction(particles, score_of(particles))
        history += direction**2
        particles += rate * direction / (history.sqrt() + 1e-6)
    return particles


def test_a_gaussian_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.5, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    start = torch.randn(60, 2, generator=generator, dtype=torch.float64) * 0.3 - 3
    found = sampled(lambda x: -(x - mean) @ precision, start, 800, 0.5)
    torch.testing.assert_close(found.mean(dim=0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(found.T), covariance, atol=0.25, rtol=0)


def test_a_mixture_of_two_modes_is_recovered() -> None:
    means, weights, deviation = torch.tensor([-2.0, 2.0]).double(), torch.tensor([1 / 3, 2 / 3]).double(), 1.0

    def score(x: torch.Tensor) -> torch.Tensor:
        distance = x - means
        share = torch.softmax(weights.log() - distance**2 / (2 * deviation**2), dim=1)
        return -(share * distance).sum(dim=1, keepdim=True) / deviation**2

    start = 3 * torch.randn(60, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sampled(score, start, 1_000, 0.5)
    expected_mean = float((weights * means).sum())
    expected_variance = float((weights * means**2).sum()) + deviation**2 - expected_mean**2
    assert found.mean().item() == pytest.approx(expected_mean, abs=0.25)
    assert found.var().item() == pytest.approx(expected_variance, rel=0.15)
    assert (found > 0).double().mean().item() == pytest.approx(
        float(sum(w * 0.5 * math.erfc(-m / deviation / math.sqrt(2)) for w, m in zip(weights, means, strict=True))),
        abs=0.08,
    )


def test_one_particle_is_plain_gradient_ascent_to_the_bit() -> None:
    def score(x: torch.Tensor) -> torch.Tensor:
        return -torch.tanh(x - 0.7) * 1.3

    svgd = torch.randn(1, 5, generator=torch.Generator().manual_seed(2))
    ascent = svgd.clone()
    for _ in range(50):
        svgd = svgd + 0.1 * svgd_direction(svgd, score(svgd))
        ascent = ascent + 0.1 * score(ascent)
    assert torch.equal(svgd, ascent)
