"""The attention that people look at is the one that the critics use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bm3il.learner import critics
from bm3il.learner.attention import attention_by_type
from bm3il.learner.critics import Context, Critic
from bm3il.learner.few_actions import FewActions
from bm3il.learner.mixture import Scene
from bm3il.protocol.layout import Block, Layout, ParameterSharing
from tests.learner.slow_reference import agents_of, random_rows, spec_of

SPEC = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))


def build(context: Context, sharing: ParameterSharing, heads: int = 1, own: bool = True) -> Critic:
    return Critic(Layout.of(SPEC, sharing), context, 6, heads, own, torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", ["types", "agents"])
def test_the_mixture_is_made_with_these_weights(context: Context, sharing: ParameterSharing) -> None:
    critic = build(context, sharing)
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(2))
    assert critic.others is not None
    grids = [b.grid(x.dense()).flatten(1, 2) for b, x in zip(critic.layout.blocks, rows.observations, strict=True)]
    mixed = critic.contexts(critic.encode(grids), rows)[0]
    parts = [block.joint(part) for block, part in zip(critic.layout.blocks, mixed, strict=True)]
    weights = critic.attention(rows)
    assert weights is not None
    scenes = critic.others.scenes(rows)
    few = context == "types" and critics.FEW_ACTIONS > 0
    assert all(isinstance(scene, FewActions) == few for scene in scenes)
    values = torch.cat([_values(*seen) for seen in zip(critic.layout.blocks, scenes, strict=True)], 1)
    found = (weights.unsqueeze(-1) * values).sum(2)
    torch.testing.assert_close(found, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-4)


def _values(block: Block, scene: Scene | FewActions) -> torch.Tensor:
    """What every agent of a block sees of every entity, [B, N_b, K, H]."""
    if isinstance(scene, FewActions):
        values = torch.einsum("kar,kah->rkh", scene.shares, scene.values).unflatten(0, (block.groups, -1))
        return block.joint(values)
    values = scene.values.entities.unsqueeze(1)
    if scene.values.actions is None or scene.share is None:
        return values.expand(-1, block.num_agents, -1, -1)
    own = scene.values.actions[scene.own]
    return values + scene.share.mT.unsqueeze(-1) * (values - own.unsqueeze(2))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", ["types", "agents"])
def test_types_are_means_over_their_active_agents(context: Context, sharing: ParameterSharing) -> None:
    critic = build(context, sharing, heads=2)
    layout = critic.layout
    rows = random_rows(layout, 5, torch.Generator().manual_seed(3))
    weights, found = critic.attention(rows), attention_by_type(critic, rows)
    assert weights is not None
    assert found is not None
    places = [(b, place) for b, block in enumerate(layout.blocks) for place in range(block.num_agents)]
    targets = [
        block.types[int(m)]
        for block in layout.blocks
        for m in (block.type_of_agent if context == "agents" else range(len(block.types)))
    ]
    expected, seen = np.zeros((3, 3)), np.zeros(3)
    for agent, (b, place) in enumerate(places):
        own = layout.blocks[b].types[int(layout.blocks[b].type_of_agent[place])]
        for row in range(5):
            if rows.active[b][row, place]:
                seen[own] += 1
                for entity, target in enumerate(targets):
                    expected[own, target] += float(weights[row, agent, entity])
    np.testing.assert_allclose(found, expected / seen[:, None], atol=1e-5)
    assert len(agents_of(layout)) == len(places)


@pytest.mark.usefixtures("both_ways")
def test_what_is_left_out_gets_nothing() -> None:
    critic = build("types", "type", own=False)
    rows = random_rows(critic.layout, 5, torch.Generator().manual_seed(3))
    found = attention_by_type(critic, rows)
    assert found is not None
    np.testing.assert_array_equal(np.diag(found), 0)


@pytest.mark.parametrize("context", ["none", "uniform_types"])
def test_a_critic_without_weights_has_none(context: Context) -> None:
    critic = build(context, "type")
    assert attention_by_type(critic, random_rows(critic.layout, 2, torch.Generator().manual_seed(0))) is None
