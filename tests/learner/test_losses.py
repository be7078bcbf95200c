"""Each loss against its equation, action by action, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bm3il.learner import losses
from bm3il.protocol.layout import Layout
from tests.learner.slow_reference import spec_of

TEMPERATURE = 0.3
MASKED = -1e9


@pytest.fixture
def logits() -> torch.Tensor:
    """[3, 4, 5] of which every first action of every second row is forbidden."""
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, ::2, 0] = MASKED
    return values


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_soft_value_is_the_bracket_of_equation_8(logits: torch.Tensor, q: torch.Tensor) -> None:
    log_policy = logits.log_softmax(-1)
    value = losses.soft_value(q, logits, TEMPERATURE)
    for g in range(3):
        for r in range(4):
            expected = 0.0
            for a in range(5):
                p = math.exp(log_policy[g, r, a])
                if p > 0:
                    expected += p * (float(q[g, r, a]) - TEMPERATURE * math.log(p))
            assert float(value[g, r]) == pytest.approx(expected, rel=1e-9)


def test_nothing_follows_a_terminated_row_and_a_truncated_one_is_bootstrapped() -> None:
    target = losses.critic_target(
        torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0]), torch.tensor([False, True]), 0.9
    )
    torch.testing.assert_close(target, torch.tensor([1.0, 10.0]))


def test_critic_loss_is_the_weighted_square_at_the_action_taken(q: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    action = torch.randint(5, (3, 4), generator=generator)
    target, weight = (torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = sum(
        float(weight[g, r]) * (float(q[g, r, action[g, r]]) - float(target[g, r])) ** 2
        for g in range(3)
        for r in range(4)
    )
    q.requires_grad_()
    loss, gradient = losses.critic_loss(q.detach(), action, target, weight)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    slow = (weight * (q.gather(-1, action.unsqueeze(-1)).squeeze(-1) - target) ** 2).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(slow, q)[0])


def test_the_policy_loss_is_the_expectation_of_its_terms(logits: torch.Tensor, q: torch.Tensor) -> None:
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = 0.0
    for g in range(3):
        for r in range(4):
            p = [math.exp(v) for v in logits[g, r].log_softmax(-1)]
            baseline = sum(p[a] * float(q[g, r, a]) for a in range(5))
            for a in range(5):
                if p[a] > 0:
                    advantage = float(q[g, r, a]) - baseline
                    expected += float(weight[g, r]) * p[a] * (TEMPERATURE * math.log(p[a]) - advantage)
    assert float(losses.policy_loss(logits, q, TEMPERATURE, weight)[0]) == pytest.approx(expected, rel=1e-9)


def test_gradient_of_the_policy_loss_is_the_expected_score_function(logits: torch.Tensor, q: torch.Tensor) -> None:
    """∇ = E_a[∇log π(a|s) (temperature · log π(a|s) − advantage(a))], one drawn action after the other (Eq. 13)."""
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, gradient = losses.policy_loss(logits, q, TEMPERATURE, weight)
    expected = torch.zeros(3, 4, 5, dtype=torch.float64)
    for g in range(3):
        for r in range(4):
            p = [math.exp(v) for v in logits[g, r].log_softmax(-1)]
            baseline = sum(p[a] * float(q[g, r, a]) for a in range(5))
            for drawn in range(5):
                if p[drawn] == 0:
                    continue
                gain = TEMPERATURE * math.log(p[drawn]) - (float(q[g, r, drawn]) - baseline)
                for a in range(5):
                    score = (1.0 if a == drawn else 0.0) - p[a]
                    expected[g, r, a] += float(weight[g, r]) * p[drawn] * score * gain
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_a_forbidden_action_gets_no_gradient(logits: torch.Tensor, q: torch.Tensor) -> None:
    spoiled = q.clone()
    spoiled[:, ::2, 0] = 1e6  # whatever the critic thinks of it
    weight = torch.ones(3, 4, dtype=torch.float64)
    clean, dirty = (losses.policy_loss(logits, values, TEMPERATURE, weight)[1] for values in (q, spoiled))
    assert torch.equal(clean, dirty)
    assert (clean[:, ::2, 0] == 0).all()


def test_value_of_the_policy_loss_is_the_entropy() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25, 1e-30]]).log()
    loss, _ = losses.policy_loss(logits, torch.randn(1, 4), 0.5, torch.ones(1))
    assert float(loss) == pytest.approx(-0.5 * 1.5 * math.log(2), rel=1e-6)


def test_boltzmann_loss_is_the_divergence_from_equation_12(logits: torch.Tensor, q: torch.Tensor) -> None:
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss, gradient = losses.boltzmann_loss(logits, q, TEMPERATURE, weight)
    expected, log_policy = 0.0, logits.log_softmax(-1)
    for g in range(3):
        for r in range(4):
            allowed = [a for a in range(5) if logits[g, r, a] > MASKED / 2]
            total = sum(math.exp(float(q[g, r, a]) / TEMPERATURE) for a in allowed)
            for a in allowed:
                p = math.exp(float(q[g, r, a]) / TEMPERATURE) / total
                expected += float(weight[g, r]) * p * (math.log(p) - float(log_policy[g, r, a]))
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    variable = logits.clone().requires_grad_()
    losses.boltzmann_loss(variable, q, TEMPERATURE, weight)[0].backward()
    torch.testing.assert_close(gradient, variable.grad)
    assert (gradient[logits <= MASKED / 2] == 0).all()


def test_following_the_boltzmann_loss_ends_at_equation_12(logits: torch.Tensor, q: torch.Tensor) -> None:
    weight = torch.ones(3, 4, dtype=torch.float64)
    followed = logits.clone()
    for _ in range(3_000):
        followed -= losses.boltzmann_loss(followed, q, TEMPERATURE, weight)[1]
    wanted = (q / TEMPERATURE).masked_fill(logits <= MASKED / 2, MASKED).softmax(-1)
    torch.testing.assert_close(followed.softmax(-1), wanted, atol=1e-3, rtol=0)


def test_cloning_loss_is_the_weighted_likelihood(logits: torch.Tensor) -> None:
    log_policy = logits.log_softmax(-1)
    action, weight = torch.ones(3, 4, dtype=torch.int64), torch.full((3, 4), 0.5, dtype=torch.float64)
    expected = -0.5 * sum(float(log_policy[g, r, 1]) for g in range(3) for r in range(4))
    assert float(losses.cloning_loss(log_policy, action, weight)) == pytest.approx(expected, rel=1e-12)


def test_every_network_averages_over_its_own_active_rows() -> None:
    layout = Layout.of(spec_of((2, 3, 2), (1, 3, 2)), "type")
    active = torch.tensor([[True, False, True], [True, True, False]])
    (weights,) = losses.row_weights(layout, [active])
    third = 1 / 3
    torch.testing.assert_close(weights, torch.tensor([[[third, third], [0.0, third]], [[1.0, 0.0], [0.0, 0.0]]]))


def test_a_network_without_active_rows_has_weight_zero() -> None:
    layout = Layout.of(spec_of((1, 3, 2), (1, 3, 2)), "agent")
    (weights,) = losses.row_weights(layout, [torch.tensor([[True, False], [True, False]])])
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5]], [[0.0, 0.0]]]))


CLIP, ENTROPY, CLONE = 0.2, 0.05, 0.3


def test_the_clipped_loss_is_its_sum_over_rows_and_its_gradient_that_of_autograd(logits: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    action = torch.randint(1, 5, (3, 4), generator=generator)
    advantage = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    clone = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).masked_fill(logits == MASKED, MASKED)
    chosen = logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
    old = chosen + torch.tensor([-0.5, -0.1, 0.05, 0.6], dtype=torch.float64)  # ratios on both sides of both bounds
    free = logits.clone().requires_grad_()
    log_policy = free.log_softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        for r in range(4):
            ratio = torch.exp(log_policy[g, r, action[g, r]] - old[g, r])
            bounded = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage[g, r], bounded * advantage[g, r])
            entropy, apart = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for a in range(5):
                if logits[g, r, a] != MASKED:
                    p = log_policy[g, r, a].exp()
                    entropy = entropy - p * log_policy[g, r, a]
                    apart = apart + p * (log_policy[g, r, a] - clone[g, r].log_softmax(-1)[a])
            expected = expected - weight[g, r] * (gain + ENTROPY * entropy - CLONE * apart)
    expected.backward()
    loss, gradient, _ = losses.clipped_loss(logits, action, old, advantage, weight, CLIP, ENTROPY, CLONE, clone)
    assert free.grad is not None
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, free.grad)


def test_a_step_too_far_is_no_longer_followed() -> None:
    """Where the ratio has passed its bound to the side of the advantage; on the other side it is led back."""
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    _, gradient = losses.clipped_gain(log_ratio, advantage, CLIP, torch.ones(4, dtype=torch.float64))
    assert gradient[:2].tolist() == [0, 0]
    torch.testing.assert_close(gradient[2:], -(log_ratio[2:].exp() * advantage[2:]))
