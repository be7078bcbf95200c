from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bm3il.reward_server.svgd import inverse_bandwidth, squared_distances, svgd_direction, svgd_forces, svgd_forces_of

torch.set_num_threads(1)


def slow_direction(x: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Eq. 5 in loops."""
    count = len(x)
    distances = [[float(((a - b) ** 2).sum()) for a in x] for b in x]
    h = float(np.median(distances)) / (2 * math.log(count + 1))
    direction = np.zeros_like(x)
    for moved in range(count):
        for j in range(count):
            k = math.exp(-distances[j][moved] / (2 * h + 1e-8))
            direction[moved] += k * score[j] + k * (x[moved] - x[j]) * 2 / (2 * h + 1e-8)
    return direction / count


@pytest.mark.parametrize("case", range(6))
def test_reference_cases(shared: Path, case: int) -> None:
    data = np.load(shared / "data/reference/svgd.npz", allow_pickle=False)
    x, score = torch.tensor(data[f"x{case}"]), -torch.tensor(data[f"g{case}"])
    expected = data[f"direction{case}"] if len(x) > 1 else score.numpy()  # one particle: plain gradient ascent
    np.testing.assert_allclose(svgd_direction(x, score).numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("particles", [2, 3, 4, 5, 8])
def test_batched_direction_equals_the_loops(particles: int) -> None:
    random = np.random.default_rng(particles)
    x, score = random.normal(size=(2, 3, particles, 7)), random.normal(size=(2, 3, particles, 7))
    expected = np.array(
        [[slow_direction(a, b) for a, b in zip(p, s, strict=True)] for p, s in zip(x, score, strict=True)]
    )
    np.testing.assert_allclose(svgd_direction(torch.tensor(x), torch.tensor(score)).numpy(), expected, atol=1e-12)


def test_one_particle_is_plain_gradient_ascent_to_the_bit() -> None:
    x, score = torch.randn(5, 1, 9), torch.randn(5, 1, 9)
    assert torch.equal(svgd_direction(x, score), score)


def test_median_is_the_true_one_with_the_zero_diagonal() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    # 16 squared distances: 4 × 0, then 1, 1, 4, 4, 9, 9, 16, 16, …: the middle two are 4 and 9
    h = 6.5 / (2 * math.log(5))
    assert float(inverse_bandwidth(squared_distances(x))) == pytest.approx(1 / (2 * h + 1e-8), rel=1e-12)


def test_forces_are_the_two_sums_and_the_mass_of_the_kernel() -> None:
    x, score = torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    still, mass = (svgd_direction(x, s) for s in (torch.zeros_like(x), torch.ones_like(x)))
    forces = svgd_forces(x, score)
    torch.testing.assert_close(forces.repulsion, still)  # no score: what is left is repulsion
    torch.testing.assert_close(forces.attraction, svgd_direction(x, score) - still)
    torch.testing.assert_close(forces.mass, (mass - still)[..., 0])  # of scores that are 1


def test_coinciding_particles_stay_finite_and_share_their_score() -> None:
    x, score = torch.ones(4, 3), torch.arange(12.0).view(4, 3)
    torch.testing.assert_close(svgd_direction(x, score), score.mean(0).expand(4, 3))


def test_close_particles_far_from_the_origin_keep_their_precision() -> None:
    offset = torch.randn(4, 50)
    exact = squared_distances(offset.double() * 1e-2)
    torch.testing.assert_close(squared_distances(offset * 1e-2 + 10).double(), exact, rtol=1e-3, atol=1e-7)


def test_particles_of_several_tensors_have_one_kernel_over_all_or_one_for_each() -> None:
    sizes = (3, 1, 6)
    x = [torch.randn(2, 4, d, dtype=torch.float64) for d in sizes]
    score = [torch.randn(2, 4, d, dtype=torch.float64) for d in sizes]
    joined = svgd_direction(torch.cat(x, -1), torch.cat(score, -1))
    together = [f.attraction + f.repulsion for f in svgd_forces_of(x, score, one_kernel=True)]
    torch.testing.assert_close(torch.cat(together, -1), joined)
    apart = [svgd_direction(*pair) for pair in zip(x, score, strict=True)]
    assert not torch.allclose(joined[..., :3], apart[0])
    for found, expected in zip(svgd_forces_of(x, score, one_kernel=False), apart, strict=True):
        torch.testing.assert_close(found.attraction + found.repulsion, expected)


def run_svgd(x: torch.Tensor, score: object, steps: int, rate: float) -> torch.Tensor:
    optimizer_sum = torch.zeros_like(x)
    for _ in range(steps):
        direction = svgd_direction(x, score(x))  # type: ignore[operator]
        optimizer_sum = 0.9 * optimizer_sum + 0.1 * direction**2
        x = x + rate * direction / (optimizer_sum.sqrt() + 1e-6)
    return x


def test_particles_recover_a_gaussian() -> None:
    """50 particles, from far off: mean within 0.1, variance within 15 % (the kernel's bias at this number)."""
    torch.manual_seed(0)
    mean, variance = 2.0, 1.5**2
    x = run_svgd(torch.randn(50, 1, dtype=torch.float64) - 5, lambda x: -(x - mean) / variance, 1500, 0.02)
    assert float(x.mean()) == pytest.approx(mean, abs=0.1)
    assert float(x.var()) == pytest.approx(variance, rel=0.15)


def test_particles_recover_both_modes_of_a_mixture() -> None:
    """½ N(−2, 1) + ½ N(2, 1): 40–60 % of the particles in each mode, mean within 0.3, variance 5 within 20 %."""
    torch.manual_seed(0)

    def score(x: torch.Tensor) -> torch.Tensor:
        right = torch.sigmoid(4 * x)
        return right * (2 - x) + (1 - right) * (-2 - x)

    x = run_svgd(torch.randn(50, 1, dtype=torch.float64), score, 1500, 0.02)
    assert 0.4 <= float((x > 0).double().mean()) <= 0.6
    assert float(x.mean()) == pytest.approx(0, abs=0.3)
    assert float(x.var()) == pytest.approx(5, rel=0.2)
