"""The posterior of the particles, and where SVGD sends them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bm3il.protocol.layout import ParameterSharing
from bm3il.reward_server import particles
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.svgd import svgd_direction
from tests.reward_server.small_model import (
    SETTINGS,
    SPEC,
    make_model,
    slow_directions,
    some_rows,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("scope", ["function", "tensor", "network", "none"])
@pytest.mark.parametrize(("count", "episodes", "prior_stddev"), [(3, 1.0, 0.5), (1, 1.0, 0.5), (4, 7.5, 0.0)])
def test_directions_equal_the_slow_way(
    monkeypatch: pytest.MonkeyPatch,
    sharing: ParameterSharing,
    scope: str,
    count: int,
    episodes: float,
    prior_stddev: float,
) -> None:
    monkeypatch.setattr(particles, "TILE_ACTIVATIONS", 1)  # every group a tile of its own
    settings = dataclasses.replace(
        SETTINGS,
        kernel_scope=scope,  # type: ignore[arg-type]
        particles=count,
        likelihood_episodes=episodes,
        prior_stddev=prior_stddev,
    )
    model = make_model(sharing, settings)
    expert_rows = some_rows(model.layout, 30, 1, shift=1.0)
    agent, expert = torch.tensor([3, 39, 0, 3, 17]), torch.tensor([29, 0, 11, 12, 4])
    for b in range(2):
        expected = slow_directions(model, b, agent, expert_rows, expert)
        for found, direction in zip(directions(model, b, agent, expert), expected, strict=True):
            torch.testing.assert_close(found.double(), direction, rtol=1e-3, atol=1e-4)


def directions(model: RewardModel, b: int, agent: torch.Tensor, expert: torch.Tensor) -> list[torch.Tensor]:
    """Where an update that draws these rows of the memory and of the expert sends a block's layers; none moves."""
    model.settings = dataclasses.replace(model.settings, updates=1, batch_size=len(agent), learning_rate=0.0)
    drawn = iter([agent, expert])
    model._draw = lambda end, *shape: next(drawn)  # type: ignore[method-assign]
    model.update(0.0)
    return [layer.grad.clone() for layer in model._layers[b] if layer.grad is not None]


@pytest.mark.parametrize("scope", ["function", "tensor", "network", "none"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_particles_that_coincide_go_where_one_particle_goes(scope: str, count: int) -> None:
    agent, expert = torch.arange(6), torch.arange(6)
    models = [
        make_model(settings=dataclasses.replace(SETTINGS, kernel_scope=scope, particles=particles))  # type: ignore
        for particles in (1, count)
    ]
    with torch.no_grad():
        for alone, together in zip(*(model._layers for model in models), strict=True):
            for one, many in zip(alone, together, strict=True):
                many.copy_(one.expand_as(many))
    for b in range(2):
        for one, many in zip(*(directions(model, b, agent, expert) for model in models), strict=True):
            torch.testing.assert_close(many, one.expand_as(many), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["function", "tensor", "network", "none"])
def test_the_posterior_is_the_same_for_every_batch_size(scope: str) -> None:
    """Rows three times over are the same rows: likelihood, prior and repulsion keep their proportions."""
    model = make_model(settings=dataclasses.replace(SETTINGS, kernel_scope=scope))  # type: ignore[arg-type]
    agent, expert = torch.tensor([3, 39, 0]), torch.tensor([29, 0, 11])
    for b in range(2):
        once = directions(model, b, agent, expert)
        for few, many in zip(once, directions(model, b, agent.repeat(3), expert.repeat(3)), strict=True):
            torch.testing.assert_close(many, few, rtol=1e-3, atol=1e-4)


def test_the_likelihood_is_that_of_the_steps_of_so_many_episodes() -> None:
    """All logits 0, one particle: log D and log(1 − D) have the slopes 1/2 and −1/2 in the last bias, so that active
    agents alone leave steps / 2, whatever else there is."""
    settings = dataclasses.replace(
        SETTINGS, particles=1, label_smoothing=0.0, likelihood_episodes=2.0, prior_stddev=0.0
    )
    model = make_model(settings=settings)
    for part in model._expert.active:
        part.zero_()
    with torch.no_grad():
        for layer in (layer for layers in model._layers for layer in layers):
            layer.zero_()
    for b in range(2):
        bias = directions(model, b, torch.arange(8), torch.arange(8))[-1][..., -1]
        torch.testing.assert_close(bias, torch.full_like(bias, 2.0 * SPEC.episode_length / 2))


def test_repulsion_ratio_is_that_of_the_forces_and_0_without_a_kernel() -> None:
    settings = dataclasses.replace(SETTINGS, updates=1)
    model = make_model(settings=dataclasses.replace(settings, kernel_scope="tensor"))
    parameters = [[layer.detach().clone() for layer in layers] for layers in model._layers]
    scores: list[list[torch.Tensor]] = []
    differentiate = model._differentiate

    def recorded(b: int, *rest: Any) -> torch.Tensor:
        mass = differentiate(b, *rest)
        scores.append([gradient(layer) - layer.detach() for layer in model._layers[b]])
        return mass

    model._differentiate = recorded  # type: ignore[method-assign]
    found = model.update(0.0)["repulsion_ratio"]
    ratios = []
    for architecture, layers, layer_scores in zip(model._architectures, parameters, scores, strict=True):
        squares = torch.zeros(2, architecture.block.groups)
        for x, score in zip(architecture.tensors(layers), architecture.tensors(layer_scores), strict=True):
            x, score = x.flatten(2), score.flatten(2)
            repulsion = svgd_direction(x, torch.zeros_like(score))
            attraction = svgd_direction(x, score) - repulsion
            squares += torch.stack([repulsion.square().sum((1, 2)), attraction.square().sum((1, 2))])
        ratios.append((squares[0] / squares[1]).sqrt())
    assert found == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-3)
    for change in ({"kernel_scope": "none"}, {"particles": 1}):
        assert make_model(settings=dataclasses.replace(settings, **change)).update(0.0)["repulsion_ratio"] == 0  # type: ignore
    assert make_model(settings=settings).update(0.0)["repulsion_ratio"] > 0


def gradient(layer: torch.Tensor) -> torch.Tensor:
    assert layer.grad is not None
    return layer.grad.clone()
