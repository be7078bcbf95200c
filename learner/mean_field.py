"""Mean fields of agent types (Eq. 6, 11)."""

from __future__ import annotations

import torch
from torch.nn import functional

from protocol.layout import Block


def action_vectors(block: Block, actions: torch.Tensor) -> torch.Tensor:
    """Actions [B, N_b] (one-hot) or [B, N_b, A] (as they are) → action vectors [B, N_b, A] float32."""
    return functional.one_hot(actions, block.action_dim).float() if block.discrete else actions


def mean_actions(block: Block, actions: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ā_m, the mean over the active agents of type m of their action vectors.

    actions: [B, N_b] int64 or [B, N_b, A] float32. active: [B, N_b] bool.
    Returns ([B, M_b, A], [B, M_b] bool: whether the type has an active agent; its mean is 0 if not).
    """
    num_types = len(block.types)
    membership = functional.one_hot(block.type_of_agent.to(active.device), num_types).T.float()
    counts = active.float() @ membership.T
    if block.discrete:
        totals = _count_actions(block, actions, active)
    else:
        totals = membership @ (actions * active.unsqueeze(-1))
    return totals / counts.clamp(min=1).unsqueeze(-1), counts > 0


def _count_actions(block: Block, actions: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """[B, M_b, A]: how many active agents of each type took each action, without building one-hot rows."""
    batch, num_types, width = len(actions), len(block.types), block.action_dim
    cell = torch.arange(batch, device=actions.device).unsqueeze(1) * num_types + block.type_of_agent.to(actions.device)
    totals = torch.zeros(batch * num_types * width, device=actions.device)
    totals.index_add_(0, (cell * width + actions).flatten(), active.flatten().float())
    return totals.view(batch, num_types, width)
