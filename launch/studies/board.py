"""How far each of several runs is, and how long all of them will take."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from bm3il.launch.progress import duration
from bm3il.launch.result import curve_rows, last_logged
from bm3il.launch.studies.pool import LOG, finished

PLAIN_LINE_SECONDS = 10.0
NAME_WIDTH, BAR_WIDTH = 32, 16
"""The longest name that is shown whole; with the figures beside it, a line is 80 columns."""


@dataclass(frozen=True)
class Position:
    """How far a run is, from its folder. Returns are true ones per agent and episode, None before they are known.

    wall_seconds: that its training has taken.
    """

    started: bool
    iteration: int
    wall_seconds: float
    return_mean: float | None
    start_return: float | None

    @classmethod
    def of(cls, folder: Path) -> Position:
        """What can be read of `log.jsonl` and `curve.csv`; a line that is being written is left out."""
        returns: dict[int, float] = {}
        with suppress(ValueError, LookupError, TypeError):  # of a row that is being written
            for row in curve_rows(folder):
                returns[int(row["iteration"])] = float(row["return_mean"])
        last = last_logged(folder)
        newest = returns[max(returns)] if returns else None
        reached = last.get("iteration", 0), last.get("wall_seconds", 0.0)
        return cls((folder / LOG).exists(), *reached, newest, returns.get(0))

    @property
    def text(self) -> str:
        """For people."""
        parts = (("return", self.return_mean), ("at the start", self.start_return))
        known = ", ".join(f"{name} {value:.1f}" for name, value in parts if value is not None)
        return known or ("preparing: random play, and the clone" if self.started else "waiting")


@dataclass(frozen=True)
class Pace:
    """Which part of a run is done, 0..1, and in how many seconds. Runs of a kind should take as long as each other."""

    kind: str
    part: float
    seconds: float


def seconds_left(paces: Sequence[Pace], jobs: int) -> float | None:
    """Until all are done, if `jobs` of them go on at a time. What has not begun is taken to last as long as others of
    its kind, or else as others do; None if nothing has begun."""
    begun = [(pace.kind, pace.seconds / pace.part) for pace in paces if pace.part > 0 and pace.seconds > 0]
    if not begun:
        return None
    left = []
    for pace in paces:
        alike = [seconds for kind, seconds in begun if kind == pace.kind] or [seconds for _, seconds in begun]
        whole = pace.seconds / pace.part if pace.part > 0 and pace.seconds > 0 else sum(alike) / len(alike)
        left.append(max(0.0, 1 - pace.part) * whole)
    # However many go on at once, nothing ends before the longest of them.
    return max(*left, sum(left) / jobs)


class Board:
    """Bars of the runs that are under way and of all together in a terminal, elsewhere a line every ten seconds.

    iterations, kinds: of each run, see `Pace`.   jobs: how many go on at a time.
    """

    def __init__(self, iterations: Mapping[Path, int], kinds: Mapping[Path, str], jobs: int, console: Console) -> None:
        self._iterations, self._kinds, self._jobs, self._console = iterations, kinds, jobs, console
        self._positions = {folder: Position.of(folder) for folder in iterations}
        self._running: set[Path] = set()
        self._last_line = -PLAIN_LINE_SECONDS
        columns = (
            TextColumn("{task.description}", table_column=Column(max_width=NAME_WIDTH, no_wrap=True)),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        add = self._bars.add_task
        self._tasks = {folder: add(folder.name, total=n, text="", visible=False) for folder, n in iterations.items()}
        self._all = add("all", total=len(iterations), text="")

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, running: Collection[Path], failed: Mapping[Path, str]) -> None:
        """Where the runs are now."""
        # Also those that ended since: their last figures are read once more.
        changed = self._running | set(running)
        self._running = set(running)
        for folder in changed:
            self._positions[folder] = Position.of(folder)
        ended = sum(folder in failed or finished(folder) for folder in self._iterations)
        seconds = seconds_left([self._pace(f) for f in self._iterations if f not in failed], self._jobs)
        left = f"left {duration(seconds)}" if seconds else ""
        if self._console.is_terminal:
            for folder in changed:
                now, visible = self._positions[folder], folder in running
                total = self._total(folder)
                self._bars.update(
                    self._tasks[folder], completed=now.iteration, total=total, text=now.text, visible=visible
                )
            self._bars.update(self._all, completed=ended, text=left)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            parts = [self._line(folder) for folder in self._iterations if folder in running]
            parts.append(f"all {ended}/{len(self._iterations)}")
            self._console.print("; ".join([*parts, left] if left else parts), markup=False)

    def _line(self, folder: Path) -> str:
        now = self._positions[folder]
        return f"{folder.name} {now.iteration}/{self._total(folder)} {now.text}"

    def _total(self, folder: Path) -> int:
        """Iterations of a run: more than were expected where episodes end early, since a budget counts their steps."""
        return max(self._iterations[folder], self._positions[folder].iteration)

    def _pace(self, folder: Path) -> Pace:
        now = self._positions[folder]
        return Pace(self._kinds[folder], now.iteration / self._total(folder), now.wall_seconds)
