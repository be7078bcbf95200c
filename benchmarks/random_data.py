"""Random rows, batches and episodes of any layout, drawn on the CPU: every device gets the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bm3il.learner.replay import Batch
from bm3il.learner.segments import Segments
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.observations import Observations

EPISODE = 100
"""Steps of an episode."""
LAST_BITS = 2.0**-22
"""How far observations are shaken: as far as products of a hundred terms round, in another order."""


def some_rows(layout: Layout, count: int, seed: int) -> JointRows:
    """Without masks, as the reward server sees them."""
    generator = torch.Generator().manual_seed(seed)
    rows = JointRows([], [], [])
    for block in layout.blocks:
        shape = (count, block.num_agents)
        own = torch.randn(*shape, block.observation_dim, generator=generator)
        rows.observations.append(Observations(block.form, {"own": own}))
        rows.actions.append(_some_actions(shape, block.action_dim, block.discrete, generator))
        rows.active.append(torch.rand(shape, generator=generator) < 0.9)
    return rows


def shaken(observations: list[Observations], seed: int) -> list[Observations]:
    if not seed:
        return observations
    generator = torch.Generator().manual_seed(seed)
    result = []
    for seen in observations:
        own = seen.columns["own"]
        own = own * (1 + LAST_BITS * torch.randn(own.shape, generator=generator))
        result.append(Observations(seen.form, seen.columns | {"own": own}))
    return result


def _some_actions(shape: tuple[int, ...], width: int, discrete: bool, generator: torch.Generator) -> torch.Tensor:
    if discrete:
        return torch.randint(width, shape, generator=generator)
    return torch.rand(*shape, width, generator=generator) * 1.8 - 0.9


def _some_masks(layout: Layout, shape: tuple[int, ...], actions: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Nine of ten actions are allowed, and those that were taken."""
    generator, masks = torch.Generator().manual_seed(5), []
    for b, block in enumerate(layout.blocks):
        mask = torch.rand(*shape, block.num_agents, block.action_dim, generator=generator) < 0.9
        mask[..., 0] = True
        if actions and block.discrete:
            mask[: len(actions[b])].scatter_(-1, actions[b].unsqueeze(-1), True)
        masks.append(mask)
    return masks


def _masked(observations: list[Observations], masks: list[torch.Tensor]) -> list[Observations]:
    pairs = zip(observations, masks, strict=True)
    return [Observations(seen.form, seen.columns | {"masks": mask}) for seen, mask in pairs]


def some_batch(layout: Layout, count: int) -> Batch:
    rows, following = some_rows(layout, count, 3), some_rows(layout, count, 4)
    generator = torch.Generator().manual_seed(6)
    rows.observations = _masked(rows.observations, _some_masks(layout, (count,), rows.actions))
    return Batch(
        rows=rows,
        next_observations=_masked(following.observations, _some_masks(layout, (count,))),
        next_active=following.active,
        rewards=[torch.rand(count, block.num_agents, generator=generator) for block in layout.blocks],
        terminated=torch.rand(count, generator=generator) < 0.01,
    )


def some_segments(layout: Layout, episodes: int) -> Segments:
    generator, shape = torch.Generator().manual_seed(8), (EPISODE, episodes)
    views, steps = some_rows(layout, (EPISODE + 1) * episodes, 9), some_rows(layout, EPISODE * episodes, 10)
    actions = [a.unflatten(0, shape) for a in steps.actions]
    seen = [o.map(lambda column: column.unflatten(0, (EPISODE + 1, episodes))) for o in views.observations]
    return Segments(
        _masked(seen, _some_masks(layout, (EPISODE + 1, episodes), actions)),
        [torch.ones(EPISODE + 1, episodes, block.num_agents, dtype=torch.bool) for block in layout.blocks],
        actions,
        [torch.full((*shape, block.num_agents), -1.0) for block in layout.blocks],
        [torch.rand(*shape, block.num_agents, generator=generator) for block in layout.blocks],
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape, dtype=torch.bool),
        torch.arange(EPISODE * episodes),
    )
