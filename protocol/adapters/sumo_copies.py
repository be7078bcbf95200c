"""The copies of a traffic network that are played at once, each in a child of this process.

They are forked after the network was read, so a hundred of them start in the time of one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from typing import NoReturn

import numpy as np

from bm3il.protocol.adapters.options import one_line
from bm3il.protocol.adapters.sumo_network import Network, numbered, random_demand, recorded_day, recorded_demand
from bm3il.protocol.adapters.sumo_world import AHEAD, GOAL, OWN, View, World
from bm3il.protocol.adapters.wire import HELO, RESET, SHOW, SPEC, VERSION

RANDOM_DEPARTURES = 0.25
"""The part of an episode in which random trips begin."""
SHOWN, FAILED = b"\1", b"\0"
"""Before what a child shows, and before the reason why it ends."""


class Copy:
    """A child with a world of its own, for as long as this process lives."""

    def __init__(self, world: World, network: Network, vehicles: int, others: list[Copy]) -> None:
        """others: the children before it, whose lines it must not keep open."""
        self._network, self._vehicles = network, vehicles
        self._line, theirs = socket.socketpair()
        if not os.fork():
            for other in (self, *others):
                other._line.close()
            _play(world, theirs, vehicles)
        theirs.close()

    def tell(self, is_step: bool, numbers: np.ndarray) -> None:
        """An action of each vehicle, or a seed."""
        with suppress(OSError):  # of one that has ended, which `view` tells
            # A seed is repeated to the length of actions: the other end reads so many bytes, whichever it is.
            self._line.sendall(np.resize([is_step, *numbers], 1 + self._vehicles).astype("<u4").tobytes())

    def view(self) -> View:
        """Its answer. Raises RuntimeError if there is none, with the reason if it could tell that."""
        size, data = 1 + len(View.empty(self._network, self._vehicles).tobytes()), b""
        with suppress(OSError):
            data = self._line.recv(size, socket.MSG_WAITALL)
            while data.startswith(FAILED) and (more := self._line.recv(size)):
                data += more
        if len(data) < size or not data.startswith(SHOWN):
            told = data[1:].decode(errors="replace") if data.startswith(FAILED) else ""
            raise RuntimeError("the process of a simulation has ended" + f": {told}" * bool(told))
        return View.of(self._network, self._vehicles, data[1:])


def _play(world: World, line: socket.socket, vehicles: int) -> NoReturn:
    """What a child does."""
    code = 0
    try:
        while question := line.recv(4 * (1 + vehicles), socket.MSG_WAITALL):
            is_step, *numbers = np.frombuffer(question, "<u4").tolist()
            view = world.step(numbers) if is_step else world.reset(numbers[0])
            line.sendall(SHOWN + view.tobytes())
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):  # of a parent that has ended, who needs no reason
            line.sendall(FAILED + one_line(error).encode())
        code = 1
    finally:
        sys.stderr.flush()
        # Not sys.exit: what the parent has registered for its own end is no business of a fork.
        os._exit(code)


class Server:
    """Answers questions of the wire."""

    def __init__(
        self,
        path: str,
        routes: str,
        closed: str,
        vehicles: int,
        steps: int,
        interval: int,
        follow: Sequence[str] = (),
    ) -> None:
        """See `protocol.adapters.sumo.Sumo`.

        follow: files of recorded ways, an episode each, which are driven instead: of E copies, number e drives the
        files e, e + E, e + 2E, … in turn. What a vehicle does next is then a number more of what it sees.
        Raises whatever tells that its files cannot be used.
        """
        self._network, self._steps, self._path, self._interval = (
            Network(path, closed.split(",") if closed else ()),
            steps,
            path,
            interval,
        )
        if routes:
            self._demand = recorded_demand(self._network, routes, vehicles)
        else:
            self._demand = random_demand(self._network, vehicles, RANDOM_DEPARTURES * steps * interval)
        self._days = [recorded_day(self._network, file, self._demand) for file in follow]
        self._copies: list[Copy] = []

    def answer(self, kind: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Kind and body of the answer."""
        if kind == HELO:
            copies = json.loads(body)["environments"]
            for e in range(copies):
                days = cycle(self._days[e::copies]) if self._days else None
                world = World(self._network, self._path, replace(self._demand, days=days), self._interval)
                self._copies.append(Copy(world, self._network, len(self._demand.kinds), list(self._copies)))
            return SPEC, json.dumps(self._spec()).encode()
        if kind == RESET:
            questions = np.frombuffer(body, "<u4")[:, None]
        else:
            ends = np.cumsum([len(self._copies) * count for _, count in numbered(self._demand.kinds)])[:-1]
            parts = np.split(np.frombuffer(body, "<u4"), ends)
            questions = np.concatenate([part.reshape(len(self._copies), -1) for part in parts], axis=1)
        for copy, question in zip(self._copies, questions, strict=True):
            copy.tell(kind != RESET, question)
        return SHOW, self._shown([copy.view() for copy in self._copies])

    def _spec(self) -> dict[str, object]:
        parts = [("own", OWN), ("destination", GOAL), *((f"ahead.{k}", AHEAD) for k in range(self._network.most))]
        if self._days:
            parts.append(("taken", 1))
        common = {
            "observation_dim": sum(width for _, width in parts),
            "action_dim": 1 + self._network.most,
            "masks": True,
            "active": True,
            "parts": [{"name": name, "width": width} for name, width in parts],
        }
        types = [{"name": kind, "count": count, **common} for kind, count in numbered(self._demand.kinds)]
        return {"protocol": VERSION, "name": "sumo", "episode_length": self._steps, "types": types}

    def _shown(self, views: list[View]) -> bytes:
        ends = np.cumsum([count for _, count in numbered(self._demand.kinds)])[:-1]
        arrays = {
            name: np.stack([getattr(view, name) for view in views]) for name in ("seen", "rewards", "masks", "active")
        }
        if self._days:
            taken = np.stack([view.taken for view in views])
            arrays["seen"] = np.concatenate([arrays["seen"], taken[..., None]], axis=2)
        floats = [part.tobytes() for array in arrays.values() for part in np.split(array, ends, axis=1)]
        return b"".join(floats) + bytes(view.ended for view in views) + bytes(len(views))
