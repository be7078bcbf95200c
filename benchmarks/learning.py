"""Speed and memory of one generator epoch on one thread, against a floor: `python benchmarks/learning.py [--json]`.

An epoch is one update of all critics, policies and targets on 1,000 joint rows. Its floor is the arithmetic of the
products that it does, at the rate of a batched float32 product measured in the same run. Both are processor time of
the one thread, so that other work on the machine disturbs them little. The authors' code takes 1,403 ms and 2,148 MB at
the Berlin shape: 2.8 times the floor of its arithmetic.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.policy import Policy
from learner.actor_critic import ActorCritic
from learner.critics import Context, Critic
from learner.replay import Batch
from learner.settings import LearnerSettings
from protocol.layout import JointRows, Layout, ParameterSharing
from protocol.observations import Observations
from protocol.specs import EnvironmentSpec, TypeSpec

LARGEST_RATIO = 1.4
LARGEST_MEGABYTES = 700
REPEATS = 7
HEADS = 4


@dataclass(frozen=True)
class Shape:
    """One problem: `types` are (count, observation_dim, action_dim)."""

    types: tuple[tuple[int, int, int], ...]
    context: Context = "types"
    precision: str = "float32"
    hidden: int = 128
    policy_hidden: tuple[int, ...] = (128, 128)
    rows: int = 1_000
    parameter_sharing: ParameterSharing = "agent"


def berlin(agents: int = 50, context: Context = "types", precision: str = "float32") -> Shape:
    """Five agents a type, 46 roads: observation 103."""
    return Shape(((5, 103, 46),) * (agents // 5), context, precision)


SHAPES = {
    "BM3IL, N = 50": berlin(),
    "BM3IL, N = 50, bfloat16": berlin(precision="bfloat16"),
    "BM3IL, N = 10": berlin(10),
    "BM3IL, N = 25": berlin(25),
    "BM3IL, N = 100": berlin(100),
    "MA-DAAC, N = 50": berlin(context="agents"),
    "MTMFIL, N = 50": berlin(context="uniform_types"),
    "MA-GAIL, N = 50": berlin(context="none"),
    "Rover Tower, 8 agents, batch 256, per type": Shape(
        ((4, 13, 5), (4, 8, 5)), "types", "float32", 64, (64, 64), 256, "type"
    ),
    "Rover Tower, 8 agents, batch 1,024, per agent": Shape(
        ((4, 13, 5), (4, 8, 5)), "types", "float32", 128, (128, 128), 1_024, "agent"
    ),
    "MAAC on Rover Tower, 8 agents, batch 1,024, per agent": Shape(
        ((4, 13, 5), (4, 8, 5)), "agents", "float32", 128, (128, 128), 1_024, "agent"
    ),
}


def main() -> None:
    """Measure, print (one JSON line with `--json`), and fail if the Berlin epoch is too slow or too large."""
    torch.set_num_threads(1)
    if "--memory" in sys.argv[1:]:
        print(json.dumps(memory(berlin())))
        return
    command = [sys.executable, __file__, "--memory"]
    result = {"megabytes": json.loads(subprocess.run(command, check=True, capture_output=True).stdout), "epochs": {}}
    for name, shape in SHAPES.items():
        result["epochs"][name] = measure(shape)
        if "--json" not in sys.argv[1:]:
            print(describe(name, result["epochs"][name]), flush=True)
    print(json.dumps(result) if "--json" in sys.argv[1:] else f"memory of the first, MB: {result['megabytes']}")
    ratio = result["epochs"]["BM3IL, N = 50"]["ratio"]
    assert ratio <= LARGEST_RATIO, f"the epoch takes {ratio:.2f} times its floor, wanted {LARGEST_RATIO}"
    assert result["megabytes"]["additional"] <= LARGEST_MEGABYTES, f"more than {LARGEST_MEGABYTES} MB"


def measure(shape: Shape) -> dict[str, float]:
    """Seconds of an update (median, least, most), its GFLOP, the rate of products beside it, the ratio to the floor."""
    learner, batch = problem(shape)
    with FlopCounterMode(display=False) as counter:
        learner.update(batch, batch.rewards, 0.0)
    product, product_gflop = _product()
    seconds, product_seconds = [], []
    for _ in range(REPEATS):
        seconds.append(_processor_seconds(lambda: learner.update(batch, batch.rewards, 0.0)))
        product_seconds += [_processor_seconds(product) for _ in range(3)]
    gflop, median = counter.get_total_flops() / 1e9, statistics.median(seconds)
    rate = product_gflop / statistics.median(product_seconds)
    return {
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "gflop": gflop,
        "gflop_per_second": rate,
        "ratio": median * rate / gflop,
    }


def _product() -> tuple[Callable[[], object], float]:
    """A batched product of the critics' size into memory that is there already, and its GFLOP."""
    a, b, out = torch.randn(50, 1000, 256), torch.randn(50, 256, 128), torch.empty(50, 1000, 128)
    return lambda: torch.bmm(a, b, out=out), 2 * 50 * 1000 * 256 * 128 / 1e9


def _processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def describe(name: str, figures: dict[str, float]) -> str:
    low, mid, high = (1_000 * figures[f"{which}_seconds"] for which in ("min", "median", "max"))
    floor = f"{figures['gflop']:.1f} GFLOP at {figures['gflop_per_second']:.0f} GFLOP/s"
    return f"{name:54} {mid:8.1f} ms [{low:.1f}–{high:.1f}]  {figures['ratio']:5.2f} × the floor of {floor}"


def memory(shape: Shape) -> dict[str, float]:
    """Megabytes: resident before and after the problem was built, and the most that updates added to it."""
    before = psutil.Process().memory_info().rss
    learner, batch = problem(shape)
    built = psutil.Process().memory_info().rss
    for _ in range(3):
        learner.update(batch, batch.rewards, 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        name: round(value / 1e6)
        for name, value in {"additional": peak - before, "updates": peak - built, "total": peak}.items()
    }


def problem(shape: Shape) -> tuple[ActorCritic, Batch]:
    """Networks, and random rows of which a few have ended."""
    types = tuple(TypeSpec(f"type-{m}", *t) for m, t in enumerate(shape.types))
    layout = Layout.of(EnvironmentSpec("random", types, 100), shape.parameter_sharing)
    generator = torch.Generator().manual_seed(0)
    policy = Policy(layout, shape.policy_hidden, generator)
    critic = Critic(layout, shape.context, shape.hidden, HEADS, True, generator)
    settings = LearnerSettings(hidden=shape.hidden, heads=HEADS, precision=shape.precision)
    learner = ActorCritic(policy, critic, settings, torch.device("cpu"), 0)
    return learner, _random_batch(layout, shape.rows, generator)


def _random_batch(layout: Layout, rows: int, generator: torch.Generator) -> Batch:
    def draw(kind: str) -> list[torch.Tensor]:
        tensors = []
        for block in layout.blocks:
            shape = (rows, block.num_agents)
            if kind == "own":
                tensors.append(torch.randn(*shape, block.observation_dim, generator=generator))
            elif kind == "actions":
                tensors.append(torch.randint(block.action_dim, shape, generator=generator))
            elif kind == "masks":
                tensors.append(torch.rand(*shape, block.action_dim, generator=generator) < 0.9)
            else:
                tensors.append(torch.rand(shape, generator=generator))
        return tensors

    def seen() -> list[Observations]:
        columns = zip(layout.blocks, draw("own"), draw("masks"), strict=True)
        return [Observations(block.form, {"own": own, "masks": masks}) for block, own, masks in columns]

    active = [torch.ones(rows, block.num_agents, dtype=torch.bool) for block in layout.blocks]
    return Batch(
        rows=JointRows(seen(), draw("actions"), active),
        next_observations=seen(),
        next_active=active,
        rewards=draw("rewards"),
        terminated=torch.rand(rows, generator=generator) < 0.01,
    )


if __name__ == "__main__":
    main()
