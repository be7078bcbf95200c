"""E copies of a world whose simulators are other processes, over the wire of `protocol.adapters.wire`."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from bm3il.protocol.adapters.session import Session
from bm3il.protocol.adapters.wire import (
    BITS,
    FLOATS,
    HELO,
    INTEGERS,
    MAX_BODY_BYTES,
    MAX_SEED,
    RESET,
    SHOW,
    SPEC,
    STEP,
    VERSION,
    Described,
    described,
)
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec


class Copies:
    """Follows `protocol.environment.Environment`.

    What simulators show is checked before anybody sees it. Agents that are inactive see zeros; an episode that has
    ended shows nothing any more, whatever the simulator says of it; one that has not ended after `episode_length` steps
    is cut off.
    """

    def __init__(
        self, name: str, target: str, num_envs: int, processes: int, seconds: float, start_seconds: float
    ) -> None:
        """name: of the environment.   target: as `Session` takes it.   processes: over how many the copies are spread,
        at most.   seconds: longest wait for an answer.   start_seconds: longest wait for the first one.

        Raises InputError for what cannot be started, or describes itself in a way that cannot be meant;
        SimulatorError for a simulator that fails, is silent, or is not there."""
        for option, value in (("num_envs", num_envs), ("processes", processes)):
            if value < 1:
                raise InputError(f"{name}: expected {option} ≥ 1, got {value}")
        for option, limit in (("seconds", seconds), ("start_seconds", start_seconds)):
            if not 0 < limit < 1e6:
                raise InputError(f"{name}: expected {option} above 0, got {limit:g}")
        self._name, self.num_envs, self._seconds, self._step = name, num_envs, seconds, 0
        ends = np.linspace(0, num_envs, min(processes, num_envs) + 1).astype(int).tolist()
        self._parts = [slice(first, end) for first, end in pairwise(ends)]
        self._sessions = [Session(name, target, start_seconds) for _ in self._parts]
        self._described = self._introduced(start_seconds)
        self.spec = self._described.spec
        self._now = _blank(self.spec, num_envs)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes; each copy has a seed of its own, whichever process it is in. Raises InputError for
        given start states."""
        if starts:
            raise InputError(f"{self.spec.name} cannot start from given states: choose --evaluation.starts fresh")
        seeds = np.array([derive_seed(seed, "remote", e) % MAX_SEED for e in range(self.num_envs)], "<u4")
        for session, part in zip(self._sessions, self._parts, strict=True):
            session.tell(RESET, seeds[part].tobytes(), self._seconds)
        self._step, now = 0, self._shown()
        if (now.terminated | now.truncated).any():
            self._refuse("an episode has ended before its first step")
        for rewards in now.rewards:
            rewards[:] = 0
        self._now = self._settle(now, now)
        return self._now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all copies. actions: per type [E, X_m] integers, or [E, X_m, A_m] in [-1, 1]."""
        if (self._now.terminated | self._now.truncated).all():
            self._now = self._settle(_blank(self.spec, self.num_envs), self._now)
            return self._now
        for session, part in zip(self._sessions, self._parts, strict=True):
            chosen = zip(self.spec.types, actions, strict=True)
            body = b"".join(a[part].astype(INTEGERS if t.discrete else FLOATS).tobytes() for t, a in chosen)
            session.tell(STEP, body, self._seconds)
        self._step += 1
        self._now = self._settle(self._shown(), self._now)
        return self._now

    def close(self) -> None:
        """End the simulators that were started, and hang up on the others."""
        # All of them first: they then end side by side, and not one after the other.
        for session in self._sessions:
            session.hang_up()
        for session in self._sessions:
            session.close()

    def _introduced(self, seconds: float) -> Described:
        """What they all say of themselves."""
        for session, part in zip(self._sessions, self._parts, strict=True):
            hello = {"protocol": VERSION, "environments": part.stop - part.start}
            session.tell(HELO, json.dumps(hello).encode(), seconds)
        texts = [bytes(session.hear(SPEC, seconds)) for session in self._sessions]
        found = [described(text, self._name) for text in dict.fromkeys(texts)]
        if any(other != found[0] for other in found):
            raise InputError(f"{self._name}: its processes describe themselves in different ways: {found[:2]}")
        # Masks, or actions, count whether they are sent or not: there is room for them here.
        numbers = sum(t.count * (t.observation_dim + t.action_dim + 2) for t in found[0].spec.types)
        if (size := 4 * self.num_envs * numbers) > MAX_BODY_BYTES:
            raise InputError(
                f"{self._name}: a step of {self.num_envs} copies has {size} bytes, at most {MAX_BODY_BYTES} are allowed"
            )
        return found[0]

    def _shown(self) -> TimeStep:
        """The newest step, of all processes."""
        now, sizes = _blank(self.spec, self.num_envs), [part.stop - part.start for part in self._parts]
        bodies = [  # all of them before one is refused: the next answer heard is to the next question
            session.hear(
                SHOW, self._seconds, self._described.show_bytes(envs), partial(self._described.show_in_words, envs)
            )
            for session, envs in zip(self._sessions, sizes, strict=True)
        ]
        for body, part, envs in zip(bodies, self._parts, sizes, strict=True):
            first = 0
            for field, m, dtype, shape in self._described.table(envs):
                array = np.frombuffer(body, dtype, math.prod(shape), first).reshape(shape)
                first += array.nbytes
                if dtype == BITS and array.max() > 1:
                    self._refuse(f"{field} must be bytes of 0 and 1, got {array.max()}")
                target = getattr(now, field)
                (target[m] if isinstance(target, list) else target)[part] = array
        return now

    def _settle(self, now: TimeStep, before: TimeStep) -> TimeStep:
        """What follows from what was shown, for those who have ended and who are not there."""
        ended = before.terminated | before.truncated
        now.terminated[ended] = before.terminated[ended]
        now.truncated |= self._step == self.spec.episode_length
        now.truncated &= ~now.terminated
        now.truncated[ended] = before.truncated[ended]
        for t, seen, masks, active, rewards in zip(
            self.spec.types, now.observations, now.action_masks, now.active, now.rewards, strict=True
        ):
            active[ended], rewards[ended] = False, 0
            seen[~active], masks[~active] = 0, True
            if not np.isfinite(seen).all():
                e, x, o = np.argwhere(~np.isfinite(seen))[0]
                what = f"{seen[e, x, o]} as its number {o}{_of_part(t, o)}"
                self._refuse(f"{_agent(t, e, x)} observes {what}, expected finite numbers")
            if not (free := masks.any(axis=-1)).all():
                self._refuse(f"{_agent(t, *np.argwhere(~free)[0])} is active, and its mask allows nothing")
        return now

    def _refuse(self, text: str) -> None:
        raise SimulatorError(f"environment '{self._name}': {text}")


def _agent(kind: TypeSpec, e: int, x: int) -> str:
    return f"agent {x} of type '{kind.name}' in copy {e}"


def _of_part(kind: TypeSpec, number: int) -> str:
    """Of which part a number of an observation is, if the parts have names."""
    ends = list(accumulate(part.width for part in kind.parts))
    return f" ('{kind.parts[bisect(ends, number)].name}')" if ends else ""


def _blank(spec: EnvironmentSpec, envs: int) -> TimeStep:
    """Everybody is active and may do everything."""
    return TimeStep(
        observations=[np.zeros((envs, t.count, t.observation_dim), np.float32) for t in spec.types],
        action_masks=[np.ones((envs, t.count, t.action_dim), bool) for t in spec.types],
        active=[np.ones((envs, t.count), bool) for t in spec.types],
        rewards=[np.zeros((envs, t.count), np.float32) for t in spec.types],
        terminated=np.zeros(envs, bool),
        truncated=np.zeros(envs, bool),
    )
