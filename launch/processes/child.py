"""A process that a supervisor keeps alive."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from bm3il.launch.processes import lifeline
from bm3il.launch.surroundings import module_command
from bm3il.launch.topology import Process
from bm3il.protocol.errors import SimulatorError
from bm3il.protocol.telemetry import DONE_FD, TRAINED

TAIL_BYTES, TAIL_LINES = 16_384, 80
"""Of its log, to show how a process ended: a traceback through torch has so many lines."""

SIMULATOR_FAILED = f"{SimulatorError.__module__}.{SimulatorError.__qualname__}: "
RAISED_FROM = "\nThe above exception was the direct cause of the following exception:\n"
"""As Python writes them."""

GUARD_SECONDS = 2.0
"""Until whoever guards a process has ended it and all that it started."""


def worker_command(process: Process) -> list[str]:
    """The program of a process."""
    return module_command("bm3il.launch.processes.worker", process.role, str(process.index))


def _nameless_file() -> IO[bytes]:
    """In memory where the system can: the temporary folder may be full."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stdin"), "w+b")
    return tempfile.TemporaryFile()


class Child:
    """One process, over all its starts. Its output is appended to `log`.

    crashes: the times (monotonic seconds) of crashes that still count.   start_at: when it shall be started again.
    done: the largest number that it has told as done.   fruitless_starts: those since it last told a new one.
    trained: whether it has told that the policy of the run is final.
    """

    def __init__(self, process: Process, command: list[str], stdin: str, log: Path, env: Mapping[str, str]) -> None:
        self.process, self.log = process, log
        self.crashes: deque[float] = deque()
        self.start_at: float | None = None
        self._command, self._stdin, self._env = command, stdin, env
        self.done, self.fruitless_starts, self.trained = 0, 0, False
        self._log_start = 0
        self._done_pipe: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Start it, bound to this process: call from the main thread (see `lifeline`)."""
        self.start_at = None
        self.log.parent.mkdir(parents=True, exist_ok=True)  # whoever cleans up logs does not end the run
        with self.log.open("ab") as output, _nameless_file() as stdin:
            self._log_start = output.tell()
            stdin.write(self._stdin.encode())
            stdin.seek(0)
            self._forget_pipe()
            self._done_pipe, told = os.pipe()
            # `listen` is called in the loop that watches all processes of the node, and must not wait for one of them.
            os.set_blocking(self._done_pipe, False)
            self._popen = subprocess.Popen(
                lifeline.command(self._command, guarded=True),
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self._env, DONE_FD: str(told)},
                pass_fds=(told,),
                # Ctrl-C in a terminal must reach the supervisor alone, which ends its processes in their order.
                start_new_session=True,
            )
            os.close(told)
            self.fruitless_starts += 1

    def listen(self) -> None:
        """Take in what it tells (`Telemetry.done`)."""
        if self._done_pipe is None:
            return
        with suppress(BlockingIOError):
            while told := os.read(self._done_pipe, 1 << 12):
                # A learner that went back to a checkpoint tells old numbers again; others begin anew at each start.
                numbers = [int(line) for line in told.split() if line.isdigit()]
                newest = max(numbers, default=0)
                self.trained |= TRAINED in told.split()
                if newest > self.done or (newest and self.process.role != "learner"):
                    self.done, self.fruitless_starts = newest, 0

    def _forget_pipe(self) -> None:
        if self._done_pipe is not None:
            os.close(self._done_pipe)
            self._done_pipe = None

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Negative for the signal that killed it; None while it is alive or waits for its next start."""
        return None if self._popen is None else self._popen.poll()

    def restart_after(self, delay_seconds: float) -> None:
        """Be started again after a while."""
        self._popen = None
        self.start_at = time.monotonic() + delay_seconds

    def send(self, number: signal.Signals) -> None:
        """A signal to it and to its group; SIGKILL to whatever it started. Its next start is cancelled."""
        self.start_at = None
        if self.alive and self._popen is not None:
            if number == signal.SIGKILL:
                # The guard must live: nobody else can end what the program has started in sessions of its own.
                os.kill(self._popen.pid, lifeline.END)
            else:
                os.killpg(self._popen.pid, number)

    def wait(self) -> None:
        """Until it is gone; it must have been killed."""
        self._forget_pipe()
        if self._popen is None:
            return
        try:
            self._popen.wait(GUARD_SECONDS)
        except subprocess.TimeoutExpired:  # its guard was stopped, or waits for a process that the kernel does not end
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def last_words(self) -> str:
        """The last line of its log; of a simulator's failure without the error's name."""
        lines = self._tail().strip().splitlines()
        return lines[-1].removeprefix(SIMULATOR_FAILED) if lines else "its log says nothing; is the disk full?"

    def last_traceback(self) -> str:
        """The last traceback in its log, or the last lines if there is none.

        Of a simulator's failure it is the traceback of what it raised, if it did: how it came to be called is no help.
        """
        text = self._tail()
        starts = [match.start() for match in re.finditer(r"^(Traceback \(most recent|Fatal Python error)", text, re.M)]
        blamed, raised = text.rfind(f"\n{SIMULATOR_FAILED}"), text.rfind(RAISED_FROM)
        if starts and blamed > starts[-1]:
            chained = len(starts) > 1 and starts[-2] < raised < starts[-1]
            cause = text[starts[-2] : raised].rstrip() if chained else ""
            text = cause + text[blamed:].replace(SIMULATOR_FAILED, "", 1)
        elif starts:
            text = text[starts[-1] :]
        return "\n".join(text.strip().splitlines()[-TAIL_LINES:])

    def _tail(self) -> str:
        """The end of what it wrote since its last start; nothing if somebody has removed that."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""
