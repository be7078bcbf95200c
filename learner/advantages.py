"""How much better than expected it went: generalised advantages (Schulman et al. 2016), with the truncated weights of
V-trace (Espeholt et al. 2018) where the policy that acted is not the one that learns."""

from __future__ import annotations

import torch


def advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    continues: torch.Tensor,
    goes_on: torch.Tensor,
    weights: torch.Tensor | None,
    discount: float,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Â_t = Σ_k (γλ)^k (Π_{i=1..k} w_{t+i}) δ_{t+k} and the value's target V_t + w_t Â_t, with
    δ_t = r_t + γ (1 − terminated) V_{t+1} − V_t.

    With w = 1 this is GAE. With w = min(1, π/μ) the target is V-trace's v_t for c̄ = ρ̄ = 1 and traces that decay by λ
    besides; Â_t leaves its first weight out, which belongs to the loss that uses it.

    rewards [T, …]; values [T+1, …]; continues [T, …] bool: whether a value follows (not terminated, agent still alive;
    a truncated episode is bootstrapped); goes_on [T, …] bool: whether step t + 1 is of the same episode, played by the
    agent; weights [T, …] or None; discount γ; decay λ → two of [T, …].
    """
    temporal = rewards + discount * (continues * values[1:]) - values[:-1]
    carried = discount * decay * goes_on.to(rewards.dtype)
    result = torch.empty_like(rewards)
    ahead = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        torch.addcmul(temporal[t], carried[t], ahead, out=result[t])
        # The weight is carried back, and not kept in Â_t: there it belongs to the loss, which weighs the row once.
        ahead = result[t] if weights is None else weights[t] * result[t]
    weighted = result if weights is None else weights * result
    return result, values[:-1] + weighted


def normalised(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of each network [G, R] the values minus their mean, over their standard deviation; both over rows by `weight`
    [G, R], which adds up to 1 (or to 0: of a network without rows nothing is left)."""
    centred = (values - (weight * values).sum(-1, keepdim=True)) * (weight > 0)
    # The bound keeps a network whose rows are all alike from blowing up rounding.
    return centred / (weight * centred**2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
