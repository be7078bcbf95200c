"""Mean fields of agent types (Eq. 6, 11)."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from bm3il.protocol.layout import Block

MeanField = Literal["others", "all"]
"""Whose actions an agent sees the mean of, in its own type: the others', or everybody's, its own among them."""


def action_vectors(block: Block, actions: torch.Tensor) -> torch.Tensor:
    """Actions [B, N_b] (one-hot) or [B, N_b, A] (as they are) → action vectors [B, N_b, A], floating point."""
    return functional.one_hot(actions, block.action_dim).to(torch.get_default_dtype()) if block.discrete else actions


def mean_actions(block: Block, actions: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ā_m, the mean over the active agents of type m of their action vectors.

    Arguments and counts as in `total_actions`; returns ([B, M_b, A], counts); the mean of none is 0.
    """
    totals, counts = total_actions(block, actions, active)
    return totals / counts.clamp(min=1).unsqueeze(-1), counts


def total_actions(block: Block, actions: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over the active agents of each type of their action vectors.

    actions: [B, N_b] int64 or [B, N_b, A] float32. active: [B, N_b] bool.
    Returns ([B, M_b, A], [B, M_b] floating point: the number of active agents).
    """
    # Sums by index and not by a product with a membership matrix, which bfloat16 would round beyond 256 agents.
    type_of_agent = block.on(active.device, "type_of_agent")
    counts = torch.zeros(len(active), len(block.types), device=active.device)
    counts.index_add_(1, type_of_agent, active.to(counts.dtype))
    if block.discrete:
        return _count_actions(block, actions, active), counts
    totals = counts.new_zeros(*counts.shape, block.action_dim)
    return totals.index_add_(1, type_of_agent, (actions * active.unsqueeze(-1)).to(counts.dtype)), counts


def _count_actions(block: Block, actions: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """[B, M_b, A]: how many active agents of each type took each action, without building one-hot rows."""
    batch, num_types, width = len(actions), len(block.types), block.action_dim
    type_of_agent = block.on(actions.device, "type_of_agent")
    cell = torch.arange(batch, device=actions.device).unsqueeze(1) * num_types + type_of_agent
    totals = torch.zeros(batch * num_types * width, device=actions.device)
    # Counts of whole numbers: float32 adds them up exactly, in whatever order a GPU does.
    totals.index_add_(0, (cell * width + actions).flatten(), active.flatten().to(totals.dtype))
    return totals.view(batch, num_types, width)
