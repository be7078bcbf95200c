"""Which type of agents listens to which: the attention of a critic, for people to look at."""

from __future__ import annotations

import numpy as np
import torch

from learner.critics import Critic
from protocol.layout import JointRows


def attention_by_type(critic: Critic, rows: JointRows) -> np.ndarray | None:
    """[M, M] the attention that agents of a type (row) pay to a type (column), mean over heads, rows and active agents.

    Attention to agents is summed over the agents of a type. None for a critic that weighs nothing.
    """
    weights = critic.attention(rows)
    if weights is None:
        return None
    layout, weights = critic.layout, weights.cpu()
    slots, entities, active = [], [], []
    for b, block in enumerate(layout.blocks):
        types = torch.tensor(block.types)
        of_agent = types[block.type_of_agent]
        slots.append(torch.cat([of_agent, torch.tensor([0])])[block.agent_of_slot])
        entities.append(of_agent if critic.context == "agents" else types)
        active.append(block.grid(rows.active[b]).movedim(0, 1).flatten(1, 2))
    counts = torch.cat(active, dim=1).to(weights)
    size = layout.spec.num_types
    totals = torch.zeros(size, size, dtype=weights.dtype)
    seen = torch.zeros(size, dtype=weights.dtype).index_add_(0, torch.cat(slots), counts.sum(dim=0))
    per_slot = (weights * counts.unsqueeze(-1)).sum(dim=0)
    per_type = torch.zeros(len(per_slot), size, dtype=weights.dtype).index_add_(1, torch.cat(entities), per_slot)
    totals.index_add_(0, torch.cat(slots), per_type)
    return (totals / seen.clamp(min=1).unsqueeze(1)).numpy()
