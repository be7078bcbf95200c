"""Speed of the environments on one core, against documented rates: `python benchmarks/environments.py [--json]`.

The original Rover Tower (8 agents, one environment, one process) makes 12,040 joint steps per second. Berlin has no
original; 50 commuters of 10 types shall make 10 million agent-steps per second with 64 days at once.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from bm3il.protocol.environment import Environment
from bm3il.protocol.registry import make_environment

ORIGINAL_STEPS_PER_SECOND = 12_040
WANTED_RATIO = 100
REPEATS = 7
BATCH_SIZES = (1, 16, 64, 256, 1_024, 4_096)
BERLIN = ("berlin?types=10&agents=50", 64)
WANTED_AGENT_STEPS_PER_SECOND = 10e6
ALSO_MEASURED = (
    ("berlin?types=10&agents=50&sight=near", 64),
    ("berlin?types=10&agents=50", 100),
    ("berlin?scenario=berlin46-incidents&types=10&agents=50", 64),
    ("berlin?scenario=berlin400&types=100&agents=5000", 1),
)


def main() -> None:
    """Measure, print (as JSON with `--json`), and fail if Rover Tower is slower than wanted."""
    rates = {str(num_envs): steps_per_second("rover_tower?pairs=4", num_envs) for num_envs in BATCH_SIZES}
    best = max(rate["median"] for rate in rates.values())
    ratio = best / ORIGINAL_STEPS_PER_SECOND
    berlin = {f"{name}, E = {num_envs}": agent_rates(name, num_envs) for name, num_envs in (BERLIN, *ALSO_MEASURED)}
    if "--json" in sys.argv[1:]:
        result = {"environment": "rover_tower?pairs=4", "joint_steps_per_second": rates, "ratio_to_original": ratio}
        print(json.dumps(result | {"agent_steps_per_second": berlin}))
    else:
        print("rover_tower?pairs=4, joint steps per second, median [min–max] of", REPEATS)
        for num_envs, rate in rates.items():
            line = f"{rate['median']:>12,.0f} [{rate['min']:,.0f}–{rate['max']:,.0f}]"
            print(f"  E = {num_envs:>5}: {line}  {rate['median'] / ORIGINAL_STEPS_PER_SECOND:6.1f} × the original")
        print("Berlin, agent-steps per second")
        for name, rate in berlin.items():
            print(f"  {rate['median']:>12,.0f} [{rate['min']:,.0f}–{rate['max']:,.0f}]  {name}")
    assert ratio >= WANTED_RATIO, f"Rover Tower: {ratio:.0f} times the original, wanted {WANTED_RATIO}"
    reached = next(iter(berlin.values()))["median"]
    assert reached >= WANTED_AGENT_STEPS_PER_SECOND, f"Berlin: {reached:,.0f} agent-steps per second"


def agent_rates(name: str, num_envs: int) -> dict[str, float]:
    """Agent-steps per second."""
    agents = make_environment(name, 1).spec.num_agents
    return {key: rate * agents for key, rate in steps_per_second(name, num_envs, 2_000_000 // agents).items()}


def steps_per_second(name: str, num_envs: int, joint_steps: int = 200_000) -> dict[str, float]:
    """Joint steps per second of whole episodes, resets included, under random allowed actions drawn beforehand.

    All episodes start from one seed: what is allowed depends on where an agent is.
    """
    environment = make_environment(name, num_envs)
    random = np.random.default_rng(0)
    length = environment.spec.episode_length
    now, actions = environment.reset(0), []
    for _ in range(length):
        actions.append([(random.random(m.shape, np.float32) * m).argmax(axis=-1) for m in now.action_masks])
        now = environment.step(actions[-1])
    episodes = max(1, joint_steps // (num_envs * length))
    rates = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(episodes):
            play(environment, actions)
        rates.append(episodes * num_envs * length / (time.perf_counter() - start))
    measured = rates[1:]  # the first one warms up
    return {"median": statistics.median(measured), "min": min(measured), "max": max(measured)}


def play(environment: Environment, actions: list[list[np.ndarray]]) -> None:
    """One episode in every environment."""
    environment.reset(0)
    for joint in actions:
        environment.step(joint)


if __name__ == "__main__":
    main()
