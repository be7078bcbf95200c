"""What adapters add to the environments behind them: `python benchmarks/adapters.py [--json]`.

For each row the same actions are played twice: through our `step`, and in a bare loop over the environment's own, with
its actions made beforehand. The two take turns, step by step, on one seed; what ours takes longer, per agent and step,
is compared with what the bare one takes: medians of rounds, in seconds of this thread, which others that compute do not
prolong. Wanted: less than a fifth.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from bm3il.protocol.adapters.pettingzoo import PettingZooParallel
from bm3il.protocol.environment import Environment
from bm3il.protocol.registry import make_environment

WANTED_OVERHEAD = 0.2
ROUNDS, COPIES = 15, 4
Joint = list[np.ndarray]
"""Actions of all copies, per type."""


class Bare(NamedTuple):
    """What is behind an environment, without us: it starts as ours with that seed, and does what is done in step t."""

    reset: Callable[[int], object]
    step: Callable[[int], object]


class Row(NamedTuple):
    """An environment by its name, and how to play these actions without us. Only where it is judged must it be fast."""

    name: str
    bare: Callable[[str, list[Joint]], Bare]
    judged: bool = True


def main() -> None:
    """Measure, print (as JSON with `--json`), and fail if an adapter that is judged costs more than wanted."""
    found = {row.name: measure(row) for row in ROWS}
    if "--json" in sys.argv[1:]:
        print(json.dumps(found))
    else:
        print(f"what an adapter adds to a step of one agent, {COPIES} copies, medians of {ROUNDS} rounds")
        for name, costs in found.items():
            bare, added, part = (costs[key] for key in ("bare_microseconds", "added_microseconds", "overhead"))
            print(f"  {bare:8.2f} µs bare, {added:+7.2f} µs = {part:+7.1%}  {name}")
    slow = {row.name: found[row.name]["overhead"] for row in ROWS if row.judged}
    worst = max(slow, key=lambda name: slow[name])
    assert slow[worst] < WANTED_OVERHEAD, f"{worst}: the adapter adds {slow[worst]:.1%} to a step"


def measure(row: Row) -> dict[str, float]:
    """Per agent and step."""
    environment = make_environment(row.name, COPIES)
    actions = _actions(environment)
    bare = row.bare(row.name, actions)
    rounds = [_round(environment, bare, actions) for _ in range(ROUNDS + 1)][1:]  # the first one warms up
    agent_steps = len(actions) * COPIES * environment.spec.num_agents / 1e6
    alone = statistics.median(without for _, without in rounds)
    added = statistics.median(with_us - without for with_us, without in rounds)
    parts = {"bare_microseconds": alone / agent_steps, "added_microseconds": added / agent_steps}
    return parts | {"overhead": added / alone}


def _round(environment: Environment, bare: Bare, actions: list[Joint]) -> tuple[float, float]:
    """The seconds of all steps of an episode in every copy, through us and without."""
    environment.reset(0)
    bare.reset(0)
    with_us = without = 0.0
    for t, joint in enumerate(actions):
        start = time.thread_time()
        environment.step(joint)
        middle = time.thread_time()
        bare.step(t)
        with_us, without = with_us + middle - start, without + time.thread_time() - middle
    return with_us, without


def of_pettingzoo(name: str, actions: list[Joint]) -> Bare:
    """Copies of the same parallel environment, each stepped by itself."""
    world = make_environment(name, COPIES)
    assert isinstance(world, PettingZooParallel)
    taken = [[take(part) for take, part in zip(world._takers, joint, strict=True)] for joint in actions]
    per_copy = [
        [{name: joint[agent.m][e][agent.x] for name, agent in world._agents.items()} for e in range(COPIES)]
        for joint in taken
    ]

    def step(t: int) -> None:
        for copy, done in zip(world._envs, per_copy[t], strict=True):
            copy.step(done)

    return Bare(world.reset, step)


def _actions(environment: Environment) -> list[Joint]:
    """Random allowed actions of one episode, which no copy ends early."""
    random, now, actions = np.random.default_rng(0), environment.reset(0), []
    for _ in range(environment.spec.episode_length):
        assert not np.any(now.terminated | now.truncated), f"{environment.spec.name} ends early"
        kinds = zip(environment.spec.types, now.action_masks, strict=True)
        actions.append(
            [
                (random.random(mask.shape) * mask).argmax(axis=-1) if t.discrete else random.uniform(-1, 1, mask.shape)
                for t, mask in kinds
            ]
        )
        now = environment.step(actions[-1])
    return actions


MPE = "pettingzoo:mpe2"
ROWS = (
    Row(f"{MPE}.simple_spread_v3?arguments=N:3", of_pettingzoo),
    Row(f"{MPE}.simple_spread_v3?arguments=N:10", of_pettingzoo),
    Row(f"{MPE}.simple_spread_v3?arguments=N:3,continuous_actions:true", of_pettingzoo),
    Row(f"{MPE}.simple_tag_v3", of_pettingzoo),
)


if __name__ == "__main__":
    main()
