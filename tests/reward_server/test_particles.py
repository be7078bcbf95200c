from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bm3il.protocol import device
from bm3il.protocol.errors import InputError, NumericalError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.reward_server import particles
from bm3il.reward_server.model import TrueRewards
from bm3il.reward_server.particles import RewardModel, state_table
from tests.plain import seen_by
from tests.reward_server.small_model import (
    SETTINGS,
    SPEC,
    double_layers,
    make_model,
    slow_logits,
    some_rows,
)

torch.set_num_threads(1)


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
    assert figures["discriminator_loss"] < 0.6
    assert figures["particle_distance"] > 0
    agent, expert = (model.query(some_rows(model.layout, 100, 4, shift))[0][0] for shift in (0.0, 1.0))
    assert agent.mean() < expert.mean()  # −log D is high where the expert would be


def test_what_was_asked_before_the_particles_moved_is_forgotten() -> None:
    asked, fresh = make_model(), make_model()
    rows, before = some_rows(asked.layout, 20, 4), make_model().state()
    start = asked.query(rows)[0]
    for model in (asked, fresh):
        model.update(0.0)
    moved = asked.query(rows)[0]
    for found, expected, old in zip(moved, fresh.query(rows)[0], start, strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, old)
    asked.load_state(before)
    for found, expected in zip(asked.query(rows)[0], start, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scope", ["function", "tensor"])
def test_bfloat16_products_lead_nearly_where_float32_does(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_bfloat16", lambda where: True)
    settings = dataclasses.replace(SETTINGS, kernel_scope=scope, updates=60, batch_size=64)
    exact, rounded = (make_model(settings=dataclasses.replace(settings, precision=p)) for p in ("float32", "bfloat16"))
    rows = some_rows(exact.layout, 100, 4)
    for found, expected in zip(rounded.query(rows)[0], exact.query(rows)[0], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.02)
        assert not torch.equal(found, expected)
    losses = [[model.update(0.0)["discriminator_loss"] for _ in range(3)] for model in (exact, rounded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(layer.dtype == torch.float32 for layers in rounded._layers for layer in layers)


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
    assert figures["discriminator_entropy"] == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), rel=1e-4)
    assert figures["particle_distance"] == pytest.approx((0 + 6 + 6) / 3, rel=1e-5)


def make_figures(model: RewardModel) -> dict[str, float]:
    model.settings = dataclasses.replace(model.settings, updates=1)
    return model.update(0.0)


def test_inactive_agents_change_nothing() -> None:
    first, second = make_model(), make_model()
    rows = some_rows(first.layout, 40, 5)
    changed = [torch.where(m[..., None], o.dense(), 7.0) for o, m in zip(rows.observations, rows.active, strict=True)]
    other = JointRows(seen_by(first.layout, changed), rows.actions, rows.active)
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
    draw = model._draw

    def recorded(end: int, *shape: int) -> torch.Tensor:
        numbers = draw(end, *shape)
        if end == 40:  # of the memory, and not of the expert's 30
            drawn.append(numbers)
        return numbers

    model._draw = recorded  # type: ignore[method-assign]
    for rows in (first, second):
        model.observe(rows)
    model.update(0.0)
    sampled = model._memory.rows.observations[0].dense()[torch.cat(drawn).unique()].mean(dim=(1, 2))
    assert int((sampled < 0).sum()) == pytest.approx(remembered, abs=8 if remembered else 0)
    assert len(sampled) == 40


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


def test_the_learning_rate_falls_in_a_line() -> None:
    settings = dataclasses.replace(SETTINGS, final_learning_rate=0.2, learning_rate=1e-2, updates=1)
    moved = []
    for progress in (0.0, 0.5, 1.0):
        model = make_model(settings=settings)
        before = model.state()["0.0.parameter"]
        model.update(progress)
        # Adam's first step is as long as its rate.
        moved.append(float(np.abs(model.state()["0.0.parameter"] - before).max()))
    assert moved == pytest.approx([1e-2, 0.6e-2, 0.2e-2], rel=1e-2)


def test_of_a_memory_that_is_not_full_only_what_is_in_it_is_drawn() -> None:
    layout = Layout.of(SPEC, "type")
    states = []
    for window in (10, 40):
        model = RewardModel(layout, some_rows(layout, 30, 1), dataclasses.replace(SETTINGS, window_steps=window), 0)
        model.observe(some_rows(layout, 10, 2))
        model.update(0.0)
        states.append(model.state()["0.0.parameter"])
    np.testing.assert_array_equal(*states)


def test_a_long_query_is_answered_as_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(particles, "QUERY_ROWS", 12)  # of all slots: a few joint rows at a time
    model = make_model()
    rows = some_rows(model.layout, 23, 3)
    whole, deviations = model.query(rows, deviation=True)
    assert deviations is not None
    for row in range(23):
        one, apart = model.query(rows.select(torch.tensor([row])), deviation=True)
        assert apart is not None
        for b in range(2):
            torch.testing.assert_close(whole[b][row], one[b][0])
            torch.testing.assert_close(deviations[b][row], apart[b][0])
