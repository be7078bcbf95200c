"""A child of `protocol.pool`: it plays its share of the copies of an environment, as it is asked to."""

from __future__ import annotations

import json
import os
import select
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from safetensors.numpy import load

from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.pool import BAD, GOOD, array_table, arrays_in
from bm3il.protocol.registry import make_share
from bm3il.protocol.trajectories import columns_of
from bm3il.protocol.working_folder import look_there_last


def main(arguments: Sequence[str]) -> None:
    """Answer until asked to close. arguments: the name of the environment, the first of its copies, the one after the
    last, E, and the descriptors of the socket and of the shared memory."""
    look_there_last()
    name, *numbers = arguments
    first, end, num_envs, socket, memory = map(int, numbers)
    # First of all: a simulator that takes minutes to load shall not outlive its parent by them either.
    threading.Thread(target=_end_with, args=(socket,), daemon=True).start()
    share, link = Share(name, slice(first, end), num_envs, memory), Connection(socket)
    with suppress(EOFError, OSError):
        while (request := link.recv_bytes()) != b"close":
            link.send_bytes(_answer(share, request))
    share.close()


class Share:
    """The copies `rows` of an environment of E, and their rows in memory."""

    def __init__(self, name: str, rows: slice, num_envs: int, memory: int) -> None:
        self._name, self._rows, self._num_envs, self._memory = name, rows, num_envs, memory

    def make(self) -> bytes:
        """Its spec."""
        rows = self._rows
        self._environment = make_share(self._name, rows.stop - rows.start, rows.start)
        return json.dumps(self._environment.spec.to_json()).encode()

    def map(self) -> None:
        """The memory has its size now."""
        spec = self._environment.spec
        self._arrays = arrays_in(self._memory, array_table(spec, self._num_envs), self._rows)
        self._actions = [self._arrays[f"actions.{m}"] for m in range(spec.num_types)]

    def reset(self, seed: int, starts: bytes) -> None:
        self._show(self._environment.reset(seed, load(starts) or None))

    def step(self) -> None:
        self._show(self._environment.step(self._actions))

    def close(self) -> None:
        """Free what it holds, if it was made and can do that."""
        close = getattr(getattr(self, "_environment", None), "close", None)
        if callable(close):
            close()

    def _show(self, now: TimeStep) -> None:
        for b, seen in enumerate(now.seen(self._environment.spec)):
            for name, column in columns_of(self._arrays, b).items():
                column[:] = seen.columns[name].numpy()
        for m, (active, rewards) in enumerate(zip(now.active, now.rewards, strict=True)):
            self._arrays[f"active.{m}"][:], self._arrays[f"rewards.{m}"][:] = active, rewards
        self._arrays["terminated"][:], self._arrays["truncated"][:] = now.terminated, now.truncated


def _answer(share: Share, request: bytes) -> bytes:
    word, _, given = request.partition(b" ")
    try:
        match word:
            case b"make":
                return GOOD + share.make()
            case b"map":
                share.map()
            case b"reset":
                seed, _, starts = given.partition(b"\n")
                share.reset(int(seed), starts)
            case b"step":
                share.step()
    except Exception as error:
        # Of a subclass, too: the other side knows InputError by its name alone.
        kind = InputError if isinstance(error, InputError) else type(error)
        told = {"kind": kind.__name__, "text": str(error), "traceback": traceback.format_exc()}
        return BAD + json.dumps(told).encode()
    return GOOD


def _end_with(socket: int) -> None:
    """End this process, whatever it does, when nobody holds the other end of the socket."""
    hung_up = select.poll()
    hung_up.register(socket, 0)  # asks for nothing: that the other end is closed is always told
    hung_up.poll()
    os._exit(1)
