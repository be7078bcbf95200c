"""Which type of agents listens to which: the attention of a critic, for people to look at."""

from __future__ import annotations

import numpy as np
import torch

from bm3il.learner.critics import Critic
from bm3il.protocol.layout import JointRows


def attention_by_type(critic: Critic, rows: JointRows) -> np.ndarray | None:
    """[M, M] the attention that agents of a type (row) pay to a type (column), mean over heads, rows and active agents.

    Attention to agents is summed over the agents of a type. None for a critic that weighs nothing.
    """
    weights = critic.attention(rows)
    if weights is None:
        return None
    layout, weights = critic.layout, weights.cpu()
    types = [torch.tensor(block.types) for block in layout.blocks]
    of_agents = [of_block[block.type_of_agent] for of_block, block in zip(types, layout.blocks, strict=True)]
    agents, entities = torch.cat(of_agents), torch.cat(of_agents if critic.context == "agents" else types)
    active = torch.cat([part.cpu() for part in rows.active], dim=1).to(weights)
    size = layout.spec.num_types
    seen = torch.zeros(size, dtype=weights.dtype).index_add_(0, agents, active.sum(dim=0))
    per_agent = (weights * active.unsqueeze(-1)).sum(dim=0)
    per_type = torch.zeros(len(agents), size, dtype=weights.dtype).index_add_(1, entities, per_agent)
    totals = torch.zeros(size, size, dtype=weights.dtype).index_add_(0, agents, per_type)
    # A type of which nobody was there pays no attention: 0, and not NaN.
    return (totals / seen.clamp(min=1).unsqueeze(1)).numpy()
