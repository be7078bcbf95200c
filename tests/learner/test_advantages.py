"""Advantages against their sums, term by term, in float64."""

from __future__ import annotations

import pytest
import torch

from bm3il.learner.advantages import advantages, normalised

STEPS, EPISODES, DISCOUNT, DECAY = 7, 5, 0.9, 0.8


def slow(
    rewards: torch.Tensor,
    values: torch.Tensor,
    terminated: torch.Tensor,
    lengths: list[int],
    weights: torch.Tensor,
    e: int,
    t: int,
) -> tuple[float, float]:
    """Σ_k (γλ)^k (Π_{i=1..k} w_{t+i}) δ_{t+k} of one episode, and V-trace's target, both as they are written."""
    advantage, target, factor, trace = 0.0, float(values[t, e]), 1.0, 1.0
    for k in range(lengths[e] - t):
        s = t + k
        following = 0.0 if bool(terminated[s, e]) else float(values[s + 1, e])
        temporal = float(rewards[s, e]) + DISCOUNT * following - float(values[s, e])
        advantage += factor * temporal
        # Espeholt et al., Eq. 1: Σ γ^k (Π c_i) ρ_s δ_s with c_i = λ min(1, ratio), ρ = min(1, ratio)
        target += trace * float(weights[s, e]) * temporal
        trace *= DISCOUNT * DECAY * float(weights[s, e])
        if k + 1 < lengths[e] - t:
            factor *= DISCOUNT * DECAY * float(weights[s + 1, e])
    return advantage, target


@pytest.fixture
def episodes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(STEPS, EPISODES, generator=generator, dtype=torch.float64)
    values = torch.randn(STEPS + 1, EPISODES, generator=generator, dtype=torch.float64)
    weights = torch.rand(STEPS, EPISODES, generator=generator, dtype=torch.float64)
    lengths = [7, 7, 3, 1, 5]
    terminated = torch.zeros(STEPS, EPISODES, dtype=torch.bool)
    for e in (1, 2, 3):  # the others are truncated
        terminated[lengths[e] - 1, e] = True
    return rewards, values, terminated, lengths, weights


@pytest.mark.parametrize("lagging", [False, True])
def test_they_are_the_sums_of_the_papers(
    episodes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], torch.Tensor], lagging: bool
) -> None:
    rewards, values, terminated, lengths, weights = episodes
    played = torch.arange(STEPS).unsqueeze(1) < torch.tensor(lengths)
    goes_on = torch.cat([played[1:], torch.zeros_like(played[:1])])
    given = weights if lagging else None
    found, targets = advantages(rewards, values, ~terminated, goes_on, given, DISCOUNT, DECAY)
    for e in range(EPISODES):
        for t in range(lengths[e]):
            used = weights if lagging else torch.ones_like(weights)
            wanted = slow(rewards, values, terminated, lengths, used, e, t)
            assert (float(found[t, e]), float(targets[t, e])) == pytest.approx(wanted, abs=1e-12)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = torch.ones(20, 1, dtype=torch.float64)
    values = torch.full((21, 1), 1 / (1 - DISCOUNT), dtype=torch.float64)
    always = torch.ones(20, 1, dtype=torch.bool)
    found, targets = advantages(rewards, values, always, always, None, DISCOUNT, DECAY)
    torch.testing.assert_close(found, torch.zeros_like(found))
    torch.testing.assert_close(targets, values[:-1])


def test_normalised_values_have_mean_0_and_deviation_1_over_the_rows_that_count() -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4 + 7
    counted = torch.rand(3, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    counted[2] = False
    weight = counted.double() / counted.sum(-1, keepdim=True).clamp(min=1)
    result = normalised(values, weight)
    for g in (0, 1):
        assert float(result[g][counted[g]].mean()) == pytest.approx(0, abs=1e-12)
        assert float(result[g][counted[g]].std(correction=0)) == pytest.approx(1)
    assert not result[~counted].any()
