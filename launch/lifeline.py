"""A process must not outlive the one that started it, even if that one is killed without a word."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def bind_to_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends (Linux; elsewhere nothing happens).

    The parent's spawning *thread* is what counts: spawn from a thread that lives as long as the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had already ended before the line above
            os._exit(1)


def command(program: list[str]) -> list[str]:
    """The command that runs `program` bound to this process; the binding survives the exec."""
    return [sys.executable, "-m", "launch.lifeline", str(os.getpid()), *program]


if __name__ == "__main__":
    bind_to_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
