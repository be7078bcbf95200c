"""The losses of the actor-critic as pure functions of arrays; A is the last axis, leading axes are free."""

from __future__ import annotations

import torch

from protocol.layout import Layout


def soft_value(q: torch.Tensor, log_policy: torch.Tensor, temperature: float) -> torch.Tensor:
    """v(s) = Σ_a π(a|s) (Q(s,a,ã) − temperature · log π(a|s)): the bracket of Eq. 8, exact over the own action.

    q, log_policy: [..., A] → [...].
    """
    return (log_policy.exp() * (q - temperature * log_policy)).sum(-1)


def critic_target(
    reward: torch.Tensor, next_value: torch.Tensor, continues: torch.Tensor, discount: float
) -> torch.Tensor:
    """y = r + γ · (1 − terminated) · v(s') (Eq. 8, 10); `continues` is false where nothing follows. All [...]."""
    return reward + discount * continues * next_value


def critic_loss(q: torch.Tensor, action: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ weight · (Q(s,a,ã) − y)² (Eq. 10). q: [..., A]; action: [...] int64; target, weight: [...] → scalar."""
    taken = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return (weight * (taken - target) ** 2).sum()


def advantage(q: torch.Tensor, log_policy: torch.Tensor) -> torch.Tensor:
    """Q(s,a,ã) − Σ_a' π(a'|s) Q(s,a',ã): the counterfactual baseline of Eq. 13. [..., A] → [..., A]."""
    return q - (log_policy.exp() * q).sum(-1, keepdim=True)


def policy_loss(log_policy: torch.Tensor, q: torch.Tensor, temperature: float, weight: torch.Tensor) -> torch.Tensor:
    """Σ weight · Σ_a π(a|s) (temperature · log π(a|s) − advantage): its gradient is Eq. 13, exact over the own action.

    log_policy, q: [..., A] (no gradient flows into q); weight: [...] → scalar.
    """
    policy = log_policy.exp()
    gain = temperature * log_policy.detach() - advantage(q.detach(), log_policy.detach())
    return (weight * (policy * gain).sum(-1)).sum()


def cloning_loss(log_policy: torch.Tensor, action: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """−Σ weight · log π(a|s): behaviour cloning. log_policy: [..., A]; action, weight: [...] → scalar."""
    return -(weight * log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)).sum()


def entropy(log_policy: torch.Tensor) -> torch.Tensor:
    """−Σ_a π log π. [..., A] → [...]."""
    return -(log_policy.exp() * log_policy).sum(-1)


def row_weights(layout: Layout, active: list[torch.Tensor]) -> list[torch.Tensor]:
    """Per block [G, B, S]: 1/(active rows of the network) where the agent is active, else 0."""
    grids = [block.grid(rows).float() for block, rows in zip(layout.blocks, active, strict=True)]
    return [grid / grid.sum(dim=(1, 2), keepdim=True).clamp(min=1) for grid in grids]
