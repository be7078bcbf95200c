"""The place that a process runs in, which is seldom as tidy as a test's: its working folder, its output, its TMPDIR."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from bm3il.protocol.errors import InputError
from bm3il.protocol.working_folder import look_there_last

if TYPE_CHECKING:
    from rich.console import Console

Value = TypeVar("Value")
WIDE = 1 << 16
"""Columns: nothing that we print has so many."""

# Without -P, `-m` looks into the working folder before the standard library: a user's queue.py would be ours.
_OLD_PYTHON = "import sys; sys.path.pop(0); import runpy; sys.argv.pop(0); " + (
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
MODULE_FLAGS = ("-P", "-m") if sys.version_info >= (3, 11) else ("-c", _OLD_PYTHON)


def module_command(module: str, *args: str) -> list[str]:
    """The command that runs one of our modules, whatever files lie in the working folder. See `settle`."""
    return [sys.executable, *MODULE_FLAGS, module, *args]


def cores() -> int:
    """How many this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle() -> None:
    """Make the best of this process's surroundings; the first thing that each of our programs does.

    The working folder comes last in the search for modules, so that environments which lie there are found and nothing
    of ours is hidden. Output loses the letters that the locale does not have, instead of ending the program.
    """
    look_there_last()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def screen(soft_wrap: bool = False) -> Console:
    """Where lines and tables are printed. A terminal's width is kept; whoever reads a pipe or a file gets all of them.

    soft_wrap: lines, but not tables, are left to the terminal to break, for paths and commands that are copied.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=soft_wrap)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=soft_wrap, width=WIDE)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Nobody need read what is printed: a closed pipe, a terminal that is gone or a full disk end the output alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        yield
    finally:
        # While a closed pipe or a full disk is still borne: Python's own flush at the end would raise for it.
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that loses what it cannot write any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._tried(self._stream.flush, None)

    def _tried(self, do: Callable[[], Value], otherwise: Value) -> Value:
        try:
            return do()
        except OSError as error:
            silence(self._stream)
            # Of a closed pipe or a lost terminal nobody need be told; of a full disk somebody may still read.
            if error.errno not in (errno.EPIPE, errno.EIO) and self._stream is not sys.__stderr__:
                print(f"bm3il: cannot write to the standard output: {error.strerror}; it goes on", file=sys.stderr)
            return otherwise


def silence(stream: TextIO) -> None:
    """What is still to be written to a stream goes nowhere; so that it is not tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def private_folder(files: int = 0) -> Iterator[Path]:
    """A temporary folder that only its owner may enter, for sockets and keys.

    Raises InputError if it cannot be made, or has no room for so many files.
    """
    where = os.environ.get("TMPDIR", "the temporary folder")
    try:
        folder = tempfile.TemporaryDirectory(prefix="bm3il-")
        rooms = [Path(folder.name, f"room-{number}") for number in range(files)]
        for room in rooms:
            room.touch()
        for room in rooms:
            room.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {where}: {error.strerror}; set TMPDIR to a folder with room") from error
    with folder as name:
        yield Path(name)
