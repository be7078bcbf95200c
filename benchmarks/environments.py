"""Speed of the environments on one core, against documented rates: `python benchmarks/environments.py [--json]`.

The original Rover Tower (8 agents, one environment, one process) makes 12,040 joint steps per second.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from protocol.environment import Environment
from protocol.registry import make_environment

ORIGINAL_STEPS_PER_SECOND = 12_040
WANTED_RATIO = 100
REPEATS = 7
BATCH_SIZES = (1, 16, 64, 256, 1_024, 4_096)


def main() -> None:
    """Measure, print (as JSON with `--json`), and fail if Rover Tower is slower than wanted."""
    rates = {str(num_envs): steps_per_second("rover_tower?pairs=4", num_envs) for num_envs in BATCH_SIZES}
    best = max(rate["median"] for rate in rates.values())
    ratio = best / ORIGINAL_STEPS_PER_SECOND
    if "--json" in sys.argv[1:]:
        result = {"environment": "rover_tower?pairs=4", "joint_steps_per_second": rates, "ratio_to_original": ratio}
        print(json.dumps(result))
    else:
        print("rover_tower?pairs=4, joint steps per second, median [min–max] of", REPEATS)
        for num_envs, rate in rates.items():
            line = f"{rate['median']:>12,.0f} [{rate['min']:,.0f}–{rate['max']:,.0f}]"
            print(f"  E = {num_envs:>5}: {line}  {rate['median'] / ORIGINAL_STEPS_PER_SECOND:6.1f} × the original")
    assert ratio >= WANTED_RATIO, f"Rover Tower: {ratio:.0f} times the original, wanted {WANTED_RATIO}"


def steps_per_second(name: str, num_envs: int) -> dict[str, float]:
    """Joint steps per second of whole episodes, resets included, under random actions drawn beforehand."""
    environment = make_environment(name, num_envs)
    random = np.random.default_rng(0)
    length = environment.spec.episode_length
    actions = [
        [random.integers(t.action_dim, size=(num_envs, t.count)) for t in environment.spec.types] for _ in range(length)
    ]
    episodes = max(1, 200_000 // (num_envs * length))
    rates = []
    for repeat in range(REPEATS + 1):
        start = time.perf_counter()
        for episode in range(episodes):
            play(environment, repeat * episodes + episode, actions)
        rates.append(episodes * num_envs * length / (time.perf_counter() - start))
    measured = rates[1:]  # the first one warms up
    return {"median": statistics.median(measured), "min": min(measured), "max": max(measured)}


def play(environment: Environment, seed: int, actions: list[list[np.ndarray]]) -> None:
    """One episode in every environment."""
    environment.reset(seed)
    for joint in actions:
        environment.step(joint)


if __name__ == "__main__":
    main()
