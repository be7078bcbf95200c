"""The scripted commuters, and that interactions matter where they live."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.environments.berlin.environment import Berlin
from actors.experts.commuters import CongestionAware, FreeFlow, StayHome
from actors.experts.scripted import expert_for
from actors.policy import UniformPolicy
from actors.rollout import Acts, rollout

DAYS = 20


def mean_return(berlin: Berlin, policy: Acts) -> float:
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
    choices = [
        expert.act(now.observations, now.action_masks, torch.Generator().manual_seed(seed), greedy=True)
        for seed in (0, 1)
    ]
    for mine, theirs in zip(*choices, strict=True):
        np.testing.assert_array_equal(mine, theirs)
