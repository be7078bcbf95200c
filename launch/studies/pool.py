"""Several runs at once on this machine, a process each: started or gone on with, watched, ended in order."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bm3il.launch.processes.child import Child
from bm3il.launch.processes.supervisor import THREAD_VARIABLES, StopRequests
from bm3il.launch.result import read_result
from bm3il.launch.surroundings import module_command
from bm3il.launch.topology import Process

POLL_SECONDS = 0.5
LOG = "run.log"
"""In the folder of a run: what its process wrote."""

Watch = Callable[[Collection[Path], Mapping[Path, str]], None]
"""Is told which runs have a process, and which have failed and why."""


def finished(folder: Path) -> bool:
    """Whether the run came to its end."""
    return read_result(folder).get("status") == "finished"


def resumed(folder: Path) -> list[str]:
    """The command that goes on with a run."""
    return module_command("bm3il.launch.cli", "resume", str(folder))


@dataclass(frozen=True)
class Work:
    """What the process of a run does, with so many threads of its arithmetic; `done` says if nothing is left of it."""

    command: Callable[[Path], list[str]] = resumed
    done: Callable[[Path], bool] = finished
    threads: int = 1


def run_all(
    folders: Sequence[Path], jobs: int, stopped: StopRequests, watch: Watch, work: Work | None = None
) -> dict[Path, str]:
    """Do what is not done in these folders, each of which holds a `config.yaml`, at most `jobs` at once.

    A run that fails does not keep the others from going on. Asked to stop, all write their checkpoints and end; asked
    twice, they end at once. `watch` is called while waiting. Call from the main thread (see `lifeline`).
    Returns the runs that failed, and why in one line; those that were stopped have not failed.
    """
    work = work or Work()
    waiting = deque(folder for folder in folders if not work.done(folder))
    running: dict[Path, Child] = {}
    before: dict[Path, tuple[str, str]] = {}
    failed: dict[Path, str] = {}
    heard = 0
    while running or (waiting and not stopped.count):
        while waiting and len(running) < jobs and not stopped.count:
            folder = waiting.popleft()
            before[folder] = _error(folder)
            running[folder] = _start(folder, work)
        if stopped.count > heard:
            heard = stopped.count
            for child in running.values():
                child.send(signal.SIGTERM if heard == 1 else signal.SIGKILL)
        watch(running, failed)
        time.sleep(POLL_SECONDS)
        for folder, child in list(running.items()):
            child.listen()  # its pipe would be full after some thousand iterations, and the run would wait for ever
            if not child.alive:
                del running[folder]
                child.wait()
                # By what lies in the folder and not by the exit code, as the next call will judge what is left to do.
                if not work.done(folder) and not stopped.count:
                    failed[folder] = _why(folder, child, before[folder])
    watch(running, failed)
    return failed


def _start(folder: Path, work: Work) -> Child:
    env = os.environ | dict.fromkeys(THREAD_VARIABLES, str(work.threads))  # all processes together have the cores
    child = Child(Process("run", 0, 0), work.command(folder), "", folder / LOG, env)
    child.spawn()
    return child


def _error(folder: Path) -> tuple[str, str]:
    """Of the run's result, and of which start it is."""
    result = read_result(folder)
    return str(result.get("error", "")), str(result.get("run_id", ""))


def _why(folder: Path, child: Child, before: tuple[str, str]) -> str:
    code = child.exit_code or 0
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    now = _error(folder)
    # What was there before is of an earlier start: this one was refused, and had no result.
    words = (now[0] if now != before else "") or child.last_words()
    return (words.strip().splitlines() or [f"ended with code {code}"])[-1].removeprefix("bm3il: ")
