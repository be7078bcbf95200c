"""What 8, 64 and 1,000 nodes would make of a run, from what one core takes: `python benchmarks/nodes.py [--json]`.

Each preset runs for some iterations in one process on one thread, whose stages are timed; what its chunks and weights
take on the wire is measured beside it. Then it is arithmetic. With n nodes of one actor each, an iteration of the same
joint rows takes

    lockstep: actors / n + wire + learner + rewards + broadcast · n,
    async:    the longest of actors / n, wire + learner, rewards, broadcast · n,

the broadcast being the weights to every node over `--gigabits` of network. A simulator that is slower than ours adds
its seconds to the actors' (`--simulators`, milliseconds a joint step).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.launch.config import parse_config
from bm3il.launch.run import check
from bm3il.launch.topology import make_job
from bm3il.learner.process import run_serial
from bm3il.protocol.codec import decode, encode
from bm3il.protocol.job import Endpoints
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Chunk, Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

PRESETS, ITERATIONS = ("berlin", "berlin_closed"), 6
NODES, SIMULATORS = (1, 8, 64, 1_000), (0.0, 10.0, 100.0)
SHORT = ["--mode", "serial", "--evaluation.interval", "1000", "--evaluation.final-episodes", "2"]
CLIPPED = ["--actor.babbling", "0", "--learner.clipped.critic-first", "0", "--cloning.iterations", "1"]
CHUNKS = 20


@dataclass(frozen=True)
class Constants:
    """Of one iteration: joint rows; seconds of one core in which they are collected, encoded and checked, learned from,
    and rewarded (the particles' updates among it); bytes of the weights, and of a joint row."""

    rows: float
    actors: float
    wire: float
    learner: float
    rewards: float
    weights_bytes: int
    row_bytes: float


def measured(preset: str) -> Constants:
    """Means over the iterations of a short run."""
    flags = ["--preset", preset, *SHORT, *(CLIPPED if preset == "berlin_closed" else [])]
    config, spec = check(parse_config(flags))
    rows = config.actor.steps_per_iteration
    config, _ = check(parse_config([*flags, "--steps", str(rows * ITERATIONS)]))
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry("learner", 0, Sender("nodes", "learner-0"))
        job = make_job(config, spec, "nodes", Path(folder), Endpoints("", "", "", ""))
        run_serial(job, config.settings, config.to_yaml(), telemetry)
        telemetry.close()
    seconds = {
        sample.labels["stage"]: sample.value / ITERATIONS
        for metric in telemetry.registry.collect()
        for sample in metric.samples
        if sample.name == "bm3il_learner_stage_seconds_sum"
    }
    layout = Layout.of(spec, config.parameter_sharing)
    policy = Policy(layout, config.actor.hidden, torch.Generator().manual_seed(0))
    wire, row_bytes = wire_of(spec, config.environment)
    return Constants(
        rows=rows,
        actors=seconds["collect"],
        wire=wire * rows,
        learner=seconds["update"],
        rewards=seconds["observe"] + seconds["query"],
        weights_bytes=sum(array.nbytes for array in policy.to_arrays().values()),
        row_bytes=row_bytes,
    )


def wire_of(spec: EnvironmentSpec, world: str) -> tuple[float, float]:
    """Seconds in which a joint row is encoded, decoded and checked, and its bytes."""
    played = rollout(make_environment(world, 1), UniformPolicy(spec), 1)
    sender, body = Sender("nodes", "actor-0"), Chunk("s", 0, 0, 0, played.num_steps, played.num_episodes, 0.0)
    table = Trajectories.array_table(spec, spec.episode_length, 1)
    size, start = 0, time.process_time()
    for number in range(CHUNKS):
        frames = [bytearray(frame) for frame in encode(sender, number, body, played.arrays)]
        Trajectories.from_arrays(decode(frames, "nodes", lambda body: table).arrays, spec)
        size += sum(map(len, frames))
    rows = CHUNKS * played.num_steps
    return (time.process_time() - start) / rows, size / rows


def modelled(one: Constants, nodes: int, simulator: float, bytes_per_second: float) -> dict[str, float | str]:
    """Joint rows per second in both modes, and who is the longest at work. simulator: seconds a joint step."""
    seconds = {
        "actors": (one.actors + one.rows * simulator) / nodes,
        "learner": one.wire + one.learner,
        "reward server": one.rewards,
        "network": nodes * one.weights_bytes / bytes_per_second,
    }
    busiest = max(seconds, key=lambda who: seconds[who])
    return {
        "lockstep": one.rows / sum(seconds.values()),
        "async": one.rows / seconds[busiest],
        "busiest": busiest,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--simulators", nargs="+", type=float, default=SIMULATORS, metavar="MILLISECONDS")
    parser.add_argument("--gigabits", type=float, default=10.0, help="of network per second")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {preset: measured(preset) for preset in given.presets}
    if given.json:
        print(json.dumps({preset: asdict(one) for preset, one in found.items()}))
        return
    print("| preset | joint rows | actors, s | wire, s | learner, s | rewards, s | weights, kB | bytes a row |")
    print("|---|---|---|---|---|---|---|---|")
    for preset, one in found.items():
        parts = " | ".join(f"{part:.3f}" for part in (one.actors, one.wire, one.learner, one.rewards))
        print(f"| `{preset}` | {one.rows:,} | {parts} | {one.weights_bytes / 1e3:,.0f} | {one.row_bytes:,.0f} |")
    print("\n| preset | simulator, ms a joint step | nodes | rows/s, lockstep | rows/s, async | saturated |")
    print("|---|---|---|---|---|---|")
    for preset, one in found.items():
        for simulator in given.simulators:
            for nodes in NODES:
                rate = modelled(one, nodes, simulator / 1e3, given.gigabits * 1e9 / 8)
                both = f"{rate['lockstep']:,.0f} | {rate['async']:,.0f}"
                print(f"| `{preset}` | {simulator:g} more | {nodes:,} | {both} | {rate['busiest']} |")


if __name__ == "__main__":
    main(sys.argv[1:])
