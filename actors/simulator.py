"""A user's environment, whose faults are told from ours: what it raises, what it shows, and how long it takes."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.errors import InputError, ProtocolError, SimulatorError
from bm3il.protocol.registry import make_environment
from bm3il.protocol.trajectories import Trajectories

LOOK_SECONDS = 1.0
"""Between looks at the clock."""
IDLE_SECONDS = 5.0
"""Without a call after which a process does not play any more, or has not begun to."""
DEAF_SECONDS = 10.0
"""By which a step that does not even let another thread look at the clock may exceed its time."""
STDERR = 2
"""By its number: what stands in for `sys.stderr` need have no file."""


class Simulator:
    """E copies of an environment, stepped together; follows `protocol.environment.Environment`.

    Raises SimulatorError, naming the environment, for whatever it raises but InputError, which is for the user.
    """

    def __init__(self, name: str, num_envs: int, after_step: Callable[[], None] = lambda: None) -> None:
        """after_step: called whenever it has come back from a step."""
        self._name, self._after_step = name, after_step
        with self._blamed():  # for as long as it likes: to load a large world may take longer than any of its steps
            self._inner: Environment = make_environment(name, num_envs)
        self.spec, self.num_envs = self._inner.spec, num_envs

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """As `Environment.reset`."""
        with self._blamed(), _watched(self._name, "reset"):
            return self._inner.reset(seed, starts)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """As `Environment.step`."""
        with self._blamed(), _watched(self._name, "step"):
            now = self._inner.step(actions)
        # Outside of the blame and of the clock: what our own callback raises or takes is no fault of the environment.
        self._after_step()
        return now

    def check(self, played: Trajectories) -> None:
        """Raise SimulatorError if it showed what no environment may: numbers that are not finite, codes that there are
        not. True rewards may be anything: imitation does not read them."""
        try:
            played.check()
        except ProtocolError as error:
            raise SimulatorError(f"environment '{self._name}': {error}") from error

    def close(self) -> None:
        """Free what it holds, if it can; how that goes is of no importance any more."""
        close = getattr(self._inner, "close", None)
        if callable(close):
            with suppress(Exception), _watched(self._name, "close"):
                close()

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except (InputError, SimulatorError):  # which name it themselves
            raise
        except Exception as error:
            raise SimulatorError(f"environment '{self._name}' raised {type(error).__name__}: {error}") from error


class _Clock:
    """Since when this process waits for which environment, and when it last began to."""

    def __init__(self) -> None:
        self.inside: tuple[str, str, float] | None = None
        self.began = time.monotonic()  # as if at the start: the first call may be the one that hangs


_clock = _Clock()


@contextmanager
def _watched(name: str, what: str) -> Iterator[None]:
    _clock.began = time.monotonic()
    _clock.inside = name, what, _clock.began
    try:
        yield
    finally:
        _clock.inside = None


def end_if_hung(patience_seconds: float) -> None:
    """Have this process end, as by a SimulatorError, once a call of an environment takes longer than that.

    It cannot be interrupted, and what it waits for may be anything; so its actor is started again. Its stack is in the
    log. Call once, in a process that may be started again.
    """
    _started(patience_seconds, threading.Event())


@contextmanager
def ending_if_hung(patience_seconds: float) -> Iterator[None]:
    """The same while the block lasts, for a command that plays and comes to an end."""
    done = threading.Event()
    watch = _started(patience_seconds, done)
    try:
        yield
    finally:
        done.set()
        watch.join()
        faulthandler.cancel_dump_traceback_later()


def _started(patience_seconds: float, done: threading.Event) -> threading.Thread:
    args = patience_seconds, _end, done
    thread = threading.Thread(target=_watch, args=args, name="simulator-clock", daemon=True)
    thread.start()
    return thread


def _watch(patience_seconds: float, end: Callable[[str], None], done: threading.Event) -> None:
    # A patience of less than a few looks is kept to within a quarter.
    while not done.wait(min(LOOK_SECONDS, patience_seconds / 4)):
        # Read once: the thread that plays may leave the call at any moment.
        inside = _clock.inside
        # A call that holds the interpreter stops this thread, too: then another clock, which needs no interpreter. It
        # runs while there are calls, since a learner may be deaf for longer at other times.
        if inside is not None or time.monotonic() - _clock.began < IDLE_SECONDS:
            faulthandler.dump_traceback_later(patience_seconds + DEAF_SECONDS, exit=True, file=STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()
        if inside is not None and time.monotonic() - inside[2] > patience_seconds:
            name, what, _ = inside
            end(f"environment '{name}' has not come back from '{what}' for {patience_seconds:.0f} s")


def _end(text: str) -> None:
    faulthandler.cancel_dump_traceback_later()
    faulthandler.dump_traceback(STDERR)
    with suppress(OSError):
        # Like the last line of a traceback, by which the supervisor knows whose fault it was (launch.processes.child).
        os.write(STDERR, f"{SimulatorError.__module__}.{SimulatorError.__name__}: {text}\n".encode())
    os._exit(1)
