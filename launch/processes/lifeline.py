"""A process must not outlive the one that started it, even if that one is killed without a word; nor may what it
started outlive it, as the processes of a simulator would."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from bm3il.launch.surroundings import module_command

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
END = signal.SIGUSR1
"""What a guard hears when all shall end at once: from its parent, or from the kernel when that has ended."""
POLL_SECONDS = 1.0
"""After which a guard looks around even if no signal came."""


def bind_to_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent, process `parent`, ends (Linux; elsewhere nothing
    happens).

    The parent's spawning *thread* is what counts: spawn from a thread that lives as long as the process.
    """
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it had already ended before the line above
            os._exit(1)


def command(program: list[str], guarded: bool = False) -> list[str]:
    """The command that runs `program` bound to this process; the binding survives the exec.

    guarded: it runs below a small process that waits for it, and then ends whatever it has left behind.
    """
    return module_command("bm3il.launch.processes.lifeline", "guard" if guarded else "bind", str(os.getpid()), *program)


def guard(parent: int, program: list[str]) -> None:
    """Run a program, and end as it ended: with its exit code, or by the signal that killed it. By then all that it
    started is killed, whatever sessions it made for them."""
    # Blocked before anybody can send them: END would kill this process, and `sigtimedwait` takes blocked ones only.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, END})
    bind_to_parent(parent, END)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the program hears them, too, and has a say in when it ends
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # whose parent has ended becomes a child of this process
    own = os.getpid()
    child = os.fork()
    if not child:
        # What is ignored or blocked stays so across the exec.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, END})
        # If the guard does not end, `Child.wait` kills it: its program must not outlive that.
        bind_to_parent(own)
        os.execv(program[0], program)
    while (status := _reaped(child)) is None:
        heard = signal.sigtimedwait({signal.SIGCHLD, END}, POLL_SECONDS)
        if heard is not None and heard.si_signo == END:
            os.kill(child, signal.SIGKILL)
    _end_children()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its core, if any, is written
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})  # it may be END
        os.kill(own, -code)
    os._exit(code)


def _reaped(child: int) -> int | None:
    """Take leave of those that have ended; the status of `child` if it is among them."""
    found = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if process == child:
            found = status
        if not process:
            return found


def _end_children() -> None:
    """Kill the children that are left, and theirs, which become ours as soon as their parents are gone."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children")
    while children.exists() and (left := children.read_text(encoding="utf-8").split()):
        for process in map(int, left):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _prctl(option: int, value: int) -> None:
    # The standard library has no prctl.
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        guard(int(sys.argv[2]), sys.argv[3:])
    bind_to_parent(int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])
