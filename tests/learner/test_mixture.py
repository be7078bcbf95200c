"""The attention of many agents over few entities, and its hand-written gradient, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from learner import mixture as module
from learner.mixture import Projected, Scene, attention, mixture

ROWS, AGENTS, ENTITIES, WIDTH, HEADS = 4, 3, 2, 4, 2


def random_scene(own: bool, alike: bool = False) -> Scene:
    """Own types are 0, 0 and 1; in one row an agent sees nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projected = [Projected(draw(ROWS, ENTITIES, WIDTH), draw(ROWS, AGENTS, WIDTH) if own else None) for _ in range(2)]
    visible = torch.rand(ROWS, ENTITIES, 1 if alike else AGENTS, generator=generator) < 0.8
    visible[0, :, 0] = False
    member = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    share = torch.rand(ROWS, 1, AGENTS, generator=generator, dtype=torch.float64) * member
    return Scene(*projected, visible, share if own else None)


def seen_by(side: Projected, scene: Scene, row: int, agent: int, k: int) -> torch.Tensor:
    """The key or value of an entity without the agent's own action."""
    y = side.entities[row, k]
    if side.own is None or scene.share is None:
        return y
    return y + scene.share[row, k, agent] * (y - side.own[row, agent])


def slow_mixture(queries: torch.Tensor, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mixture` and `attention` give, one agent, head and entity at a time."""
    mixed, weights = torch.zeros_like(queries), torch.zeros(ROWS, AGENTS, ENTITIES, dtype=queries.dtype)
    width = WIDTH // HEADS
    for row in range(ROWS):
        for agent in range(AGENTS):
            last = 0 if scene.visible.shape[2] == 1 else agent
            looked_at = [k for k in range(ENTITIES) if scene.visible[row, k, last]]
            for first in range(0, WIDTH, width):
                columns = slice(first, first + width)
                keys = {k: seen_by(scene.keys, scene, row, agent, k)[columns] for k in looked_at}
                powers = {k: math.exp(float(key @ queries[row, agent, columns])) for k, key in keys.items()}
                for k in looked_at:
                    alpha = powers[k] / sum(powers.values())
                    weights[row, agent, k] += alpha / HEADS
                    mixed[row, agent, columns] += alpha * seen_by(scene.values, scene, row, agent, k)[columns]
    return mixed, weights


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_every_agent_mixes_what_it_sees(own: bool, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(own, alike)
    queries = torch.randn(ROWS, AGENTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, weights = slow_mixture(queries, scene)
    monkeypatch.setattr(module, "TILE_NUMBERS", 3 * AGENTS * WIDTH // HEADS)  # two tiles, not alike
    torch.testing.assert_close(mixture(queries, scene, HEADS), expected)
    assert scene.keys is not None
    torch.testing.assert_close(attention(queries, scene.keys, scene, HEADS), weights)


@pytest.mark.parametrize("own", [False, True])
def test_the_gradient_is_that_of_the_function(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_NUMBERS", 3 * AGENTS * WIDTH // HEADS)
    scene = random_scene(own)
    assert scene.keys is not None
    queries = torch.randn(ROWS, AGENTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sides = [scene.keys.entities, scene.values.entities]
    if scene.keys.own is not None and scene.values.own is not None:
        sides += [scene.keys.own, scene.values.own]

    def function(queries: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        keys, values = (Projected(*pair) for pair in (sides[::2], sides[1::2]))
        return mixture(queries, dataclasses.replace(scene, keys=keys, values=values), HEADS)

    inputs = [x.requires_grad_() for x in (queries, *sides)]
    assert torch.autograd.gradcheck(function, inputs)


def test_what_all_weigh_the_same_is_averaged() -> None:
    scene = dataclasses.replace(random_scene(True), keys=None)
    zeros = dataclasses.replace(scene, keys=Projected(*(torch.zeros_like(x) for x in _arrays(scene.values))))
    queries = torch.ones(ROWS, AGENTS, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(mixture(queries, scene, HEADS), slow_mixture(queries, zeros)[0])


def _arrays(side: Projected) -> list[torch.Tensor]:
    return [side.entities] if side.own is None else [side.entities, side.own]
