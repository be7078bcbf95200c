"""What our adapters add to the steps of Gymnasium and VMAS, and what processes win, on this machine:
`python benchmarks/adapters_batched.py [--json]`.

Episodes are played with the same random actions by us and by a bare loop over the same simulators, in turns; what
counts is the processor's time, so that it does not matter what else the machine does. A simulator that sleeps stands
for a slow one.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import numpy as np

from bm3il.protocol.adapters.gymnasium import Gymnasium
from bm3il.protocol.adapters.vmas import Vmas
from bm3il.protocol.environment import Environment
from bm3il.protocol.registry import make_environment

REPEATS = 20
MEASURED = (
    ("gymnasium:CartPole-v1", 50),
    ("gymnasium:Pendulum-v1", 50),
    ("gymnasium:Taxi-v4", 50),
    ("vmas:simple_spread?n_agents=3", 1),
    ("vmas:simple_spread?n_agents=3", 50),
    ("vmas:balance?n_agents=4", 50),
)
SHORT_STEPS = 8
"""In which no episode ends."""
SLOW_SECONDS, PROCESSES, COPIES, STEPS = 0.005, (2, 4), 16, 40
WANTED_SPEED_UP = 0.9
"""Of P processes, as a part of P, where nothing but the simulators' own time counts."""


class Sleeping(gymnasium.Env[np.ndarray, int]):
    """Takes its time, and nothing of the processor's."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 4).astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(SLOW_SECONDS)
        return self.np_random.uniform(-1, 1, 4).astype(np.float32), 0.0, False, False, {}


if "Sleeping-v0" not in gymnasium.registry:  # this file is a module, too
    gymnasium.register("Sleeping-v0", entry_point=Sleeping, max_episode_steps=STEPS)


def main() -> None:
    """Measure, print (as JSON with `--json`), and fail if processes win less than wanted."""
    added = {f"{name}, E = {envs}": overhead(name, envs) for name, envs in MEASURED}
    won = {processes: speed_up(processes) for processes in PROCESSES}
    if "--json" in sys.argv[1:]:
        print(json.dumps({"overhead": added, "speed_up": won}))
    else:
        print("what we add to the simulators' own time, median of", REPEATS)
        for name, row in added.items():
            print(f"  {row['ratio'] - 1:7.1%}  {row['microseconds']:8.1f} µs per agent-step of theirs  {name}")
        for processes, ratio in won.items():
            print(f"a step of {1e3 * SLOW_SECONDS:g} ms in {processes} processes: {ratio:.2f} times as fast")
    for processes, ratio in won.items():
        assert ratio >= WANTED_SPEED_UP * processes, f"{processes} processes win {ratio:.2f} times only"


def overhead(name: str, num_envs: int) -> dict[str, float]:
    """Our time by theirs for the same steps, and how long an agent-step takes them."""
    ours, theirs = make_environment(name, num_envs), make_environment(name, num_envs)
    actions = _random_actions(ours)
    plays = [lambda: [ours.step(joint) for joint in actions], _bare(theirs, actions)]
    seconds = np.zeros((REPEATS, 2))
    for repeat in range(-1, REPEATS):  # the first one warms up, and its place is overwritten by the last
        for which in (0, 1) if repeat % 2 else (1, 0):
            (ours, theirs)[which].reset(repeat + 1)
            start = time.process_time()
            plays[which]()
            seconds[repeat, which] = time.process_time() - start
    agent_steps = SHORT_STEPS * num_envs * ours.spec.num_agents
    ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
    return {"ratio": ratio, "microseconds": 1e6 * float(np.median(seconds[:, 1])) / agent_steps}


def speed_up(processes: int) -> float:
    """How many times as fast an episode is in so many processes."""
    name = "gymnasium:adapters_batched:Sleeping-v0"
    one, divided = make_environment(name, COPIES), make_environment(f"{name}?processes={processes}", COPIES)
    return statistics.median(_episode_seconds(one) / _episode_seconds(divided) for _ in range(3))


def _episode_seconds(environment: Environment) -> float:
    environment.reset(0)
    actions = [np.zeros((environment.num_envs, 1), np.int64)]
    start = time.perf_counter()
    for _ in range(STEPS):
        environment.step(actions)
    return time.perf_counter() - start


def _random_actions(environment: Environment) -> list[list[np.ndarray]]:
    """Of each step and type."""
    random = np.random.default_rng(0)
    shapes = [(environment.num_envs, t.count) for t in environment.spec.types]
    return [
        [
            random.integers(0, t.action_dim, shape)
            if t.discrete
            else random.uniform(-1, 1, (*shape, t.action_dim)).astype(np.float32)
            for t, shape in zip(environment.spec.types, shapes, strict=True)
        ]
        for _ in range(SHORT_STEPS)
    ]


def _bare(environment: Environment, actions: list[list[np.ndarray]]) -> Callable[[], Any]:
    """The simulators' own steps, and nothing else; actions are made beforehand as they take them."""
    if isinstance(environment, Gymnasium):
        envs, given = environment._envs, [environment._take(joint[0]) for joint in actions]

        def loop() -> None:
            for chosen in given:
                for env, (action,) in zip(envs, chosen, strict=True):
                    env.step(action)

        return loop
    assert isinstance(environment, Vmas)
    batch, tensors = environment._env, [environment._taken(joint) for joint in actions]

    def batched() -> None:
        for chosen in tensors:
            batch.step(chosen)

    return batched


if __name__ == "__main__":
    main()
