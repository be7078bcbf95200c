from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from protocol.errors import InputError, NumericalError, ProtocolError
from protocol.layout import JointRows, Layout, ParameterSharing
from protocol.specs import EnvironmentSpec, TypeSpec
from reward_server import particles
from reward_server.model import TrueRewards
from reward_server.particles import RewardModel, misfit, state_table
from reward_server.settings import RewardSettings
from reward_server.svgd import svgd_direction

torch.set_num_threads(1)

SPEC = EnvironmentSpec(
    "uneven", (TypeSpec("a", 3, 4, 5), TypeSpec("b", 2, 4, 5), TypeSpec("c", 2, 3, 2, discrete=False)), 10
)
SETTINGS = RewardSettings(particles=3, hidden=(8, 6), batch_size=16, window_steps=40, updates=2, label_smoothing=0.1)


def some_rows(layout: Layout, count: int, seed: int, shift: float = 0.0) -> JointRows:
    generator = torch.Generator().manual_seed(seed)
    rows = JointRows([], [], [])
    for block in layout.blocks:
        shape = (count, block.num_agents)
        rows.observations.append(torch.randn(*shape, block.observation_dim, generator=generator) + shift)
        if block.discrete:
            rows.actions.append(torch.randint(block.action_dim, shape, generator=generator))
        else:
            rows.actions.append(torch.rand(*shape, block.action_dim, generator=generator) * 2 - 1)
        rows.active.append(torch.rand(shape, generator=generator) < 0.8)
    return rows


def make_model(
    sharing: ParameterSharing = "type", settings: RewardSettings = SETTINGS, seed: int = 0, identity: bool = False
) -> RewardModel:
    layout = Layout.of(SPEC, sharing)
    model = RewardModel(layout, some_rows(layout, 30, 1, shift=1.0), settings, seed, agent_identity=identity)
    model.observe(some_rows(layout, 50, 2))
    return model


def slow_logits(
    model: RewardModel, b: int, layers: list[torch.Tensor], rows: JointRows, row: int, agent: int
) -> torch.Tensor:
    """[L]: the agent's logits, particle by particle."""
    block = model.layout.blocks[b]
    place = block.agent_of_slot.tolist().index(agent)
    action = rows.actions[b][row, agent]
    inputs = functional.one_hot(action, block.action_dim) if block.discrete else action
    x = torch.cat([rows.observations[b][row, agent], inputs, torch.ones(1)]).double()
    logits = []
    for particle in range(model.settings.particles):
        h = x
        for number, layer in enumerate(layers):
            if number:
                h = torch.cat([torch.relu(h), torch.ones(1)])
            h = layer[place // block.slots, particle] @ h
        logits.append(h[0])
    return torch.stack(logits)


def double_layers(model: RewardModel, b: int) -> list[torch.Tensor]:
    arrays, count = model.state(), len(model.settings.hidden) + 1
    return [torch.tensor(arrays[f"{b}.{k}.parameter"]).double().requires_grad_() for k in range(count)]


def slow_kernel(x: torch.Tensor) -> torch.Tensor:
    """[..., L, d] → [..., L, L], with the median of all L × L squared distances."""
    distances = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    h = torch.quantile(distances.flatten(-2), 0.5, dim=-1) / (2 * math.log(x.shape[-2] + 1))
    return torch.exp(-distances / (2 * h + 1e-8)[..., None, None])


def slow_directions(
    model: RewardModel, b: int, agent: torch.Tensor, expert_rows: JointRows, expert: torch.Tensor
) -> list[torch.Tensor]:
    settings, block, layers = model.settings, model.layout.blocks[b], double_layers(model, b)
    window = JointRows.from_arrays(
        {n.removeprefix("memory."): a for n, a in model.state().items() if n.startswith("memory.")}, model.layout
    )
    moved = [torch.zeros_like(layer) for layer in layers]
    mass = torch.ones(block.groups, settings.particles, dtype=torch.float64)
    steps = settings.likelihood_episodes * model.layout.spec.episode_length
    for group in range(block.groups):
        logits, scores, log_p = [], [], torch.zeros((), dtype=torch.float64)
        members = [a for a in block.agent_of_slot.view(block.groups, -1)[group].tolist() if a >= 0]
        halves = ((window, agent, 1 - settings.label_smoothing), (expert_rows, expert, settings.label_smoothing))
        for rows, index, label in halves:
            places = [(r, a) for r in index.tolist() for a in members if rows.active[b][r, a]]
            for r, a in places:
                weight = steps / len(places)
                z = slow_logits(model, b, layers, rows, r, a)
                logits.append(z)
                scores.append((label - torch.sigmoid(z)) * weight)
                log_p = log_p + weight * (-label * functional.softplus(-z) - (1 - label) * functional.softplus(z)).sum()
        f, score = torch.stack(logits, -1), torch.stack(scores, -1).detach()
        if settings.kernel_scope == "function":
            log_p = (f * svgd_direction(f.detach(), score)).sum()
            mass[group] = slow_kernel(f.detach()).mean(dim=0)
        gradients = torch.autograd.grad(log_p, layers)
        for k, gradient in enumerate(gradients):
            moved[k][group] += gradient[group]
    if settings.prior_stddev:
        priors = [-layer.detach() / settings.prior_stddev**2 for layer in layers]
        moved = [m + mass[..., None, None] * prior for m, prior in zip(moved, priors, strict=True)]
    if settings.kernel_scope == "network":
        flat = [torch.cat([t.detach().flatten(2) for t in part], -1) for part in (layers, moved)]
        parts = svgd_direction(*flat).split([layer[0, 0].numel() for layer in layers], -1)
        # One kernel over weights and biases: the order of the numbers within a particle does not matter.
        return [part.view(layer.shape) for part, layer in zip(parts, layers, strict=True)]
    if settings.kernel_scope == "tensor":
        for layer, m in zip(layers, moved, strict=True):
            for columns in (slice(None, -1), slice(-1, None)):
                direction = svgd_direction(layer.detach()[..., columns].flatten(2), m[..., columns].flatten(2)).clone()
                m[..., columns] = direction.view(m[..., columns].shape)
    return moved


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


@torch.no_grad()
def directions(model: RewardModel, b: int, agent: torch.Tensor, expert: torch.Tensor) -> list[torch.Tensor]:
    """Where a block's layers are sent by these rows of the memory and of the expert."""
    model._direct(b, model._differentiate(b, model._batch(b, agent, expert), None), None)
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


@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_reward_is_equation_9_for_every_active_agent(sharing: ParameterSharing) -> None:
    model = make_model(sharing)
    rows = some_rows(model.layout, 6, 3)
    rewards, deviations = model.query(rows, deviation=True)
    assert deviations is not None
    for b, block in enumerate(model.layout.blocks):
        layers = [layer.detach() for layer in double_layers(model, b)]
        for row in range(6):
            for agent in range(block.num_agents):
                z = slow_logits(model, b, layers, rows, row, agent)
                active = bool(rows.active[b][row, agent])
                values = functional.softplus(-z) if active else torch.zeros(3)
                assert float(rewards[b][row, agent]) == pytest.approx(float(values.mean()), abs=1e-5)
                assert float(deviations[b][row, agent]) == pytest.approx(float(values.std(correction=0)), abs=1e-5)


@pytest.mark.parametrize("scope", ["function", "tensor", "network", "none"])
def test_particles_learn_to_tell_agents_from_the_expert(scope: str) -> None:
    changes: dict[str, Any] = {
        "kernel_scope": scope,
        "updates": 150,
        "learning_rate": 1e-2,
        "likelihood_episodes": 10.0,
    }
    model = make_model(settings=dataclasses.replace(SETTINGS, **changes))
    figures = model.update(0.0)
    assert figures["accuracy_agent"] > 0.7
    assert figures["accuracy_expert"] > 0.7
    assert figures["loss"] < 0.6
    assert figures["particle_distance"] > 0
    agent, expert = (model.query(some_rows(model.layout, 100, 4, shift))[0][0] for shift in (0.0, 1.0))
    assert agent.mean() < expert.mean()  # −log D is high where the expert would be


def test_health_of_a_known_case() -> None:
    model = make_model()
    with torch.no_grad():
        for layer in (layer for layers in model._layers for layer in layers):
            layer.zero_()
        for layers in model._layers:
            layers[-1][..., -1] = torch.tensor([3.0, 3.0, -3.0]).view(1, 3, 1)  # logits of the three particles
    figures = make_figures(model)
    assert figures["accuracy_agent"] == pytest.approx(2 / 3)
    assert figures["accuracy_expert"] == pytest.approx(1 / 3)
    rewards = np.log1p(np.exp([-3.0, -3.0, 3.0]))
    assert figures["particle_deviation"] == pytest.approx(rewards.std(), rel=1e-5)
    p = 1 / (1 + np.exp(-3))
    assert figures["entropy"] == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), rel=1e-4)
    assert figures["particle_distance"] == pytest.approx((0 + 6 + 6) / 3, rel=1e-5)


def make_figures(model: RewardModel) -> dict[str, float]:
    model.settings = dataclasses.replace(model.settings, updates=1)
    return model.update(0.0)


def test_inactive_agents_change_nothing() -> None:
    first, second = make_model(), make_model()
    rows = some_rows(first.layout, 40, 5)
    other = JointRows(
        [torch.where(m[..., None], o, 7.0) for o, m in zip(rows.observations, rows.active, strict=True)],
        rows.actions,
        rows.active,
    )
    first.observe(rows)
    second.observe(other)
    assert first.update(0.0) == second.update(0.0)
    for name, array in first.state().items():
        assert name.startswith("memory.") or np.array_equal(array, second.state()[name]), name


def test_same_seed_same_bits_and_another_seed_others() -> None:
    first, second, third = make_model(), make_model(), make_model(seed=1)
    for model in (first, second, third):
        model.query(some_rows(model.layout, 3 if model is first else 11, 6))  # what is asked must leave no trace
        model.update(0.3)
    a, b, c = (model.state() for model in (first, second, third))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["0.0.parameter"], c["0.0.parameter"])


@pytest.mark.parametrize("memory", ["window", "run"])
def test_state_restores_everything(memory: str) -> None:
    settings = dataclasses.replace(SETTINGS, memory=memory)  # type: ignore[arg-type]
    model = make_model(settings=settings)
    model.observe(some_rows(model.layout, 33, 7))
    model.update(0.1)
    saved = model.state()
    assert {n: (a.dtype.name, a.shape) for n, a in saved.items()} == state_table(model.layout, SETTINGS)
    model.observe(some_rows(model.layout, 7, 8))
    figures = model.update(0.2)
    restored = make_model(settings=settings, seed=99)
    restored.load_state(saved)
    assert restored.version == 1
    restored.observe(some_rows(model.layout, 7, 8))
    assert restored.update(0.2) == figures
    assert all(np.array_equal(a, b) for a, b in zip(model.state().values(), restored.state().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("counters", -1), ("memory.observed", -1), ("0.0.parameter", np.nan), ("memory.0.actions", 99)]
)
def test_a_state_with_impossible_values_is_refused(name: str, value: float) -> None:
    saved = make_model().state()
    saved[name] = np.full_like(saved[name], value)
    with pytest.raises(ProtocolError):
        make_model().load_state(saved)


@pytest.mark.parametrize(("memory", "remembered"), [("window", 0), ("run", 20)])
def test_updates_draw_from_what_the_memory_keeps(memory: str, remembered: int) -> None:
    """80 rows into a memory of 40: the second half has all of a window, and about a half of a reservoir."""
    layout = Layout.of(SPEC, "type")
    settings = dataclasses.replace(SETTINGS, memory=memory, updates=60)  # type: ignore[arg-type]
    model = RewardModel(layout, some_rows(layout, 30, 1), settings, 0)
    first, second = some_rows(layout, 40, 2, shift=-100.0), some_rows(layout, 40, 3, shift=100.0)
    drawn: list[torch.Tensor] = []
    batch = model._batch
    model._batch = lambda b, agent, expert: [drawn.append(agent), batch(b, agent, expert)][1]  # type: ignore
    for rows in (first, second):
        model.observe(rows)
    model.update(0.0)
    sampled = model._memory.rows.observations[0][torch.cat(drawn).unique()].mean(dim=(1, 2))
    assert int((sampled < 0).sum()) == pytest.approx(remembered, abs=8 if remembered else 0)
    assert len(sampled) == 40


@pytest.mark.parametrize(("agents", "window_steps", "remembers"), [(3, 40, True), (7, 40, False), (3, 50, False)])
def test_another_run_is_adopted_also_with_other_numbers_of_agents(
    agents: int, window_steps: int, remembers: bool
) -> None:
    there = make_model(settings=dataclasses.replace(SETTINGS, memory="run"))
    there.update(0.0)
    types = (dataclasses.replace(SPEC.types[0], count=agents), *SPEC.types[1:])
    layout = Layout.of(dataclasses.replace(SPEC, types=types), "type")
    settings = dataclasses.replace(SETTINGS, memory="run", window_steps=window_steps, updates=7)
    here = RewardModel(layout, some_rows(layout, 30, 1), settings, seed=9)
    own = here.state()
    here.adopt(there.state())
    for name, array in there.state().items():
        if name.split(".")[0].isdigit() or (remembers and name.startswith("memory.")):
            np.testing.assert_array_equal(here.state()[name], array)
    assert here.state()["counters"].tolist() == [0, SETTINGS.updates]
    np.testing.assert_array_equal(here.state()["generator"], own["generator"])
    assert here._memory.observed == (50 if remembers else 0)
    here.observe(some_rows(layout, 5, 4))
    here.update(0.0)


def test_particles_that_do_not_fit_are_named() -> None:
    there, here = make_model(), make_model(settings=dataclasses.replace(SETTINGS, particles=2, hidden=(8,)))
    with pytest.raises(InputError, match="particles of layer 0 of block 0: 3 there, 2 here"):
        here.adopt(there.state())
    table = state_table(there.layout, SETTINGS)
    assert misfit(table, table) is None
    wider = state_table(there.layout, dataclasses.replace(SETTINGS, hidden=(9, 6)))
    assert misfit(wider, table) == "outputs of layer 0 of block 0: 9 there, 8 here"
    deeper = state_table(there.layout, dataclasses.replace(SETTINGS, hidden=(8, 6, 1)))
    assert misfit(deeper, table) == "groups of layer 3 of block 0: 2 there, 0 here"
    fewer = state_table(Layout.of(dataclasses.replace(SPEC, types=SPEC.types[:1]), "type"), SETTINGS)
    assert misfit(fewer, table) == "groups of layer 0 of block 0: 1 there, 2 here"
    assert misfit({"counters": ("int64", (1,))}, table) == "groups of layer 0 of block 0: 0 there, 2 here"


def test_learning_rate_falls_with_progress() -> None:
    settings = dataclasses.replace(SETTINGS, final_learning_rate=0.0)
    model = make_model(settings=settings)
    before = model.state()["0.0.parameter"]
    model.update(1.0)
    assert np.array_equal(before, model.state()["0.0.parameter"])


def test_what_is_not_finite_is_named() -> None:
    model = make_model()
    with torch.no_grad():
        model._layers[1][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="reward of block 1"):
        model.query(some_rows(model.layout, 5, 3))
    with pytest.raises(NumericalError, match="parameter of block 1"):
        model.update(0.0)


def test_without_rows_there_is_nothing_to_learn() -> None:
    layout = Layout.of(SPEC, "type")
    with pytest.raises(InputError, match="demonstrations"):
        RewardModel(layout, some_rows(layout, 0, 0), SETTINGS, 0)
    with pytest.raises(InputError, match="observed"):
        RewardModel(layout, some_rows(layout, 3, 0), SETTINGS, 0).update(0.0)


def test_the_environment_as_source_answers_the_true_rewards() -> None:
    layout = Layout.of(SPEC, "type")
    rows, model = some_rows(layout, 4, 0), TrueRewards()
    true = [torch.randn(active.shape) for active in rows.active]
    rewards, _ = model.query(rows, true_rewards=true)
    for b, active in enumerate(rows.active):
        assert torch.equal(rewards[b], true[b] * active)
    with pytest.raises(ProtocolError):
        model.query(rows)


def test_a_learned_reward_never_reads_a_true_one() -> None:
    model = make_model()
    rows = some_rows(model.layout, 4, 0)
    nan = [torch.full(active.shape, torch.nan) for active in rows.active]
    for with_nan, without in zip(model.query(rows, true_rewards=nan)[0], model.query(rows)[0], strict=True):
        assert torch.equal(with_nan, without)
