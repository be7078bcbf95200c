"""The attention of many agents over few entities, and its hand-written gradient, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bm3il.learner import mixture as module
from bm3il.learner.mixture import Projected, Scene

ROWS, AGENTS, ENTITIES, HEADS, ACTIONS = 4, 3, 2, 2, 5
WIDTHS = (2, 12)  # one head at a time, and both together


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """H, with three rows in a tile and one in the next."""
    numbers = {2: 3 * AGENTS * 1, 12: 3 * AGENTS * 12}
    monkeypatch.setattr(module, "TILE_NUMBERS", numbers[request.param])
    return int(request.param)


def random_scene(width: int, own: bool, alike: bool = False) -> Scene:
    """Own types are 0, 0 and 1; in one row an agent sees nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projected = [Projected(draw(ROWS, ENTITIES, width), draw(ACTIONS, width) if own else None) for _ in range(2)]
    visible = torch.rand(ROWS, ENTITIES, 1 if alike else AGENTS, generator=generator) < 0.8
    visible[0, :, 0] = False
    member = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    share = torch.rand(ROWS, 1, AGENTS, generator=generator, dtype=torch.float64) * member
    if not own:
        return Scene(*projected, visible)
    return Scene(*projected, visible, share, torch.randint(ACTIONS, (ROWS, AGENTS), generator=generator))


def random_queries(width: int) -> torch.Tensor:
    return torch.randn(ROWS, AGENTS, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def seen_by(side: Projected, scene: Scene, row: int, agent: int, k: int) -> torch.Tensor:
    """The key or value of an entity without the agent's own action."""
    y = side.entities[row, k]
    if side.actions is None or scene.share is None or scene.own is None:
        return y
    return y + scene.share[row, k, agent] * (y - side.actions[scene.own[row, agent]])


def slow_mixture(queries: torch.Tensor, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mix` and `weights` give, one agent, head and entity at a time."""
    mixed, weights = torch.zeros_like(queries), torch.zeros(ROWS, AGENTS, ENTITIES, dtype=queries.dtype)
    width = queries.shape[2] // HEADS
    for row in range(ROWS):
        for agent in range(AGENTS):
            last = 0 if scene.visible.shape[2] == 1 else agent
            looked_at = [k for k in range(ENTITIES) if scene.visible[row, k, last]]
            for first in range(0, queries.shape[2], width):
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
def test_every_agent_mixes_what_it_sees(width: int, own: bool, alike: bool) -> None:
    scene, queries = random_scene(width, own, alike), random_queries(width)
    expected, weights = slow_mixture(queries, scene)
    torch.testing.assert_close(scene.mix(queries, HEADS), expected)
    assert scene.keys is not None
    torch.testing.assert_close(scene.weights(queries, HEADS), weights)


@pytest.mark.parametrize("own", [False, True])
def test_the_gradient_is_that_of_the_function(width: int, own: bool) -> None:
    scene, queries = random_scene(width, own), random_queries(width)
    assert scene.keys is not None
    sides = [scene.keys.entities, scene.values.entities]
    if scene.keys.actions is not None and scene.values.actions is not None:
        sides += [scene.keys.actions, scene.values.actions]

    def function(queries: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        keys, values = (Projected(*pair) for pair in (sides[::2], sides[1::2]))
        return dataclasses.replace(scene, keys=keys, values=values).mix(queries, HEADS)

    inputs = [x.requires_grad_() for x in (queries, *sides)]
    assert torch.autograd.gradcheck(function, inputs)


def test_queries_have_the_same_gradient_where_the_scene_is_a_constant(width: int) -> None:
    scene = random_scene(width, True)
    assert scene.keys is not None
    assert scene.keys.actions is not None
    found = []
    for keys in (scene.keys, scene.keys.map(lambda x: x.clone().requires_grad_())):
        queries = random_queries(width).requires_grad_()
        dataclasses.replace(scene, keys=keys).mix(queries, HEADS).square().sum().backward()
        found.append(queries.grad)
    assert torch.equal(*found)
    assert scene.keys.entities.grad is None


def test_what_all_weigh_the_same_is_averaged(width: int) -> None:
    scene, queries = dataclasses.replace(random_scene(width, True), keys=None), random_queries(width)
    zeros = dataclasses.replace(scene, keys=Projected(*(torch.zeros_like(x) for x in _arrays(scene.values))))
    torch.testing.assert_close(scene.mix(queries, HEADS), slow_mixture(queries, zeros)[0])


def _arrays(side: Projected) -> list[torch.Tensor]:
    return [side.entities] if side.actions is None else [side.entities, side.actions]
