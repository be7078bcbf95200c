"""How fast an environment is, as an actor plays it: what `bm3il check-environment` measures."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import play
from bm3il.actors.settings import ActorSettings
from bm3il.actors.simulator import Simulator
from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.layout import Layout

SPEED_SECONDS = 2.0
"""For how long is measured, after a first episode that does what is only done once."""
MORE_COPIES = 16
FEW_TIMES = 2.0
"""So many times as fast should many copies be, at the least, if they are stepped as arrays."""
SEED = 7


def speed(name: str) -> tuple[str, list[str]]:
    """How fast it is played by an actor, with one copy and with many, how much of the time is its own, and what to do
    about it."""
    (one, own), (many, own_of_many) = (_steps_per_second(name, copies) for copies in (1, MORE_COPIES))
    text = (
        f"{one:,.0f} steps/s with one copy, {own:.0%} of the time in the environment; {many:,.0f} with {MORE_COPIES} "
        f"at once, {own_of_many:.0%}"
    )
    slow = []
    # By the environment's own time: networks are faster with many copies in any case.
    if own_of_many > 0.5 and many / own_of_many < FEW_TIMES * one / own:
        slow.append(
            f"{MORE_COPIES} copies at once are hardly faster than one after the other. If it is yours, step them as "
            "arrays; else take more actors, one for each core (--actors)"
        )
    return text, slow


def _steps_per_second(name: str, copies: int) -> tuple[float, float]:
    """Joint steps of one copy, and the share of the environment in an actor's time."""
    environment = _Timed(Simulator(name, copies))
    settings = ActorSettings()
    layout = Layout.of(environment.spec, "type")
    policy = Policy(layout, settings.hidden, torch.Generator().manual_seed(SEED))
    seconds, steps, episode = 0.0, 0, 0
    while seconds < SPEED_SECONDS:
        if episode == 1:  # what is only once done is done in the first
            environment.seconds, steps, seconds = 0.0, 0, 0.0
        began = time.perf_counter()
        _, moments = play(environment, policy, SEED + episode)
        for moment in moments:
            steps += int((~moment.before).sum())
            if episode and seconds + time.perf_counter() - began > SPEED_SECONDS:
                break
        seconds, episode = seconds + time.perf_counter() - began, episode + 1
    return steps / seconds, min(1.0, environment.seconds / seconds)


class _Timed:
    """An environment that knows how long its calls take."""

    def __init__(self, inner: Environment) -> None:
        self._inner, self.spec, self.num_envs, self.seconds = inner, inner.spec, inner.num_envs, 0.0

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        began = time.perf_counter()
        now = self._inner.reset(seed, starts)
        self.seconds += time.perf_counter() - began
        return now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        began = time.perf_counter()
        now = self._inner.step(actions)
        self.seconds += time.perf_counter() - began
        return now
