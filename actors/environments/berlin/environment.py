"""Berlin: commuters on a road network that slows down as it fills (§5.2 of the paper).

The paper's environment was never released; this is a documented reconstruction on real data. Each agent stands for a
number of vehicles, and has a type: where it lives and where it works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bm3il.actors.environments.berlin.changes import Changes, plain_text
from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.actors.environments.berlin.scenario_file import SUFFIX, load_scenario
from bm3il.actors.environments.berlin.variants import split_variant
from bm3il.protocol.environment import AMBIGUOUS, IMPOSSIBLE, Environment, Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.observations import forms
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

MINUTES_OF_DAY = 1440.0
TIME_COLUMNS = 5
SIGHTS = ("all", "near")
PURPOSE = ("place.facility", "home", "work", "time", "hours")
"""What commuters are after, a place at an hour; which roads they take there, and how full these are, is how."""


class Berlin:
    """E days of N commuters on K locations, roads 0..R−1 and facilities R..K−1.

    Action: the next location, or the present one to stay. In a step of Δ minutes an agent leaves a road that n agents
    are on with probability 1 − (1 − 1/τ)^Δ, τ = max(T₀, n/load · T₀) minutes, at least 1; a facility at once. After
    the move it gets `right_reward` if it is where the hour says that it should be (at work in working hours, else at
    home) and `wrong_reward` if not. A day is truncated after `steps` steps.

    Observation, 2K + 2F + 5 wide: own location one-hot (`place`, K); how full each location is (`loads`, K); own `home`
    and `work` one-hot (F each); the part of the day that is over, sine and cosine of the hour (`time`), and when own
    working hours begin and end as parts of the day, 0 and 0 on a day off (`hours`). How full: of a road
    (n + 1)/(n + 1 + load), which grows with its count n and is about a half where it begins to slow down; of a
    facility n/N, N as in the world that is changed.

    Variants and `changes` make another world of the same shapes; its spec names the one that they change.
    `allowed` [K, K] bool: whether the second location is a possible next one of the first; staying is.

    Start states, where days differ (see `variants`): `work_start_minute` and `work_end_minute` [E, N],
    `slow_from_minute` and `slow_until_minute` [E, R]; where they do not, there are none.
    """

    def __init__(
        self,
        num_envs: int,
        scenario: str = "berlin46",
        types: int = 10,
        agents: int = 50,
        flow_scale: float = 0.0,
        sight: str = "all",
        closed: str = "",
        capacity: str = "",
        demand: float = 1.0,
    ) -> None:
        """scenario: a name, or a file, perhaps with a variant behind it: `berlin46-incidents`.
        flow_scale: how strongly agents slow each other down, smaller is stronger; 0 takes the scenario's own.
        sight: `all`, or `near`: how full a location is shows only to those who are there or could go there next.
        closed, capacity, demand: see `changes`.
        Raises InputError for what the scenario does not offer, and for closed roads without which nobody of a type
        could get to work or home.
        """
        if num_envs < 1:
            raise InputError(f"berlin: expected num_envs ≥ 1, got {num_envs}")
        if not flow_scale >= 0:
            raise InputError(f"berlin: flow_scale must be at least 0, got {flow_scale}")
        if sight not in SIGHTS:
            raise unknown_name("sight", sight, SIGHTS)
        name, self.variant = split_variant(scenario)
        self.scenario, self.num_envs = load_scenario(name), num_envs
        self.changes = Changes.parse(self.scenario, closed, capacity, demand)
        self.load_agents = self.scenario.load_agents * self.variant.load_factor
        self.load_agents = self.load_agents * self.changes.load_factors(self.scenario)
        if flow_scale:
            self.load_agents = self.load_agents * (flow_scale / self.scenario.flow_scale)
        commuters = self.changes.crowd(self.scenario, types, agents)
        options = f"types={types}&agents={agents}" + (f"&flow_scale={plain_text(flow_scale)}" if flow_scale else "")
        options += f"&sight={sight}" if sight != "all" else ""
        base = f"berlin?scenario={name}&{options}"
        changed = f"berlin?scenario={scenario}&{options}{self.changes.options}"
        self.allowed = self.changes.allowed(self.scenario)
        self.spec = _spec(changed, base, self.scenario, commuters, sight, self.allowed)
        counts = [count for _, _, count in commuters]
        first = self.scenario.num_roads
        self.home = np.repeat([first + home for home, _, _ in commuters], counts)
        self.work = np.repeat([first + work for _, work, _ in commuters], counts)
        self._leaving, self._fullness = _tables(
            self.scenario, self.load_agents, self.variant.incident_load_factor, len(self.home), agents
        )
        self._allocate()

    @staticmethod
    def with_files(option: str, value: str, change: Callable[[str], str]) -> str:
        """See `protocol.registry`."""
        scenario = split_variant(value)[0]
        is_file = option == "scenario" and scenario.endswith(SUFFIX)
        return change(scenario) + value.removeprefix(scenario) if is_file else value

    @property
    def locations(self) -> np.ndarray:
        """[E, N] where everybody is now, copied."""
        return self._location.reshape(self.num_envs, -1).copy()

    @property
    def counts(self) -> np.ndarray:
        """[E, K] how many agents are at each location, copied."""
        places = self.scenario.num_locations
        return np.bincount(self._day_offset + self._location, minlength=self.num_envs * places).reshape(-1, places)

    @property
    def leave_chance(self) -> np.ndarray:
        """[E, K] the probability with which each agent that is at a location leaves it in the next step."""
        return self._leaving.ravel().take(self._cell)

    @property
    def minute(self) -> float:
        """Minutes after midnight."""
        return self.scenario.day_start_minute + self._step * self.scenario.step_minutes

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new days with everybody at home. Raises InputError for start states of another environment."""
        self._random = np.random.default_rng(seed)
        self._conditions = self.draw_starts(seed) if starts is None else self._checked(starts)
        self._step = 0
        shape = (self.num_envs, len(self.home))
        self._work_start = self._conditions.get("work_start_minute", np.full(shape, self.scenario.work_start_minute))
        self._work_end = self._conditions.get("work_end_minute", np.full(shape, self.scenario.work_end_minute))
        day = self.scenario.steps * self.scenario.step_minutes
        hours = np.stack([self._work_start, self._work_end], axis=-1)
        at_work = (self._work_end > self._work_start)[..., None]
        self._hours[:] = (hours - self.scenario.day_start_minute) / day * at_work
        self._location[:] = np.tile(self.home, self.num_envs)
        self._observe()
        self._reward.fill(0)
        self._set_flags(active=True, truncated=False)
        return self._now

    def show(self, locations: np.ndarray, step: int) -> TimeStep:
        """What everybody sees and may do at `step` of a day on which they are at `locations` [E, N]. After `reset`.

        Raises ValueError for a location that there is not.
        """
        if locations.shape != (self.num_envs, len(self.home)) or not (
            locations.min() >= 0 and locations.max() < self.scenario.num_locations
        ):
            raise ValueError(f"Berlin: expected locations [{self.num_envs}, {len(self.home)}] of the scenario")
        self._location[:] = locations.ravel()
        self._step = step
        self._observe()
        self._judge()
        return self._now

    @property
    def positions(self) -> list[tuple[str, ...]]:
        """See `protocol.environment.TellsActions`: an agent is at a location, roads first."""
        return [("place",)] * self.spec.num_types

    def show_at(self, positions: Sequence[np.ndarray], step: int) -> TimeStep:
        """See `protocol.environment.TellsActions`. Raises InputError for a person who is nowhere, or begins the day
        elsewhere than at home."""
        places = np.concatenate(positions, axis=1)[..., 0]
        last = self.scenario.num_locations - 1
        known = (places >= 0) & (places <= last) & (places == np.round(places))
        if not known.all():
            env, person = np.argwhere(~known)[0]
            raise InputError(
                f"step {step}: person {person} must be at one of the locations 0..{last}, is at {places[env, person]:g}"
            )
        if step == 0 and (away := (places != self.home).any(axis=0)).any():
            raise InputError(f"person {int(away.argmax())} does not begin the day at home")
        return self.show(places.astype(np.int64), step)

    def actions_to(self, positions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `protocol.environment.TellsActions`. Who is still on a road may have wanted to go on."""
        here, there = self.locations, np.concatenate(positions, axis=1)[..., 0].astype(np.int64)
        stuck = (here == there) & (np.take_along_axis(self.leave_chance, here, axis=1) < 1)
        actions = np.where(self.allowed[here, there], there, IMPOSSIBLE)
        actions[stuck] = AMBIGUOUS
        return [actions[:, self.spec.agents(m)] for m in range(self.spec.num_types)]

    def draw_starts(self, seed: int) -> dict[str, np.ndarray]:
        """The start states of `reset(seed)`, to be given to `reset(starts=…)` later."""
        # A stream of its own: from given start states the chances to leave are those of the same seed.
        variant, scenario, random = self.variant, self.scenario, np.random.default_rng([seed, 1])
        if not variant.varies:
            return {}
        agents, roads = (self.num_envs, len(self.home)), (self.num_envs, scenario.num_roads)
        # In whole steps: the scripted commuters have one plan for each of these shifts.
        shift = np.round(random.uniform(-1, 1, agents) * variant.shift_minutes / scenario.step_minutes)
        at_work = random.random(agents) >= variant.absence
        work = [
            minute + shift * scenario.step_minutes for minute in (scenario.work_start_minute, scenario.work_end_minute)
        ]
        slow = random.permuted(np.tile(np.arange(roads[1]) < variant.incidents, (roads[0], 1)), axis=1)
        rush = random.choice([scenario.work_start_minute, scenario.work_end_minute], roads)
        begin = rush + random.uniform(-1, 1, roads) * variant.rush_minutes
        return {
            "work_start_minute": work[0] * at_work,
            "work_end_minute": work[1] * at_work,
            "slow_from_minute": begin * slow,
            "slow_until_minute": (begin + variant.incident_minutes) * slow,
        }

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Everybody who can leave moves on. actions: per type [E, X_m] locations.

        Raises ValueError for an action out of range, or one that its mask forbids.
        """
        if self._step >= self.scenario.steps:
            self._set_flags(active=False, truncated=True)
            self._reward.fill(0)
            return self._now
        action = np.concatenate([np.asarray(a, np.int64) for a in actions], axis=1).ravel()
        places = self.scenario.num_locations
        # A negative number is a huge one when it is read without its sign: one comparison for both ends.
        if action.view(np.uint64).max() >= places:
            raise ValueError(f"Berlin: actions must lie in 0..{places - 1}")
        if not self.allowed.ravel().take(self._location * places + action).all():
            raise ValueError("Berlin: an action leads to a location that is no next one of the agent's: see the masks")
        leaving = self._leaving.ravel().take(self._cell).ravel()
        self._random.random(dtype=np.float32, out=self._chance)
        leaves = self._chance < leaving.take(self._day_offset + self._location)
        np.copyto(self._location, action, where=leaves)
        self._step += 1
        self._observe()
        self._judge()
        if self._step == self.scenario.steps:
            self._set_flags(active=True, truncated=True)
        return self._now

    def render(self) -> np.ndarray:
        """The first of the days, [H, W, 3] uint8: how full each road is, and how many agents are at each facility."""
        from bm3il.actors.environments.berlin.map import draw_now

        roads, counts = self.scenario.num_roads, self.counts[0]
        loads = counts[:roads] / self.load_agents
        return draw_now(self.scenario, loads, counts[roads:], self.changes.closed, self.minute)

    def _observe(self) -> None:
        """Count who is where, and write down what everybody sees and may do next."""
        places, agents = self.scenario.num_locations, len(self.home)
        self._place.reshape(-1)[:] = self._location
        counts = np.bincount(self._day_offset + self._location, minlength=self.num_envs * places)
        np.add(self._cell_base, counts.reshape(self.num_envs, places), out=self._cell)
        if self.variant.incidents:
            slow = self._conditions["slow_from_minute"] <= self.minute
            slow &= self.minute < self._conditions["slow_until_minute"]
            # Slow roads are looked up in the second half of the tables.
            self._cell[:, : slow.shape[1]] += slow * (places * (agents + 1))
        self._shared[:, :places] = self._fullness.ravel().take(self._cell)
        angle = 2 * math.pi * self.minute / MINUTES_OF_DAY
        self._shared[:, places:] = (self._step / self.scenario.steps, math.sin(angle), math.cos(angle))

    def _judge(self) -> None:
        minute = self.minute
        working = (self._work_start <= minute) & (minute < self._work_end)
        right = np.where(working, self.work, self.home) == self._location.reshape(working.shape)
        self._reward[:] = np.where(right, self.scenario.right_reward, self.scenario.wrong_reward)

    def _allocate(self) -> None:
        """One array for all types, of which a time step shows each type its part."""
        envs, agents, places = self.num_envs, len(self.home), self.scenario.num_locations
        columns = {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms(self.spec)[0].table_of(envs).items()}
        self._hours, self._place, self._shared = columns["own"], columns["codes"], columns["shared"]
        self._reward = np.zeros((envs, agents), np.float32)
        active = np.ones((envs, agents), bool)
        self._location = np.tile(self.home, envs)
        self._chance = np.empty(envs * agents, np.float32)
        self._day_offset = np.repeat(np.arange(envs) * places, agents)
        self._cell_base = np.tile(np.arange(places) * (agents + 1), (envs, 1))
        self._cell = self._cell_base.copy()
        parts = [slice(o, o + t.count) for o, t in zip(self.spec.offsets, self.spec.types, strict=True)]
        self._now = compact_step(
            self.spec,
            [columns],
            active=[active[:, part] for part in parts],
            rewards=[self._reward[:, part] for part in parts],
            terminated=np.zeros(envs, bool),
            truncated=np.zeros(envs, bool),
        )

    def _set_flags(self, active: bool, truncated: bool) -> None:
        for array in self._now.active:
            array[:] = active
        self._now.truncated.fill(truncated)

    def _checked(self, starts: Starts) -> dict[str, np.ndarray]:
        expected = {name: array.shape for name, array in self.draw_starts(0).items()}
        found = {name: array.shape for name, array in starts.items()}
        if found != expected:
            raise InputError(f"{self.spec.name}: expected start states {expected or 'none'}, found {found or 'none'}")
        for name, array in starts.items():
            if not (np.abs(array) <= 1e6).all():
                raise InputError(f"{self.spec.name}: {name} must hold minutes, at most a million")
        return {name: np.asarray(array, np.float64) for name, array in starts.items()}


def berlin_of(environment: Environment) -> Berlin:
    """The Berlin that an environment is, perhaps one in which choices slip. Raises InputError if it is none."""
    inner = unperturbed(environment)
    if not isinstance(inner, Berlin):
        raise InputError(
            f"expected a world of berlin, such as 'berlin?types=10&agents=50', got '{environment.spec.name}'"
        )
    return inner


def _spec(
    name: str,
    base: str,
    scenario: Scenario,
    commuters: list[tuple[int, int, int]],
    sight: str,
    allowed: np.ndarray,
) -> EnvironmentSpec:
    places, facilities = scenario.num_locations, scenario.num_facilities
    width = 2 * places + 2 * facilities + TIME_COLUMNS

    def parts(home: int, work: int) -> tuple[Part, ...]:
        near = sight == "near"
        return (
            Part("place.road", scenario.num_roads, "code"),
            Part("place.facility", facilities, "code"),
            Part("loads.road", scenario.num_roads, "shared", masked=near),
            Part("loads.facility", facilities, "shared", masked=near),
            Part("home", facilities, "constant", values=_one_hot(home, facilities)),
            Part("work", facilities, "constant", values=_one_hot(work, facilities)),
            Part("time", 3, "shared"),
            Part("hours", 2),
        )

    specs = tuple(
        TypeSpec(f"home{home}-work{work}", count, width, places, True, parts(home, work), PURPOSE, mask="place")
        for home, work, count in commuters
    )
    view = f"{scenario.name}, {sight} loads seen"
    table = tuple(tuple(np.flatnonzero(row).tolist()) for row in allowed)
    changes = "" if name == base else base
    return EnvironmentSpec(name, specs, scenario.steps, view, changes, (("place", table),))


def _one_hot(place: int, count: int) -> tuple[float, ...]:
    return tuple(float(place == other) for other in range(count))


def _tables(
    scenario: Scenario, load_agents: np.ndarray, incident_load_factor: float, agents: int, base_agents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of leaving, and fullness, of each location that n = 0..N agents are on: [2, K, N + 1] float32, first
    of roads as they are, then of slow ones. A facility is full with `base_agents`, however many there are."""
    places, roads = scenario.num_locations, scenario.num_roads
    # For every count there can be, once: a step looks up what it would otherwise have to raise to a power.
    count = np.arange(agents + 1)
    leaving, fullness = np.ones((2, places, agents + 1), np.float32), np.empty((2, places, agents + 1), np.float32)
    fullness[:, roads:] = count / base_agents
    for row, factor in enumerate((1.0, incident_load_factor)):
        load = (load_agents * factor)[:, None]
        minutes = np.maximum(1, scenario.free_flow_minutes[:, None] * np.maximum(1, count / load))
        leaving[row, :roads] = 1 - (1 - 1 / minutes) ** scenario.step_minutes
        fullness[row, :roads] = (count + 1) / (count + 1 + load)
    return leaving, fullness
