"""Berlin against the published rules, played agent by agent in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.environments.berlin.variants import VARIANTS
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment


def random_actions(now: TimeStep, random: np.random.Generator) -> list[np.ndarray]:
    return [(random.random(mask.shape) * mask).argmax(axis=-1) for mask in now.action_masks]


class SlowBerlin:
    """One environment of a batch, from the same conditions and the same chances."""

    def __init__(self, berlin: Berlin, env: int, conditions: dict[str, np.ndarray]) -> None:
        self.berlin, self.scenario, self.env, self.step_number = berlin, berlin.scenario, env, 0
        self.near = "sight=near" in berlin.spec.name
        self.conditions = {name: array[env] for name, array in conditions.items()}
        self.location = [int(place) for place in berlin.home]

    def minute(self) -> float:
        return self.scenario.day_start_minute + self.step_number * self.scenario.step_minutes

    def load(self, road: int) -> float:
        load = self.scenario.load_vehicles[road] * self.scenario.flow_scale / self.scenario.vehicles_per_agent
        load *= self.berlin.variant.load_factor
        if self.berlin.variant.incidents:
            begin, end = (self.conditions[f"slow_{name}_minute"][road] for name in ("from", "until"))
            if begin <= self.minute() < end:
                load *= self.berlin.variant.incident_load_factor
        return load

    def hours(self, agent: int) -> tuple[float, float]:
        if not self.conditions:
            return self.scenario.work_start_minute, self.scenario.work_end_minute
        return tuple(self.conditions[f"work_{name}_minute"][agent] for name in ("start", "end"))

    def step(self, actions: np.ndarray, chances: np.ndarray) -> list[float]:
        before = list(self.location)
        for agent, place in enumerate(before):
            chance = 1.0
            if place < self.scenario.num_roads:
                free = self.scenario.free_flow_minutes[place]
                minutes = max(1.0, max(free, before.count(place) / self.load(place) * free))
                chance = 1 - (1 - 1 / minutes) ** self.scenario.step_minutes
            if chances[agent] < chance:
                self.location[agent] = int(actions[agent])
        self.step_number += 1
        rewards = []
        for agent, place in enumerate(self.location):
            begin, end = self.hours(agent)
            due = self.berlin.work[agent] if begin <= self.minute() < end else self.berlin.home[agent]
            rewards.append(self.scenario.right_reward if place == due else self.scenario.wrong_reward)
        return rewards

    def observation(self, agent: int) -> np.ndarray:
        scenario, roads, places = self.scenario, self.scenario.num_roads, self.scenario.num_locations
        here = self.location[agent]
        own = np.eye(places)[here]
        counts = [self.location.count(place) for place in range(places)]
        fullness = [
            (n + 1) / (n + 1 + self.load(place)) if place < roads else n / len(self.location)
            for place, n in enumerate(counts)
        ]
        if self.near:
            fullness = [value * bool(scenario.allowed[here, place]) for place, value in enumerate(fullness)]
        facilities = np.eye(scenario.num_facilities)
        angle = 2 * math.pi * self.minute() / 1440
        day = scenario.steps * scenario.step_minutes
        begin, end = self.hours(agent)
        hours = [(m - scenario.day_start_minute) / day if end > begin else 0 for m in (begin, end)]
        return np.concatenate(
            [
                *(own, fullness, facilities[self.berlin.home[agent] - roads]),
                facilities[self.berlin.work[agent] - roads],
                [self.step_number / scenario.steps, math.sin(angle), math.cos(angle), *hours],
            ]
        )


@pytest.mark.parametrize("sight", ["all", "near"])
@pytest.mark.parametrize("scenario", ["berlin46", "berlin46-tight", "berlin46-incidents", "berlin46-demand"])
def test_the_rules(scenario: str, sight: str) -> None:
    envs, steps, seed = 3, 30, 5
    berlin = Berlin(envs, scenario, types=5, agents=50, sight=sight)
    now, random = berlin.reset(seed), np.random.default_rng(seed)
    actions_random = np.random.default_rng(1)
    slow = [SlowBerlin(berlin, env, berlin.draw_starts(seed)) for env in range(envs)]
    for step in range(steps):
        # Many agents on few roads: everybody leaves at once, so that roads slow down.
        actions = random_actions(now, actions_random)
        now = berlin.step(actions)
        chances = random.random((envs, 50), dtype=np.float32)
        joint = np.concatenate(actions, axis=1)
        seen = np.concatenate(now.observations, axis=1)
        rewards = np.concatenate(now.rewards, axis=1)
        for env, one in enumerate(slow):
            np.testing.assert_allclose(rewards[env], one.step(joint[env], chances[env]), rtol=1e-6)
            assert berlin.locations[env].tolist() == one.location
            if step % 7 == 0:
                for agent in (0, 17, 49):
                    np.testing.assert_allclose(seen[env, agent], one.observation(agent), rtol=0, atol=2e-6)


def test_crowds_slow_roads_down() -> None:
    berlin = Berlin(1, types=5, agents=50)
    empty = berlin.reset(0) and berlin.leave_chance[0]
    random = np.random.default_rng(0)
    now = berlin.step(random_actions(berlin.reset(0), random))
    full = berlin.leave_chance[0]
    roads = slice(0, berlin.scenario.num_roads)
    assert (full[roads] <= empty[roads] + 1e-6).all()
    assert (full[roads] < empty[roads] / 2).any()
    assert (full[berlin.scenario.num_roads :] == 1).all()
    assert berlin.counts.sum() == now.active[0].shape[0] * 50


def test_masks_are_the_network() -> None:
    berlin = Berlin(4, types=10, agents=50)
    now, random = berlin.reset(1), np.random.default_rng(1)
    for _ in range(20):
        now = berlin.step(random_actions(now, random))
        masks = np.concatenate(now.action_masks, axis=1)
        np.testing.assert_array_equal(masks, berlin.scenario.allowed[berlin.locations])
        assert np.take_along_axis(masks, berlin.locations[..., None], axis=2).all()


@pytest.mark.parametrize("name", ["berlin", "berlin?types=15&agents=60", "berlin?scenario=berlin46-shifts"])
def test_it_keeps_the_contract(name: str) -> None:
    assert check_environment(name) == 0


def test_the_largest_one_runs() -> None:
    berlin = Berlin(1, "berlin400", types=100, agents=5_000)
    assert [t.count for t in berlin.spec.types][:2] > [1, 1]
    now = berlin.reset(0)
    now = berlin.step(random_actions(now, np.random.default_rng(0)))
    assert sum(len(r[0]) for r in now.rewards) == 5_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_days_start_again_from_what_was_drawn(variant: str) -> None:
    berlin = Berlin(2, f"berlin46-{variant}", types=5, agents=50)
    starts = berlin.draw_starts(3)
    seen = np.concatenate(berlin.reset(3).observations, axis=1).copy()
    np.testing.assert_array_equal(np.concatenate(berlin.reset(3, starts).observations, axis=1), seen)
    if VARIANTS[variant].varies:
        other = np.concatenate(berlin.reset(4).observations, axis=1)
        if variant != "incidents":  # nobody sees them before the rush hour
            assert (other != seen).any()
        with pytest.raises(InputError, match="expected start states"):
            berlin.reset(0, {"rover_positions": np.zeros((2, 3))})


def test_absent_agents_are_right_at_home() -> None:
    berlin = Berlin(3, "berlin46-demand")
    berlin.reset(0)
    absent = np.concatenate(berlin.reset(0).observations, axis=1)[..., -1] == 0
    assert 0.15 < absent.mean() < 0.45
    total = np.zeros(absent.shape)
    for _ in range(100):
        now = berlin.step(
            [
                np.repeat(berlin.home[None, o : o + t.count], 3, 0)
                for o, t in zip(berlin.spec.offsets, berlin.spec.types, strict=True)
            ]
        )
        total += np.concatenate(now.rewards, axis=1)
    np.testing.assert_allclose(total[absent], 100 * berlin.scenario.right_reward, rtol=1e-5)
    assert (total[~absent] < 100).all()


def test_forbidden_actions_are_refused() -> None:
    berlin = Berlin(1)
    stay = [
        np.repeat(berlin.home[None, o : o + t.count], 1, 0)
        for o, t in zip(berlin.spec.offsets, berlin.spec.types, strict=True)
    ]
    berlin.reset(0)
    far = [a.copy() for a in stay]
    far[0][0, 0] = berlin.work[0]
    with pytest.raises(ValueError, match="no next one"):
        berlin.step(far)
    far[0][0, 0] = -1
    with pytest.raises(ValueError, match=r"0\.\.55"):
        berlin.step(far)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("berlin?scenario=berlin64", "did you mean berlin46"),
        ("berlin?types=400", r"1\.\.\d+ agent types"),
        ("berlin?types=10&agents=9", "9 agents cannot make 10 types"),
        ("berlin?flow_scale=-1", "flow_scale"),
        ("berlin?sight=far", "unknown sight 'far'"),
        ("berlin?scenario=none.json", "cannot read the scenario none.json"),
    ],
)
def test_what_is_not_offered_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_environment(name, 1)


def test_work_begins_and_ends_at_its_minute() -> None:
    berlin = Berlin(1, types=5, agents=10)
    scenario = berlin.scenario
    berlin.reset(0)
    for edge, before, after in (
        (scenario.work_start_minute, berlin.home, berlin.work),
        (scenario.work_end_minute, berlin.work, berlin.home),
    ):
        step, rest = divmod(edge - scenario.day_start_minute, scenario.step_minutes)
        assert rest == 0
        for number, where in ((int(step) - 1, before), (int(step), after)):
            rewards = np.concatenate(berlin.show(where[None], number).rewards, axis=1)
            assert (rewards == np.float32(scenario.right_reward)).all(), (edge, number)


def test_incidents_are_over_when_they_are_over() -> None:
    berlin, plain = Berlin(1, "berlin46-incidents"), Berlin(1)
    starts = berlin.draw_starts(3)
    berlin.reset(3, starts)
    plain.reset(3)
    begin, end = (starts[f"slow_{name}_minute"][0] for name in ("from", "until"))
    scenario = berlin.scenario
    minutes = scenario.day_start_minute + scenario.step_minutes * np.arange(scenario.steps)
    slowed = set()
    for step, minute in enumerate(minutes):
        for world in (berlin, plain):
            world.show(berlin.home[None], step)
        slow = berlin._fullness.ravel().take(berlin._cell) != plain._fullness.ravel().take(plain._cell)
        assert set(np.flatnonzero(slow[0])) == set(np.flatnonzero((begin <= minute) & (minute < end)))
        slowed |= set(np.flatnonzero(slow[0]))
    assert len(slowed) == 6
