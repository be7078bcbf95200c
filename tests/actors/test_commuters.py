"""The scripted commuters, and that interactions matter where they live."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bm3il.actors.environments.berlin.environment import Berlin, berlin_of
from bm3il.actors.experts import commuters
from bm3il.actors.experts.commuters import CongestionAware, FreeFlow, StayHome
from bm3il.actors.experts.scripted import expert_for
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import Acts, rollout
from bm3il.protocol.environment import Environment
from bm3il.protocol.registry import make_environment

DAYS = 20
BASE = "berlin?scenario=berlin46&types=10&agents=50&sight=near"


def mean_return(berlin: Environment, policy: Acts) -> float:
    return float(rollout(berlin, policy, 3).returns().mean())


@pytest.mark.parametrize(("types", "agents"), [(5, 50), (10, 50), (15, 60)])
def test_interactions_matter(types: int, agents: int) -> None:
    berlin = Berlin(DAYS, types=types, agents=agents)
    random, expert = mean_return(berlin, UniformPolicy(berlin.spec)), mean_return(berlin, CongestionAware(berlin))
    assert (expert - mean_return(berlin, FreeFlow(berlin))) / (expert - random) >= 0.1


def test_on_empty_roads_the_free_flow_way_is_near_the_best() -> None:
    berlin = Berlin(DAYS, flow_scale=1e6)
    aware, naive = (mean_return(berlin, policy(berlin)) for policy in (CongestionAware, FreeFlow))
    assert abs(aware - naive) < 0.02 * (aware - mean_return(berlin, UniformPolicy(berlin.spec)))


def test_free_flow_is_at_work_in_time_where_roads_are_empty() -> None:
    berlin = Berlin(DAYS, flow_scale=1e6)
    trajectories = rollout(berlin, FreeFlow(berlin), 0)
    at_noon = 42
    places = np.concatenate(trajectories.observations, axis=2)[at_noon, ..., : berlin.scenario.num_locations]
    assert (places.argmax(axis=-1) == berlin.work).mean() > 0.99


def test_who_stays_home_is_right_outside_working_hours() -> None:
    berlin = Berlin(2)
    scenario = berlin.scenario
    minutes = scenario.day_start_minute + scenario.step_minutes * np.arange(1, scenario.steps + 1)
    working = (scenario.work_start_minute <= minutes) & (minutes < scenario.work_end_minute)
    expected = np.where(working, scenario.wrong_reward, scenario.right_reward).sum()
    assert mean_return(berlin, StayHome(berlin)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", ["incidents", "shifts", "demand"])
def test_the_expert_copes_with_days_that_differ(variant: str) -> None:
    berlin = Berlin(DAYS, f"berlin46-{variant}")
    assert mean_return(berlin, CongestionAware(berlin)) > mean_return(berlin, FreeFlow(berlin)) + 40


def test_the_same_expert_is_made_twice() -> None:
    berlin = Berlin(4)
    first, second = (rollout(berlin, expert_for(berlin.spec), 1) for _ in range(2))
    for mine, theirs in zip(first.actions, second.actions, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_greedy_choices_need_no_chance() -> None:
    berlin = Berlin(2)
    expert, now = CongestionAware(berlin), berlin.reset(0)
    choices = [expert.act(now, torch.Generator().manual_seed(seed), greedy=True) for seed in (0, 1)]
    for mine, theirs in zip(*choices, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ("closed=22,23", 370, 415),
        ("slip=0.05", 225, 280),
        ("demand=1.2", 390, 430),
        ("capacity=22:0.5,23:2", 405, 445),
    ],
)
def test_the_expert_plans_in_the_changed_world(
    options: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commuters, "EQUILIBRIUM_ROUNDS", 5)
    world = make_environment(f"{BASE}&{options}", DAYS)
    expert = expert_for(world.spec)
    assert isinstance(expert, CongestionAware)
    realised = mean_return(world, expert)
    assert least < realised < most
    # What it anticipates of the day is what comes: it knows the closed roads, the crowd and its own slips.
    anticipated = expert._value[0, expert._kind_of_agent, 0, berlin_of(world).home].mean()
    assert realised == pytest.approx(anticipated, abs=40)


def test_the_simple_commuters_find_their_ways() -> None:
    """Also where a slip has thrown them off their way, and round a closed road."""
    world = make_environment(f"{BASE}&closed=22,23&slip=0.05", DAYS)
    assert mean_return(world, FreeFlow(world)) > mean_return(world, UniformPolicy(world.spec)) + 400
    played = rollout(world, StayHome(world), 0)
    places = np.concatenate(played.observations, axis=2)[..., : berlin_of(world).scenario.num_locations]
    at_home = (places.argmax(axis=-1) == berlin_of(world).home).mean()
    # Who stayed where a slip led him would be at home in a fifth of the day: 1/p steps of a hundred.
    assert 0.4 < at_home < 0.9
