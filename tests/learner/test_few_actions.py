"""The attention over types of few actions, and its hand-written gradient, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bm3il.learner import few_actions as module
from bm3il.learner.few_actions import FewActions

AGENTS, TYPES, ACTIONS, HEADS, WIDTH = 11, 2, 3, 2, 6

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four agents each, and of three."""
    monkeypatch.setattr(module, "TILE_NUMBERS", 4 * WIDTH)


def random_scene() -> FewActions:
    """One agent sees nothing."""
    generator = torch.Generator().manual_seed(0)
    tables = (torch.randn(TYPES, ACTIONS, WIDTH, generator=generator) for _ in range(2))
    shares = torch.rand(TYPES, ACTIONS, AGENTS, generator=generator)
    visible = torch.rand(TYPES, AGENTS, generator=generator) < 0.8
    visible[:, 0] = False
    return FewActions(*tables, shares / shares.sum(1, keepdim=True), visible)


def random_queries() -> torch.Tensor:
    return torch.randn(AGENTS, WIDTH, generator=torch.Generator().manual_seed(1))


def slow(queries: torch.Tensor, scene: FewActions, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `mix` and `weights` give, one agent, head and type at a time."""
    mixed, weights = torch.zeros_like(queries), torch.zeros(AGENTS, TYPES)
    for agent in range(AGENTS):
        looked_at = [k for k in range(TYPES) if scene.visible[k, agent]]
        shares = scene.shares[:, :, agent]
        for first in range(0, WIDTH, WIDTH // HEADS):
            columns = slice(first, first + WIDTH // HEADS)
            key, value = (
                {
                    k: torch.stack([shares[k, a] * table[k, a, columns] for a in range(ACTIONS)]).sum(0)
                    for k in looked_at
                }
                for table in (keys, scene.values)
            )
            powers = {k: math.exp(float((key[k] * queries[agent, columns]).sum())) for k in looked_at}
            for k in looked_at:
                alpha = powers[k] / sum(powers.values())
                weights[agent, k] += alpha / HEADS
                mixed[agent, columns] += alpha * value[k]
    return mixed, weights


def test_every_agent_mixes_what_it_sees() -> None:
    scene, queries = random_scene(), random_queries()
    assert scene.keys is not None
    mixed, weights = slow(queries, scene, scene.keys)
    torch.testing.assert_close(scene.mix(queries, HEADS), mixed)
    torch.testing.assert_close(scene.weights(queries, HEADS), weights)


def test_what_all_weigh_the_same_is_averaged() -> None:
    scene, queries = random_scene(), random_queries()
    alike = dataclasses.replace(scene, keys=None)
    torch.testing.assert_close(alike.mix(queries, HEADS), slow(queries, scene, torch.zeros_like(scene.values))[0])


def test_the_gradient_is_that_of_the_function() -> None:
    scene = random_scene()

    def function(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return dataclasses.replace(scene, keys=keys, values=values).mix(queries, HEADS)

    assert scene.keys is not None
    inputs = [x.requires_grad_() for x in (random_queries(), scene.keys, scene.values)]
    assert torch.autograd.gradcheck(function, inputs)


def test_of_nobody_there_is_nothing() -> None:
    scene = random_scene()
    assert scene.keys is not None
    tables = [table.requires_grad_() for table in (scene.keys, scene.values)]
    nobody = FewActions(*tables, scene.shares[:, :, :0], scene.visible[:, :0])
    mixed = nobody.mix(random_queries()[:0], HEADS)
    mixed.sum().backward()
    assert mixed.shape == (0, WIDTH)
    assert all(table.grad is not None and not table.grad.any() for table in tables)
