"""Several runs at once on this machine, a process each: started or gone on with, watched, ended in order."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bm3il.launch.child import Child
from bm3il.launch.run_folder import curve, last_logged, read_result
from bm3il.launch.supervisor import THREAD_VARIABLES, StopRequests
from bm3il.launch.surroundings import module_command
from bm3il.launch.topology import Process

POLL_SECONDS = 0.5
PLAIN_LINE_SECONDS = 10.0
LOG = "run.log"
"""In the folder of a run: what its process wrote."""


def finished(folder: Path) -> bool:
    """Whether the run came to its end."""
    return read_result(folder).get("status") == "finished"


def run_all(folders: Sequence[Path], jobs: int, stopped: StopRequests, watch: Callable[[], None]) -> dict[Path, str]:
    """Run what is not finished of these folders, each of which holds a `config.yaml`, at most `jobs` at once.

    A run that fails does not keep the others from going on. Asked to stop, all write their checkpoints and end; asked
    twice, they end at once. `watch` is called while waiting. Call from the main thread (see `lifeline`).
    Returns the runs that failed, and why in one line; those that were stopped have not failed.
    """
    waiting = deque(folder for folder in folders if not finished(folder))
    running: dict[Path, Child] = {}
    failed: dict[Path, str] = {}
    heard = 0
    while running or (waiting and not stopped.count):
        while waiting and len(running) < jobs and not stopped.count:
            folder = waiting.popleft()
            running[folder] = _start(folder)
        if stopped.count > heard:
            heard = stopped.count
            for child in running.values():
                child.send(signal.SIGTERM if heard == 1 else signal.SIGKILL)
        watch()
        time.sleep(POLL_SECONDS)
        for folder, child in list(running.items()):
            if not child.alive:
                del running[folder]
                if not finished(folder) and not stopped.count:
                    failed[folder] = _why(folder, child)
    watch()
    return failed


def _start(folder: Path) -> Child:
    command = module_command("bm3il.launch.cli", "resume", str(folder))
    env = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")  # there are as many processes as cores
    child = Child(Process("run", 0, 0), command, "", folder / LOG, env)
    child.spawn()
    return child


def _why(folder: Path, child: Child) -> str:
    code = child.exit_code or 0
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    words = str(read_result(folder).get("error", "")) or child.last_words()
    return (words.strip().splitlines() or [f"ended with code {code}"])[-1]


@dataclass(frozen=True)
class Position:
    """How far a run is, from its folder. Returns are true ones per agent and episode, None before they are known."""

    started: bool
    iteration: int
    return_mean: float | None
    clone_return: float | None

    @classmethod
    def of(cls, folder: Path) -> Position:
        """What can be read of `log.jsonl` and `curve.csv`; a line that is being written is left out."""
        returns: dict[int, float] = {}
        with suppress(ValueError, LookupError, TypeError):  # of a row that is being written
            for row in curve(folder):
                returns[int(row["iteration"])] = float(row["return_mean"])
        iteration = last_logged(folder).get("iteration", 0)
        return cls((folder / LOG).exists(), iteration, returns[max(returns)] if returns else None, returns.get(0))

    @property
    def text(self) -> str:
        """For people."""
        parts = (("return", self.return_mean), ("clone", self.clone_return))
        known = ", ".join(f"{name} {value:.1f}" for name, value in parts if value is not None)
        return known or ("preparing" if self.started else "waiting")


class Board:
    """How far each of several runs is: bars in a terminal, elsewhere a line every ten seconds.

    iterations: of each run.
    """

    def __init__(self, folders: Sequence[Path], iterations: int, console: Console) -> None:
        self._folders, self._iterations, self._console = folders, iterations, console
        self._began = time.monotonic()
        self._had = sum(Position.of(folder).iteration for folder in folders)
        self._last_line = -PLAIN_LINE_SECONDS
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        rows = [*(folder.name for folder in folders), "all"]
        totals = [*(iterations for _ in folders), iterations * len(folders)]
        self._tasks = [self._bars.add_task(name, total=n, text="") for name, n in zip(rows, totals, strict=True)]

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self) -> None:
        """Where the runs are now."""
        positions = [Position.of(folder) for folder in self._folders]
        done = sum(position.iteration for position in positions)
        left = self._left(done)
        if self._console.is_terminal:
            texts = [*((position.iteration, position.text) for position in positions), (done, left)]
            for task, (completed, text) in zip(self._tasks, texts, strict=True):
                self._bars.update(task, completed=completed, text=text)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            parts = [
                f"{folder.name} {position.iteration}/{self._iterations} {position.text}"
                for folder, position in zip(self._folders, positions, strict=True)
            ]
            self._console.print("; ".join([*parts, left] if left else parts), markup=False)

    def _left(self, done: int) -> str:
        """As if iterations went on coming as they did since this command began."""
        fresh = done - self._had
        if fresh <= 0:
            return ""
        seconds = (self._iterations * len(self._folders) - done) / fresh * (time.monotonic() - self._began)
        return f"left {timedelta(seconds=round(seconds))}"
