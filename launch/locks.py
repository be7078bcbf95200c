"""One writer at a time in a folder: the lock of its `.lock`, which is given back however its holder ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bm3il.protocol.errors import InputError

LOCK_TRIES, LOCK_PAUSE_SECONDS = 5, 0.02
"""Who only looks whether a run is running holds its lock for some microseconds."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this launcher. Raises InputError if another one holds it."""
    with (folder / ".lock").open("wb") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise InputError(f"{folder} is being run by another process") from error
        yield


def lock(file: IO[bytes], tries: int = LOCK_TRIES) -> None:
    """Raises BlockingIOError if somebody holds it for longer than so many tries, by default than a look takes
    (`is_running`)."""
    for left in reversed(range(tries)):
        try:
            # The kernel gives it back however its holder ends: a killed run can be resumed, and is shown as killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(LOCK_PAUSE_SECONDS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder of runs exists, and nobody else writes into it. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; take another --runs-folder") from error
    with locked(folder):
        yield


def is_running(folder: Path) -> bool:
    """Whether a launcher holds the run. It only looks: also into a folder in which one may not write."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an exclusive one wants, on NFS, a file to be written
    except BlockingIOError:
        return True
    except OSError:  # nobody has held it yet
        return False
    return False
