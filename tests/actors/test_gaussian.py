"""Squashed Gaussian actions against numerical integration and finite differences."""

from __future__ import annotations

import pytest
import torch

from bm3il.actors import gaussian

OUTPUT = torch.tensor([0.3, -0.8, -0.4, 0.1], dtype=torch.float64)


def test_densities_integrate_to_one() -> None:
    free = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    action = torch.tanh(free)
    for mean, log_std in ((0.3, -0.4), (-1.0, 0.2)):
        output = torch.tensor([mean, log_std], dtype=torch.float64).expand(len(free), 2)
        density = gaussian.log_density(output, action.unsqueeze(-1)).exp()
        assert torch.trapezoid(density * (1 - action**2), free).item() == pytest.approx(1, abs=1e-3)


def test_a_draw_knows_its_density() -> None:
    action, density = gaussian.draw(OUTPUT.expand(50, 4), torch.Generator().manual_seed(0))
    assert action.shape == (50, 2)
    torch.testing.assert_close(gaussian.log_density(OUTPUT.expand(50, 4), action), density, rtol=1e-6, atol=1e-6)


def test_a_draw_is_reparameterised() -> None:
    """The gradient of the mean action with respect to μ and log σ, against finite differences."""

    def mean_action(output: torch.Tensor) -> torch.Tensor:
        return gaussian.draw(output.expand(200, 4), torch.Generator().manual_seed(1))[0].mean()

    assert torch.autograd.gradcheck(mean_action, OUTPUT.clone().requires_grad_())


def test_the_bounds_have_a_finite_density() -> None:
    extreme = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert torch.isfinite(gaussian.log_density(OUTPUT.expand(1, 4), extreme)).all()
    far = torch.tensor([[40.0, -40.0, 0.0, 0.0]])
    action, density = gaussian.draw(far, torch.Generator().manual_seed(0))
    assert torch.isfinite(density).all()
    assert (action.abs() <= 1).all()


def test_the_mode_is_the_squashed_mean() -> None:
    torch.testing.assert_close(gaussian.mode(OUTPUT), torch.tanh(OUTPUT[:2]))
