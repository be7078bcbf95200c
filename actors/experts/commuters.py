"""Scripted commuters for Berlin: they act on what the agents observe, and on nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from bm3il.actors.environments.berlin.environment import berlin_of
from bm3il.actors.policy import sample
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT
from bm3il.protocol.perturbation import Perturbed
from bm3il.protocol.registry import make_environment

EQUILIBRIUM_DAYS = 20
EQUILIBRIUM_AGENTS = 2_000
"""On all days together, at least: days on which more agents drive show as well, in fewer, how full roads will be."""
EQUILIBRIUM_ROUNDS = 15


@dataclass(frozen=True)
class Seen:
    """What commuters observe, in words.

    location: [E, N] int64.   step: of the day.   fullness: [E, R] of all roads; an agent looks only
    at those that it could enter, which `sight=near` shows, too.
    work_start, work_end: [E, N] minutes when own working hours begin and end, both 0 on a day off.
    """

    location: np.ndarray
    step: int
    fullness: np.ndarray
    work_start: np.ndarray
    work_end: np.ndarray


class _Commuters(ABC):
    """What all of them share: knowing the roads of a `Berlin`, and reading the observations of its kind.

    environment: the world in which they act, with its closed roads, loads and slips. Raises InputError if it is no
    Berlin.
    """

    def __init__(self, environment: Environment) -> None:
        self._berlin = berlin = berlin_of(environment)
        self.scenario = scenario = berlin.scenario
        self._home, self._work = berlin.home, berlin.work
        self._places = scenario.num_locations

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """Next locations, [E, X_m] int64 each."""
        return self._berlin.spec.by_type([self._choose(self._look(now), generator, greedy)], axis=1)

    @abstractmethod
    def _choose(self, seen: Seen, generator: torch.Generator, greedy: bool) -> np.ndarray:
        """Next locations [E, N] of agents that see `seen`."""

    def _look(self, now: TimeStep) -> Seen:
        """What agents observe, from its columns (`protocol.observations`)."""
        (seen,) = now.seen(self._berlin.spec)
        columns = {name: column.numpy() for name, column in seen.columns.items()}
        scenario, shared = self.scenario, columns["shared"]
        hours = scenario.day_start_minute + columns["own"] * (scenario.steps * scenario.step_minutes)
        at_work = columns["own"][..., 1] > 0
        return Seen(
            location=columns["codes"][..., 0].astype(np.int64),
            step=round(float(shared[0, self._places]) * scenario.steps),
            fullness=shared[:, : scenario.num_roads],
            work_start=hours[..., 0] * at_work,
            work_end=hours[..., 1] * at_work,
        )

    def _ways_to(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next location [N, K] from everywhere on each agent's fastest free-flow way to its facility of `places`
        [N], and the minutes of the way [N, K]."""
        targets, target_of_agent = np.unique(places, return_inverse=True)
        first, closed = self.scenario.num_roads, self._berlin.changes.closed
        ways = [self.scenario.next_hops(target - first, closed) for target in targets.tolist()]
        hops, minutes = (np.stack(table)[target_of_agent] for table in zip(*ways, strict=True))
        return hops, minutes


class StayHome(_Commuters):
    """Nobody ever leaves home: the local optimum of the shy. Whom a slip drives out goes back."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._next = self._ways_to(self._home)[0]

    def _choose(self, seen: Seen, generator: torch.Generator, greedy: bool) -> np.ndarray:
        return self._next[np.arange(len(self._home)), seen.location]


class FreeFlow(_Commuters):
    """Everybody takes the way that is fastest on empty roads, and leaves as late as that would allow."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        agent = np.arange(len(self._home))
        self._to_work, minutes_to_work = self._ways_to(self._work)
        self._to_home, minutes_to_home = self._ways_to(self._home)
        self._minutes = minutes_to_work[agent, self._home], minutes_to_home[agent, self._work]

    def _choose(self, seen: Seen, generator: torch.Generator, greedy: bool) -> np.ndarray:
        minute = self.scenario.day_start_minute + seen.step * self.scenario.step_minutes
        to_work = (seen.work_start - self._minutes[0] <= minute) & (minute < seen.work_end - self._minutes[1])
        agent = np.arange(len(self._home))
        return np.where(to_work, self._to_work[agent, seen.location], self._to_home[agent, seen.location])


class CongestionAware(_Commuters):
    """The time-dependent fastest ways, and departures, in the traffic that everybody's choices make.

    Each agent maximises what it expects of the rest of the day. How fast every road is at every step is anticipated: it
    is what simulated days showed in which everybody acted on the last round's anticipation, averaged over rounds (the
    method of successive averages). Choices are a logit over the values, which spreads agents of one kind over ways and
    departures that are nearly as good (a stochastic user equilibrium). What an agent sees corrects what it anticipates:
    the way out of its own road, and the roads that it could enter. Where choices slip, it reckons with that.
    """

    def __init__(self, environment: Environment, temperature: float = 1.5, trust: float = 0.15) -> None:
        """temperature: of the logit, in rewards.   trust: in what is seen on the next roads, 0..1."""
        super().__init__(environment)
        self._temperature, self._trust = temperature, trust
        self._slip = environment.slip if isinstance(environment, Perturbed) else 0.0
        self._successors, self._forbidden = _successors(self._berlin.allowed)
        pairs = np.stack([self._home, self._work], axis=1)
        self._kinds, self._kind_of_agent = np.unique(pairs, axis=0, return_inverse=True)
        self._shifts = math.ceil(self._berlin.variant.shift_minutes / self.scenario.step_minutes)
        self._leaving = np.ones((self.scenario.steps + 1, self._places))
        self._leaving[:, : self.scenario.num_roads] = self._chance_to_leave(np.zeros(self.scenario.num_roads))
        enough = math.ceil(EQUILIBRIUM_AGENTS / len(self._home))
        days = make_environment(environment.spec.name, min(EQUILIBRIUM_DAYS, enough))
        for number in range(EQUILIBRIUM_ROUNDS):
            self._value = self._values()
            experienced = self._simulate(days, number)
            self._leaving += (experienced - self._leaving) / (number + 1)
        self._value = self._values()

    def _choose(self, seen: Seen, generator: torch.Generator, greedy: bool) -> np.ndarray:
        worth, hours = self._ahead(seen.step), self._hours_index(seen)
        options = self._successors[seen.location]
        score = worth[self._kind_of_agent[:, None], hours[..., None], options] + self._forbidden[seen.location]
        score -= self._trust * self._delay_cost(seen)[np.arange(len(options))[:, None, None], options]
        if greedy:
            choice = score.argmax(axis=-1)
        else:
            choice = sample(torch.as_tensor(score / self._temperature), generator).numpy()
        return np.take_along_axis(options, choice[..., None], axis=2)[..., 0]

    def _delay_cost(self, seen: Seen) -> np.ndarray:
        """[E, K] what entering each location costs more than was anticipated, as full as it looks now."""
        scenario, roads = self.scenario, self.scenario.num_roads
        fullness = seen.fullness.astype(np.float64)
        # Solves (n + 1)/(n + 1 + load) for (n + 1)/load: how crowded the road is with oneself on it.
        chance = self._chance_to_leave(fullness / (1 - fullness))
        delay_steps = (1 / chance - 1 / self._leaving[seen.step + 1, :roads]).clip(-scenario.steps, scenario.steps)
        cost = np.zeros((len(fullness), self._places))
        # A step of delay is a step at the wrong place that would have been one at the right place.
        cost[:, :roads] = (scenario.right_reward - scenario.wrong_reward) * delay_steps
        return cost

    def _hours_index(self, seen: Seen) -> np.ndarray:
        """[E, N] which of `_work_hours` an agent has today."""
        shift = np.round((seen.work_start - self.scenario.work_start_minute) / self.scenario.step_minutes).astype(int)
        return np.where(seen.work_end > seen.work_start, shift + self._shifts, 2 * self._shifts + 1)

    def _due(self, minute: float) -> np.ndarray:
        """[kinds, hours, K] the reward of being at each location at this minute."""
        scenario = self.scenario
        shift = np.arange(-self._shifts, self._shifts + 1) * scenario.step_minutes
        working = (scenario.work_start_minute + shift <= minute) & (minute < scenario.work_end_minute + shift)
        place = np.where(np.append(working, False), self._kinds[:, 1:], self._kinds[:, :1])
        reward = np.full((*place.shape, self._places), scenario.wrong_reward)
        np.put_along_axis(reward, place[..., None], scenario.right_reward, axis=2)
        return reward

    def _ahead(self, step: int) -> np.ndarray:
        """[kinds, hours, K] what being at each location after this step is worth, the step's reward included."""
        minute = self.scenario.day_start_minute + (step + 1) * self.scenario.step_minutes
        return self._due(minute) + self._value[step + 1]

    def _values(self) -> np.ndarray:
        """[T + 1, kinds, hours, K] expected reward of the rest of the day, by backward induction."""
        hours = 2 * self._shifts + 2
        allowed = self._forbidden == 0
        slips_to = allowed / allowed.sum(axis=1, keepdims=True)
        # In place of the last round's at once: `_ahead` reads from it the steps that are already done.
        self._value = np.zeros((self.scenario.steps + 1, len(self._kinds), hours, self._places))
        for step in reversed(range(self.scenario.steps)):
            ahead = self._ahead(step)
            # One option after the other, of all agents: arrays of all options would not stay in a core's cache.
            options = [
                ahead[..., place] + bar for place, bar in zip(self._successors.T, self._forbidden.T, strict=True)
            ]
            best = reduce(np.maximum, options)
            shares = [np.exp((option - best) / self._temperature) for option in options]
            moved = sum(map(np.multiply, shares, options)) / sum(shares)
            if self._slip:
                slipped = sum(map(np.multiply, options, slips_to.T))
                moved = (1 - self._slip) * moved + self._slip * slipped
            leaving = self._leaving[step]
            self._value[step] = leaving * moved + (1 - leaving) * ahead
        return self._value

    def _simulate(self, days: Environment, number: int) -> np.ndarray:
        """[T + 1, K] the mean chance to leave of those who were there; what was anticipated where nobody was."""
        berlin = berlin_of(days)
        # Seeded by the round alone: whoever plans in a world plans the same, so recordings can be made again.
        generator = torch.Generator().manual_seed(number)
        now, experienced = days.reset(number), self._leaving.copy()
        for step in range(self.scenario.steps):
            now = days.step(self.act(now, generator))
            counts = berlin.counts
            there = counts.sum(axis=0)
            mean = (counts * berlin.leave_chance).sum(axis=0) / there.clip(min=1)
            experienced[step + 1] = np.where(there > 0, mean, self._leaving[step + 1])
        return experienced

    def _chance_to_leave(self, crowding: np.ndarray) -> np.ndarray:
        """Of the roads [..., R], with n/load of them: the environment's rule."""
        minutes = np.maximum(1, self.scenario.free_flow_minutes * np.maximum(1, crowding))
        return 1 - (1 - 1 / minutes) ** self.scenario.step_minutes


def _successors(allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next locations [K, S] of every location, itself among them, and [K, S] 0 or what forbids a padding."""
    most = allowed.sum(axis=1).max()
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :most]
    return order, np.where(np.take_along_axis(allowed, order, axis=1), 0.0, FORBIDDEN_LOGIT)
