"""Speed and memory of one generator epoch on one thread, against a floor: `python benchmarks/learning.py [--json]`.

An epoch is one update of all critics, policies and targets on 1,000 joint rows. Its floor is the arithmetic of the
products that the equations need, counted by hand (`needed_gflop`: a one-hot is a row of a matrix and a constant a bias,
which cost nothing), at the rate of a batched float32 product measured in the same run. Both are processor time of
the one thread, so that other work on the machine disturbs them little. The authors' code takes 1,403 ms and 2,148 MB at
the Berlin shape, with observations expanded.
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
from dataclasses import dataclass, replace
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch

from bm3il.actors.policy import Policy
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.critics import Context, Critic
from bm3il.learner.replay import Batch
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.observations import Observations, Run
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

LARGEST_RATIO = 1.5
LARGEST_MEGABYTES = 700
REPEATS = 7
HEADS = 4


@dataclass(frozen=True)
class Shape:
    """One problem: `types` are (count, observation_dim, action_dim); `parts` what all observations are made of."""

    types: tuple[tuple[int, int, int], ...]
    context: Context = "types"
    precision: str = "float32"
    hidden: int = 128
    policy_hidden: tuple[int, ...] = (128, 128)
    rows: int = 1_000
    parameter_sharing: ParameterSharing = "agent"
    parts: tuple[Part, ...] = ()


BERLIN = (
    Part("place", 46, "code"),
    Part("loads", 46, "shared"),
    Part("home", 5, "constant", values=(0, 0, 1, 0, 0)),
    Part("work", 5, "constant", values=(0, 1, 0, 0, 0)),
    Part("time", 1, "shared"),
)
NEXT_ROADS = 5


def berlin(
    agents: int = 50, context: Context = "types", precision: str = "float32", parts: tuple[Part, ...] = BERLIN
) -> Shape:
    """Five agents a type, 46 roads: observation 103."""
    return Shape(((5, 103, 46),) * (agents // 5), context, precision, parts=parts)


SHAPES = {
    "BM3IL, N = 50": berlin(),
    "BM3IL, N = 50, nothing described": berlin(parts=()),
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
    learner.update(batch, batch.rewards, 0.0)
    multiply, product_gflop = product()
    seconds, product_seconds = [], []
    for _ in range(REPEATS):
        seconds.append(processor_seconds(lambda: learner.update(batch, batch.rewards, 0.0)))
        product_seconds += [processor_seconds(multiply) for _ in range(3)]
    gflop, median = needed_gflop(shape, learner.layout), statistics.median(seconds)
    rate = product_gflop / statistics.median(product_seconds)
    return {
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "gflop": gflop,
        "gflop_per_second": rate,
        "ratio": median * rate / gflop,
    }


def needed_gflop(shape: Shape, layout: Layout) -> float:
    """Of the products in Eq. 8, 10, 11 and 13, for one epoch. A product that is learned through costs three times what
    it costs forward, or twice if nothing lies before it that learns."""
    total, hidden = 0.0, shape.hidden
    agents, types = layout.spec.num_agents, layout.spec.num_types
    for block in layout.blocks:
        numbers = sum(run.width for run in block.form.runs if _is_multiplied(run))
        widths = (*shape.policy_hidden, block.action_dim)
        policy = sum(a * b for a, b in pairwise(widths))
        head = (hidden if shape.context == "none" else 2 * hidden) * hidden + hidden * block.action_dim
        seen, others = 0.0, 0.0
        if shape.context == "agents":  # embedded with their actions, and projected to keys and values
            seen, others = numbers * hidden, (2 + 1) * hidden * hidden + 2 * agents * hidden
        elif shape.context == "types":
            others = hidden * hidden + 2 * types * hidden
        first = numbers * (shape.policy_hidden[0] + hidden) + seen
        learned, fixed = 2 * first + 3 * (policy + head + others), first + policy + head + others
        total += block.num_agents * (learned + fixed)
    return 2 * shape.rows * total / 1e9


def _is_multiplied(run: Run) -> bool:
    return run.kind in ("own", "shared")


def product() -> tuple[Callable[[], object], float]:
    """A batched product of the critics' size into memory that is there already, and its GFLOP."""
    a, b, out = torch.randn(50, 1000, 256), torch.randn(50, 256, 128), torch.empty(50, 1000, 128)
    return lambda: torch.bmm(a, b, out=out), 2 * 50 * 1000 * 256 * 128 / 1e9


def processor_seconds(run: Callable[[], object]) -> float:
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
    generator = torch.Generator().manual_seed(0)
    kinds = [TypeSpec(f"type-{m}", *t, parts=shape.parts) for m, t in enumerate(shape.types)]
    tables = ()
    if shape.parts:
        kinds = [replace(kind, mask="place") for kind in kinds]
        roads = [torch.randperm(46, generator=generator)[:NEXT_ROADS].tolist() for _ in range(46)]
        tables = (("place", tuple(map(tuple, roads))),)
    layout = Layout.of(EnvironmentSpec("random", tuple(kinds), 100, tables=tables), shape.parameter_sharing)
    policy = Policy(layout, shape.policy_hidden, generator)
    critic = Critic(layout, shape.context, shape.hidden, HEADS, True, generator)
    settings = LearnerSettings(hidden=shape.hidden, heads=HEADS, precision=shape.precision)
    learner = ActorCritic(policy, critic, settings, torch.device("cpu"), 0)
    return learner, random_batch(layout, shape.rows, generator)


def random_batch(layout: Layout, rows: int, generator: torch.Generator) -> Batch:
    """Rows as `layout` describes them."""

    def numbers(dtype: str, shape: tuple[int, ...], below: int = 0) -> torch.Tensor:
        if dtype == "float32":
            return torch.randn(shape, generator=generator)
        if dtype == "bool":
            return torch.rand(shape, generator=generator) < 0.9
        return torch.randint(below, shape, generator=generator, dtype=getattr(torch, dtype))

    def seen() -> list[Observations]:
        return [
            Observations(
                block.form,
                {
                    name: numbers(dtype, shape, max(block.form.code_sizes, default=0))
                    for name, (dtype, shape) in block.form.table_of(rows).items()
                },
            )
            for block in layout.blocks
        ]

    agents = [(block, (rows, block.num_agents)) for block in layout.blocks]
    active = [torch.ones(shape, dtype=torch.bool) for _, shape in agents]
    actions = [numbers("int64", shape, block.action_dim) for block, shape in agents]
    return Batch(
        rows=JointRows(seen(), actions, active),
        next_observations=seen(),
        next_active=active,
        rewards=[torch.rand(shape, generator=generator) for _, shape in agents],
        terminated=torch.rand(rows, generator=generator) < 0.01,
    )


if __name__ == "__main__":
    main()
