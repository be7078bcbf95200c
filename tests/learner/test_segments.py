"""Fresh episodes side by side: which steps count, and in which order they are shown."""

from __future__ import annotations

import numpy as np
import torch

from bm3il.learner.segments import Segments
from bm3il.protocol.layout import Layout
from bm3il.protocol.trajectories import Trajectories
from tests.learner.slow_reference import spec_of

LAYOUT = Layout.of(spec_of((2, 3, 4), (1, 5, 2), episode_length=4), "type")


def chunk(lengths: list[int], first: int) -> Trajectories:
    """Observations are 100·episode + step, numbered from `first`."""
    played = Trajectories.zeros(LAYOUT.spec, len(lengths))
    played.lengths[:] = lengths
    for m in range(2):
        number = 100 * (first + np.arange(len(lengths))) + np.arange(5)[:, None]
        played.observations[m][:] = number[:, :, None, None]
        played.active[m][:] = True
        played.log_probabilities[m][:] = -number[:4, :, None]
    return played


def test_chunks_lie_side_by_side_and_rows_follow_time() -> None:
    segments = Segments.of([chunk([4, 2], 0), chunk([3], 2)], LAYOUT)
    assert segments.num_steps == 9
    seen = segments.rows().observations[0].dense()[:, 0, 0].tolist()
    assert seen == [0, 100, 200, 1, 101, 201, 2, 202, 3]
    assert segments.observations[1].dense().shape == (5, 3, 1, 5)
    assert float(segments.log_probabilities[0][1, 2, 0]) == -201


def test_whole_episodes_are_shown_alike() -> None:
    whole = Segments.of([chunk([4, 4], 0)], LAYOUT)
    assert whole.rows().observations[1].dense()[:, 0, 0].tolist() == [0, 100, 1, 101, 2, 102, 3, 103]


def test_spread_is_the_inverse_of_rows() -> None:
    segments = Segments.of([chunk([4, 1], 0)], LAYOUT)
    rewards = [torch.arange(5.0).unsqueeze(1).expand(5, block.num_agents) + 1 for block in LAYOUT.blocks]
    spread = segments.spread(rewards)
    assert spread[0][..., 0].tolist() == [[1, 2], [3, 0], [4, 0], [5, 0]]
    assert torch.equal(spread[1][segments.played], rewards[1])
