"""Resident memory of processes over time, for benchmarks that must not grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import psutil

SAMPLE_SECONDS = 0.5


class Memory:
    """Resident bytes of processes, sampled by a thread."""

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._samples: list[tuple[float, list[int]]] = []
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            with suppress(psutil.Error):
                self._samples.append(
                    (time.monotonic(), [process.memory_info().rss for process in self._processes.values()])
                )
            time.sleep(SAMPLE_SECONDS)

    def grown(self, largest: float) -> list[str]:
        """Which processes' peak in the last quarter is more than `largest` times that of the quarter before; prints
        all."""
        samples = list(self._samples)
        times = np.array([moment for moment, _ in samples])
        resident = np.array([sizes for _, sizes in samples]) / 1e6
        second = times >= times[0] + (times[-1] - times[0]) / 2
        last = times >= times[0] + (times[-1] - times[0]) * 3 / 4
        slopes = np.polyfit(times[second] / 60, resident[second], 1)[0]
        peaks = resident[second & ~last].max(0), resident[last].max(0)
        grown = []
        for name, slope, before, after in zip(self._processes, slopes, *peaks, strict=True):
            print(f"{name}: {slope:+.2f} MB a minute; peaks of the last two quarters: {before:.1f} and {after:.1f} MB")
            if after > largest * before:
                grown.append(f"{name} grew from {before:.1f} to {after:.1f} MB")
        return grown
