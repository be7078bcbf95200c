"""Rows that nobody played: parts of the expert's, each from another moment."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.reward_server import particles
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.settings import RewardSettings
from tests.plain import seen_by

PARTS = (Part("place", 2), Part("home", 1), Part("hour", 1))
SPEC = EnvironmentSpec("town", (TypeSpec("a", 2, 4, 3, parts=PARTS), TypeSpec("b", 1, 4, 3, parts=PARTS)), 10)
SETTINGS = RewardSettings(particles=2, hidden=(16,), batch_size=40, updates=1, imagined=0.5, likelihood_episodes=50)
LAYOUT = Layout.of(SPEC, "type")


def demonstrations(rows: int = 60) -> JointRows:
    """Everybody is at place ±1 by the hour ±1, and has a home of its own."""
    hour = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    observations = torch.zeros(rows, 3, 4)
    observations[..., 0] = observations[..., 3] = hour.unsqueeze(1)
    observations[..., 1] = torch.arange(rows).unsqueeze(1) / 64
    observations[..., 2] = torch.tensor([0.25, 0.5, 0.75])
    nothing, all_there = torch.zeros(rows, 3, dtype=torch.int64), torch.ones(rows, 3, dtype=torch.bool)
    return JointRows(seen_by(LAYOUT, [observations]), [nothing], [all_there])


def model(settings: RewardSettings = SETTINGS) -> RewardModel:
    torch.set_num_threads(1)
    built = RewardModel(LAYOUT, demonstrations(), settings, 0)
    built.observe(demonstrations())  # agents who do as the expert does
    return built


def updated(built: RewardModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the discriminators learn from in one update, the agents' 40 joint rows first and then the expert's:
    observations [80, 3, 4], actions [80, 3], and whether a row of an agent counts [80, 3]."""
    with patch.object(particles, "backward", wraps=particles.backward) as called:
        built.update(0.0)
    called.assert_called_once()
    _, x, _, cotangent, *_ = called.call_args.args
    counts = (cotangent != 0).any(dim=1)
    x, counts = (LAYOUT.blocks[0].joint(part) for part in (x, counts))
    return x[..., :4], x[..., 4:7].argmax(dim=-1), counts


def test_parts_come_from_several_moments_and_homes_stay() -> None:
    rows, _, counts = updated(model())
    imagined, played = rows[:20], rows[20:40]
    assert torch.equal(rows[..., 2], torch.tensor([0.25, 0.5, 0.75]).expand(80, 3))
    assert torch.equal(played[..., 0], played[..., 3])
    against = (imagined[..., 0] != imagined[..., 3]).float().mean()
    assert 0.2 < against < 0.8
    assert ((imagined[..., 1] * 64 % 2 == 0) == (imagined[..., 0] == 1)).all()  # a part stays whole
    assert counts[:20].all()


def test_actions_are_the_experts_and_of_another_moment() -> None:
    expert, agents = demonstrations(), demonstrations()
    expert.actions[0][:] = (expert.observations[0].dense()[..., 0] > 0).long()
    agents.actions[0][:] = 2
    built = RewardModel(LAYOUT, expert, SETTINGS, 0)
    built.observe(agents)
    observations, actions, _ = updated(built)
    imagined, played = actions[:20], actions[20:40]
    assert (played == 2).all()
    assert (imagined < 2).all()
    fits = imagined == (observations[:20, :, 0] > 0)
    assert 0.2 < fits.float().mean() < 0.8


def test_who_was_not_there_at_one_of_the_moments_is_not_imagined() -> None:
    rows = demonstrations()
    rows.active[0][:, 1] = torch.arange(60) % 4 > 0  # one of the agents, for three quarters of the time
    built = RewardModel(LAYOUT, rows, replace(SETTINGS, imagined=1.0), 0)
    built.observe(rows)
    there = updated(built)[2][:40].float()
    assert there[:, [0, 2]].all()
    # Three parts and the action are of four moments.
    assert 0.1 < there[:, 1].mean() < 0.55


def test_what_nobody_did_becomes_known_to_be_wrong() -> None:
    """Agents only ever do right, and yet a place at the wrong hour has less reward than at the right one."""
    right, wrong = demonstrations(), demonstrations()
    wrong.observations[0].columns["own"][..., 3] *= -1
    for imagined, told in ((0.0, False), (0.5, True)):
        built = model(replace(SETTINGS, imagined=imagined, learning_rate=0.02, sees=("place", "hour")))
        for _ in range(150):
            built.update(0.0)
        apart = float((built.query(right)[0][0] - built.query(wrong)[0][0]).mean())
        assert (apart > 0.3) == told


def test_a_restart_imagines_the_same() -> None:
    one, other = model(), model()
    one.update(0.0)
    other.load_state(one.state())
    for built in (one, other):
        built.update(0.0)
    assert all((a == b).all() for a, b in zip(one.state().values(), other.state().values(), strict=True))


def test_an_environment_that_names_no_parts_is_refused() -> None:
    nameless = EnvironmentSpec("desert", (TypeSpec("a", 3, 4, 3),), 10)
    layout = Layout.of(nameless, "type")
    seen = seen_by(layout, [torch.zeros(5, 3, 4)])
    rows = JointRows(seen, [torch.zeros(5, 3, dtype=torch.int64)], [torch.ones(5, 3).bool()])
    with pytest.raises(InputError, match=r"--reward.imagined 0\.5 .* 'desert' names none for 'a'"):
        RewardModel(layout, rows, SETTINGS, 0)
