"""Mean fields (Eq. 6, 11) against loops."""

from __future__ import annotations

import pytest
import torch

from bm3il.learner.mean_field import mean_actions
from bm3il.protocol.layout import Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.learner.slow_reference import one_hot, random_rows, spec_of

UNEVEN = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))


@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_mean_of_the_active_agents_of_a_type(sharing: ParameterSharing) -> None:
    layout = Layout.of(UNEVEN, sharing)
    rows = random_rows(layout, 20, torch.Generator().manual_seed(0), alive=0.4)
    means, counts = mean_actions(layout.blocks[0], rows.actions[0], rows.active[0])
    for row in range(20):
        for number, members in enumerate([(0, 1, 2), (3,)]):
            alive = [x for x in members if rows.active[0][row, x]]
            total = sum((one_hot(int(rows.actions[0][row, x]), 3) for x in alive), start=torch.zeros(3))
            assert counts[row, number] == len(alive)
            torch.testing.assert_close(means[row, number], total / max(1, len(alive)))


def test_continuous_actions_are_averaged_as_they_are() -> None:
    spec = EnvironmentSpec("toy", (TypeSpec("a", 3, 2, 2, discrete=False),), 5)
    block = Layout.of(spec, "agent").blocks[0]
    actions = torch.tensor([[[1.0, 0.0], [0.5, -1.0], [9.0, 9.0]]])
    means, counts = mean_actions(block, actions, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(means, torch.tensor([[[0.75, -0.5]]]))
    assert counts.tolist() == [[2]]
