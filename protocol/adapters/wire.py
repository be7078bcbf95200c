"""The wire between bm3il and a simulator in any language; docs/remote.md tells it to those who write the other end.

A message is a head of 8 bytes, the kind as four letters and the length of the body as uint32, and the body. All numbers
are little-endian. bm3il asks (`HELO`, `RSET`, `STEP`), the simulator answers (`SPEC`, `SHOW`, or `FAIL` with a reason).
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.specs import EnvironmentSpec

VERSION = 1
HELO, RESET, STEP = b"HELO", b"RSET", b"STEP"
SPEC, SHOW, FAIL = ANSWERS = b"SPEC", b"SHOW", b"FAIL"
HEAD = struct.Struct("<4sI")
MAX_TEXT_BYTES, MAX_BODY_BYTES = 1 << 20, 1 << 30
MAX_SEED = 2**32
PER_WRITE_BYTES = 1 << 16
"""What a pipe takes at once, usually."""
FLOATS, INTEGERS, BITS = "<f4", "<i4", "u1"
CLOSED = -1
KEYS = ("protocol", "name", "episode_length", "types")
TYPE_KEYS = ("name", "count", "observation_dim", "action_dim", "discrete", "masks", "active", "parts", "purpose")


class Line:
    """Bytes to and from a simulator. Each call has a deadline, in monotonic seconds.

    Raises TimeoutError when that has passed, EOFError or OSError when the other end is gone.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        """Takes over the two descriptors, which may be one."""
        self._read, self._write = read_fd, write_fd
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)

    def send(self, kind: bytes, body: bytes, deadline: float) -> None:
        """A whole message."""
        left = memoryview(HEAD.pack(kind, len(body)) + body)
        while left:
            try:
                left = left[os.write(self._write, left[:PER_WRITE_BYTES]) :]
            except BlockingIOError:
                _wait(self._write, select.POLLOUT, deadline)

    def receive(self, count: int, deadline: float) -> bytearray:
        """So many bytes."""
        data = bytearray(count)
        left = memoryview(data)
        while left:
            try:
                taken = os.readv(self._read, [left])
            except BlockingIOError:
                _wait(self._read, select.POLLIN, deadline)
                continue
            if not taken:
                raise EOFError("the end of what it sends")
            left = left[taken:]
        return data

    def close(self) -> None:
        """Hang up, if that has not been done."""
        for fd in {self._read, self._write} - {CLOSED}:
            os.close(fd)
        self._read = self._write = CLOSED


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("no answer")


@dataclass(frozen=True)
class Described:
    """What a simulator says of itself: its spec, and which of its types tell masks and activity."""

    spec: EnvironmentSpec
    masks: tuple[bool, ...]
    active: tuple[bool, ...]

    def table(self, envs: int) -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
        """Field, number of the type, dtype and shape of each array in the body of a `SHOW`, in their order."""
        types = list(enumerate(self.spec.types))
        for m, t in types:
            yield "observations", m, FLOATS, (envs, t.count, t.observation_dim)
        for m, t in types:
            yield "rewards", m, FLOATS, (envs, t.count)
        for m, t in types:
            if self.masks[m]:
                yield "action_masks", m, BITS, (envs, t.count, t.action_dim)
        for m, t in types:
            if self.active[m]:
                yield "active", m, BITS, (envs, t.count)
        for field in ("terminated", "truncated"):
            yield field, 0, BITS, (envs,)

    def show_bytes(self, envs: int) -> int:
        """Length of the body of a `SHOW`."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for _, _, dtype, shape in self.table(envs))

    def show_in_words(self, envs: int) -> str:
        """What the body of a `SHOW` is made of, as the end of a sentence."""
        arrays = []
        for field, m, dtype, shape in self.table(envs):
            of_type = f" of {self.spec.types[m].name}" * (len(shape) > 1)
            arrays.append(f"{field}{of_type} {'×'.join(map(str, shape))} {np.dtype(dtype)}")
        return f"; it is made of {', '.join(arrays)}"


def described(text: bytes, name: str) -> Described:
    """From the body of a `SPEC`, untrusted, for the environment of this name.

    Raises InputError: another version, no JSON, keys missing or misspelt, values out of their limits.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: expected SPEC to hold JSON, got {text[:60]!r}: {error}") from error
    _check_keys(name, "SPEC", told, KEYS, KEYS)
    if told["protocol"] != VERSION:
        raise InputError(
            f"{name} speaks version {told['protocol']!r} of the wire protocol, this bm3il speaks {VERSION}: see "
            "docs/remote.md"
        )
    for key, kind in (("name", str), ("types", list)):
        if not isinstance(told[key], kind):
            raise InputError(f"{name}: expected '{key}' to be a {kind.__name__}, got {told[key]!r:.60}")
    for each in told["types"]:
        _check_keys(name, "a type of SPEC", each, TYPE_KEYS, TYPE_KEYS[:4])
        _check_type(name, each)
    spec = EnvironmentSpec.from_json(
        {
            "name": name,
            "view": f"remote:{told['name']}",
            "episode_length": told["episode_length"],
            "types": [
                {key: value for key, value in t.items() if key not in ("masks", "active")} for t in told["types"]
            ],
        }
    )
    masks, active = (tuple(t.get(flag, False) for t in told["types"]) for flag in ("masks", "active"))
    return Described(spec, masks, active)


def _check_keys(name: str, what: str, value: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{name}: expected {what} to be an object of JSON, got {type(value).__name__}")
    for key in value:
        if key not in known:
            raise InputError(f"{name}: {unknown_name(f'key of {what}', key, known)}")
    if missing := [key for key in needed if key not in value]:
        raise InputError(f"{name}: {what} lacks {', '.join(missing)}")


def _check_type(name: str, told: Mapping[str, Any]) -> None:
    for flag in ("discrete", "masks", "active"):
        if not isinstance(told.get(flag, False), bool):
            raise InputError(f"{name}: type {told['name']!r}: '{flag}' must be true or false, got {told[flag]!r}")
    if told.get("masks") and not told.get("discrete", True):
        raise InputError(f"{name}: type {told['name']!r} has masks, which are of discrete actions only")
    parts = told.get("parts", [])
    for part in parts if isinstance(parts, list) else [parts]:
        _check_keys(name, f"a part of type {told['name']!r}", part, ("name", "width"), ("name", "width"))
