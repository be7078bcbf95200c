"""Slow simulators side by side: `processes=4` divides the E copies of an environment among so many child processes.

It is an option of every environment whose factory takes `first_copy`: the number of its first copy among all E. The
factory promises that what copy `first_copy + e` does depends on this number, the seed and its actions alone, and on no
other copy; so the results are those of one process, bit for bit.

A child plays neighbouring copies (`protocol.share`). All see the same memory: actions and time steps of the E copies,
of which a child has its rows. Over its socket goes a word for each call, and what went wrong. When the socket closes,
because this process has closed the pool or has ended, the child ends.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import IO

import numpy as np
from safetensors.numpy import save

from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.observations import forms
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec
from bm3il.protocol.trajectories import columns_of

GOOD, BAD = b"+", b"-"
"""How an answer begins: with what was asked for, or with an error in JSON."""
CLOSE_SECONDS = 2.0
"""Until a child that was asked to close is killed."""
ALIGNED_BYTES = 64
PROGRAM = "import sys; sys.path[:] = sys.argv[7:]; from bm3il.protocol.share import main; main(sys.argv[1:7])"
"""Of a child: it finds the modules that this process finds, in the same order."""


class ChildTraceback(Exception):
    """The cause of an error that came from a child: its text is the child's traceback."""


class Pool:
    """An environment whose copies are divided among children; follows `protocol.environment.Environment`.

    Raises SimulatorError for whatever a child raises but InputError, which is for the user, and if a child ends.
    """

    def __init__(self, name: str, num_envs: int, processes: int) -> None:
        """name: of an environment that can be divided, without what is around it.   processes: 1..num_envs."""
        self.num_envs = num_envs
        self._children: list[_Child] = []
        with _shared_file() as memory:
            try:
                for p in range(processes):
                    rows = slice(num_envs * p // processes, num_envs * (p + 1) // processes)
                    self._children.append(_Child(name, rows, num_envs, memory.fileno()))
                told = self._call(b"make" for _ in self._children)
                self.spec = EnvironmentSpec.from_json(json.loads(told[0]))
                table = array_table(self.spec, num_envs)
                # Only now: how much memory there must be follows from the spec, which only a child can tell.
                os.ftruncate(memory.fileno(), _bytes_of(table))
                self._call(b"map" for _ in self._children)
            except BaseException:
                self.close()
                raise
            # The file may be closed afterwards: maps keep its memory.
            self._arrays = arrays_in(memory.fileno(), table)
        self._now = compact_step(
            self.spec,
            [columns_of(self._arrays, b) for b in range(len(self.spec.blocks))],
            active=[self._arrays[f"active.{m}"] for m in range(self.spec.num_types)],
            rewards=[self._arrays[f"rewards.{m}"] for m in range(self.spec.num_types)],
            terminated=self._arrays["terminated"],
            truncated=self._arrays["truncated"],
        )

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """As `Environment.reset`; each child has the start states of its copies."""
        rows = [{name: array[child.rows] for name, array in (starts or {}).items()} for child in self._children]
        self._call(b"reset %d\n" % seed + save({n: np.ascontiguousarray(a) for n, a in part.items()}) for part in rows)
        return self._now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """As `Environment.step`."""
        for m, action in enumerate(actions):
            self._arrays[f"actions.{m}"][:] = action
        self._call(b"step" for _ in self._children)
        return self._now

    def close(self) -> None:
        """Have all children close what they hold, and end."""
        for child in self._children:
            child.ask(b"close")
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._children:
            self._children.pop().end(deadline)

    def _call(self, requests: Iterable[bytes]) -> list[bytes]:
        """What the children answer, all asked at once, each its own request."""
        for child, request in zip(self._children, requests, strict=True):
            child.ask(request)
        answers = [child.answer() for child in self._children]  # all of them: none is left for the next call
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, bytes)]


class _Child:
    """A process with the copies `rows`."""

    def __init__(self, name: str, rows: slice, num_envs: int, memory: int) -> None:
        self.rows = rows
        self._whose = f"environment '{name}'"
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = map(str, (rows.start, rows.stop, num_envs, theirs.fileno(), memory))
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, name, *numbers, *sys.path],
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},  # they share the cores
                pass_fds=(theirs.fileno(), memory),
                start_new_session=True,  # a Ctrl-C is for this process, which ends them
            )
        self._link = Connection(ours.detach())

    def ask(self, request: bytes) -> None:
        with suppress(OSError):  # it has ended: there will be no answer, which tells more
            self._link.send_bytes(request)

    def answer(self) -> bytes | Exception:
        """What it was asked for, or what went wrong."""
        try:
            answer = self._link.recv_bytes()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
            code = self._process.returncode
            return SimulatorError(f"{self._whose}: the process of its {self._copies()} has ended, with code {code}")
        return answer[1:] if answer.startswith(GOOD) else self._error(json.loads(answer[1:]))

    def end(self, deadline: float) -> None:
        """Wait for it to end, and from `deadline` on (monotonic seconds) kill it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._link.close()  # not before: it ends at once when that happens

    def _error(self, told: dict[str, str]) -> Exception:
        if told["kind"] == InputError.__name__:
            return InputError(told["text"])
        error = SimulatorError(f"{self._whose} raised {told['kind']}: {told['text']} (with {self._copies()})")
        error.__cause__ = ChildTraceback(told["traceback"])
        return error

    def _copies(self) -> str:
        return f"copies {self.rows.start}..{self.rows.stop - 1}"


def array_table(spec: EnvironmentSpec, num_envs: int) -> ArrayTable:
    """Name → (dtype, shape) of all that E copies do and show, [E] in front, in the order in which it lies in memory.

    b.own, b.masks, …: columns of the block b.   active.m, rewards.m, actions.m: of the type m.
    """
    table: ArrayTable = {"terminated": ("bool", (num_envs,)), "truncated": ("bool", (num_envs,))}
    for b, form in enumerate(forms(spec)):
        table |= {f"{b}.{name}": entry for name, entry in form.table_of(num_envs).items()}
    for m, kind in enumerate(spec.types):
        agents = (num_envs, kind.count)
        table[f"active.{m}"], table[f"rewards.{m}"] = ("bool", agents), ("float32", agents)
        table[f"actions.{m}"] = ("int64", agents) if kind.discrete else ("float32", (*agents, kind.action_dim))
    return table


def arrays_in(file: int, table: ArrayTable, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Those rows of the arrays of `array_table` in an open file of at least their size."""
    memory, first, arrays = mmap.mmap(file, _bytes_of(table)), 0, {}
    for name, (dtype, shape) in table.items():
        arrays[name] = np.frombuffer(memory, dtype, math.prod(shape), first).reshape(shape)[rows]
        first += _room(dtype, shape)
    return arrays


def _room(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes from an array to the next one."""
    return -(-np.dtype(dtype).itemsize * math.prod(shape) // ALIGNED_BYTES) * ALIGNED_BYTES


def _bytes_of(table: ArrayTable) -> int:
    return sum(_room(dtype, shape) for dtype, shape in table.values())


def _shared_file() -> IO[bytes]:
    """Without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pool"), "w+b")
    return tempfile.TemporaryFile()
