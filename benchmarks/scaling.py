"""Time and memory of an update as agents, types and widths grow: `python benchmarks/scaling.py [--json]`.

One thread, one process for each shape; processor time, so that other work disturbs it little. Slopes are of the
logarithms, least squares: 1 is linear. MA-DAAC's attention over all agents is there to show what the mean fields save.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from learning import Shape, berlin, memory, problem, processor_seconds

LARGEST_SLOPE = 1.05
LARGEST_OF_WIDTHS = 5.0
ROWS, REPEATS = 64, 5
COUNTS, TYPES, ATTENDED = (50, 500, 5_000), (10, 30, 100), (50, 150, 450)
WIDTHS = range(20, 120)
"""Of the observations of a hundred types; their mean is the one width that all have for comparison."""


def crowd(agents: int, types: int, context: str = "types") -> Shape:
    """So many agents of so many types, Berlin's observations, networks per type as on it."""
    (kind, *_), parts = berlin().types, berlin().parts
    of_type = ((agents // types, *kind[1:]),) * types
    return Shape(of_type, context, hidden=64, policy_hidden=(64, 64), rows=ROWS, parameter_sharing="type", parts=parts)  # type: ignore[arg-type]


def widths(different: bool) -> Shape:
    """A hundred types of ten agents whose observations are of one width, or of a hundred."""
    mean = round(statistics.mean(WIDTHS))
    types = tuple((10, width if different else mean, 8) for width in WIDTHS)
    return replace(crowd(100, 10), types=types, parts=())


SHAPES = {
    **{f"N = {n}, 10 types": crowd(n, 10) for n in COUNTS},
    **{f"N = 1000, {m} types": crowd(1_000, m) for m in TYPES},
    **{f"MA-DAAC, N = {n}": crowd(n, 10, "agents") for n in ATTENDED},
    "100 types of one width": widths(False),
    "100 types of 100 widths": widths(True),
}


def main() -> int:
    """Print the table (JSON with `--json`); 1 if time or memory grow faster than the agents."""
    torch.set_num_threads(1)
    if "--shape" in sys.argv:
        print(json.dumps(measure(SHAPES[sys.argv[-1]])))
        return 0
    figures = {}
    for name in SHAPES:
        command = [sys.executable, __file__, "--shape", name]
        figures[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if "--json" not in sys.argv:
            print(describe(name, figures[name]), flush=True)
    slopes = {
        "N, seconds": slope(COUNTS, [figures[f"N = {n}, 10 types"]["seconds"] for n in COUNTS]),
        "N, bytes": slope(COUNTS, [figures[f"N = {n}, 10 types"]["megabytes"] for n in COUNTS]),
        "types, seconds": slope(TYPES, [figures[f"N = 1000, {m} types"]["seconds"] for m in TYPES]),
        "MA-DAAC, seconds": slope(ATTENDED, [figures[f"MA-DAAC, N = {n}"]["seconds"] for n in ATTENDED]),
    }
    of_widths = figures["100 types of 100 widths"]["seconds"] / figures["100 types of one width"]["seconds"]
    if "--json" in sys.argv:
        print(json.dumps({"shapes": figures, "slopes": slopes, "widths": of_widths}))
    else:
        print("; ".join(f"slope of {name}: {value:.2f}" for name, value in slopes.items()))
        print(f"100 widths take {of_widths:.2f} times what one takes")
    grows = max(slopes["N, seconds"], slopes["N, bytes"]) > LARGEST_SLOPE
    return int(grows or of_widths > LARGEST_OF_WIDTHS)


def measure(shape: Shape) -> dict[str, float]:
    """Seconds of an update (median, least, most) and the megabytes that it adds to what is there."""
    megabytes = memory(shape)["updates"]
    learner, batch = problem(shape)
    learner.update(batch, batch.rewards, 0.0)
    seconds = [processor_seconds(lambda: learner.update(batch, batch.rewards, 0.0)) for _ in range(REPEATS)]
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "megabytes": max(1.0, megabytes),
    }


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def describe(name: str, figures: dict[str, float]) -> str:
    least, mid, most = (1_000 * figures[which] for which in ("least", "seconds", "most"))
    return f"{name:26} {mid:9.1f} ms [{least:.1f}–{most:.1f}]  {figures['megabytes']:7.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
