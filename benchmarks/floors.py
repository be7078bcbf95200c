"""What the machine can do at best: floors that the benchmarks measure in their own run and compare themselves with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, after one run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(
    left: tuple[int, int, int] = (50, 1000, 256),
    right: tuple[int, int, int] = (50, 256, 128),
    dtype: torch.dtype = torch.float32,
    repeats: int = 11,
) -> float:
    """GFLOP/s of the batched product left · right on the threads that torch has, into memory that is there already."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in (left, right))
    out = torch.empty(left[0], left[1], right[2], dtype=dtype)
    seconds = median_seconds(lambda: torch.bmm(a, b, out=out), repeats)
    return 2 * left[0] * left[1] * left[2] * right[2] / seconds / 1e9
