"""The losses of the actor-critic as pure functions of arrays.

A is the last axis, of all actions or of an agent's options (`protocol.networks.options`); leading axes are free.
"""

from __future__ import annotations

import torch

from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT, log_softmax


def soft_value(q: torch.Tensor, logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """v(s) = Σ_a π(a|s) (Q(s,a,ã) − temperature · log π(a|s)): the bracket of Eq. 8, exact over the own action.

    q, logits (masked): [..., A] → [...].
    """
    log_policy = log_softmax(logits)
    return (q - temperature * log_policy).mul_(log_policy.exp()).sum(-1)


def critic_target(
    reward: torch.Tensor, next_value: torch.Tensor, continues: torch.Tensor, discount: float
) -> torch.Tensor:
    """y = r + γ · (1 − terminated) · v(s') (Eq. 8, 10); `continues` is false where nothing follows. All [...]."""
    return reward + discount * continues * next_value


def critic_loss(
    q: torch.Tensor, action: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · (Q(s,a,ã) − y)² (Eq. 10) and its gradient with respect to q.

    q: [..., A]; action: [...] int64; target, weight: [...] → (scalar, [..., A]).
    """
    index = action.unsqueeze(-1)
    error = q.gather(-1, index).squeeze(-1) - target
    gradient = torch.zeros_like(q).scatter_(-1, index, (2 * weight * error).unsqueeze(-1))
    return (weight * error**2).sum(), gradient


def policy_loss(
    logits: torch.Tensor, q: torch.Tensor, temperature: float | torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · Σ_a π(a|s) (temperature · log π(a|s) − advantage(a)) and its gradient with respect to the logits.

    The advantage Q(s,a,ã) − Σ_a' π(a'|s) Q(s,a',ã) has the counterfactual baseline of Eq. 13 and is held fixed. Its
    expectation is 0, so the value of the loss is −temperature · entropy; and the gradient, Eq. 13 exact over the own
    action, is π(a) (g(a) − Σ_a' π(a') g(a')) with g = temperature · log π − Q: any baseline drops out of it.

    logits (masked), q: [..., A]; weight: [...] → (scalar, [..., A]).
    """
    log_policy = log_softmax(logits)
    policy = log_policy.exp()
    entropy = -(policy * log_policy).sum(-1)
    # Last, since it writes over log π; the gradient is written out, as stacked networks go back without autograd.
    gain = torch.sub(log_policy.mul_(temperature), q)
    gradient = gain.sub_((policy * gain).sum(-1, keepdim=True)).mul_(policy).mul_(weight.unsqueeze(-1))
    return -temperature * (weight * entropy).sum(), gradient


def boltzmann_loss(
    logits: torch.Tensor, q: torch.Tensor, temperature: float | torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · KL(p ‖ π), p(a|s) ∝ exp(Q(s,a,ã)/temperature) the Boltzmann policy of Eq. 12 with β = 1/temperature,
    and its gradient with respect to the logits, π − p.

    Eq. 12 needs the others' actions, which whoever acts cannot know; the policy network is what p is distilled into.
    An action whose logit is forbidden (-1e9) has p = 0.

    logits (masked), q: [..., A]; weight: [...] → (scalar, [..., A]).
    """
    allowed = logits > FORBIDDEN_LOGIT / 2
    log_target = log_softmax((q / temperature).masked_fill(~allowed, FORBIDDEN_LOGIT))
    target, log_policy = log_target.exp(), log_softmax(logits)
    divergence = (target * (log_target - log_policy)).sum(-1)
    return (weight * divergence).sum(), (log_policy.exp() - target).mul_(weight.unsqueeze(-1))


def clipped_gain(
    log_ratio: torch.Tensor, advantage: torch.Tensor, clip: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """−Σ weight · min(ρÂ, clip(ρ, 1 ± ε)Â) with ρ = exp(log_ratio) (Schulman et al. 2017, Eq. 7), and its gradient with
    respect to log_ratio, which is 0 where the clipped branch is the smaller: there the policy has moved far enough.

    All [...] → (scalar, [...]).
    """
    ratio = log_ratio.exp()
    free, bound = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    # ∂(ρÂ)/∂log ρ = ρÂ. Where both branches are equal, within the clip, the gradient is the free one's.
    return -(weight * torch.minimum(free, bound)).sum(), -weight * free * (free <= bound)


def clipped_loss(
    logits: torch.Tensor,
    action: torch.Tensor,
    old_log_probability: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    clip: float,
    entropy_weight: float,
    clone_weight: float = 0.0,
    clone_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`clipped_gain` − entropy_weight · Σ weight · H(π) + clone_weight · Σ weight · KL(π ‖ π_clone), discrete actions.

    logits, clone_logits (masked): [..., A]; action [...] int64; old_log_probability, advantage, weight: [...].
    Returns the loss, its gradient with respect to the logits [..., A], and Σ weight · H(π).
    """
    log_policy = log_softmax(logits)
    policy = log_policy.exp()
    index = action.unsqueeze(-1)
    log_ratio = log_policy.gather(-1, index).squeeze(-1) - old_log_probability
    loss, d_chosen = clipped_gain(log_ratio, advantage, clip, weight)
    # Of Σ_a π(a) g(a) with g held as it is and Σ_a π(a) ∇g(a) = 0 (both terms are so): π(a) (g(a) − Σ_a' π(a') g(a')).
    surprise = entropy_weight * log_policy
    entropy = -(policy * log_policy).sum(-1)
    loss = loss - entropy_weight * (weight * entropy).sum()
    if clone_weight and clone_logits is not None:
        apart = log_policy - log_softmax(clone_logits)
        loss = loss + clone_weight * (weight * (policy * apart).sum(-1)).sum()
        surprise = surprise + clone_weight * apart
    centred = surprise - (policy * surprise).sum(-1, keepdim=True)
    gradient = policy * (weight.unsqueeze(-1) * centred - d_chosen.unsqueeze(-1))
    return loss, gradient.scatter_add_(-1, index, d_chosen.unsqueeze(-1)), (weight * entropy).sum()


def cloning_loss(log_policy: torch.Tensor, action: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """−Σ weight · log π(a|s): behaviour cloning. log_policy: [..., A]; action, weight: [...] → scalar."""
    return -(weight * log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)).sum()


def row_weights(layout: Layout, active: list[torch.Tensor]) -> list[torch.Tensor]:
    """Per block [G, S, B]: 1/(active rows of the network) where the agent is active, else 0."""
    grids = [block.grid(rows).float() for block, rows in zip(layout.blocks, active, strict=True)]
    # A network without active rows has weights of 0, and not NaN.
    return [grid / grid.sum(dim=(1, 2), keepdim=True).clamp(min=1) for grid in grids]
