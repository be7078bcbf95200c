"""Who guards a process ends as it ended, and leaves nothing of it behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bm3il.launch.processes import lifeline

SIMULATOR = """
import subprocess, sys, time
for session in (True, False):
    shell = ["sh", "-c", "sleep 60 & echo; sleep 60", sys.argv[1]]
    subprocess.Popen(shell, start_new_session=session, stdout=subprocess.PIPE).stdout.readline()
print("up", flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""
GUARDING = """
import subprocess, sys, time
from bm3il.launch.processes import lifeline
subprocess.Popen(lifeline.command([sys.executable, "-c", *sys.argv[1:]], guarded=True), start_new_session=True)
time.sleep(60)
"""


def started(token: str, seconds: float) -> subprocess.Popen[str]:
    command = lifeline.command([sys.executable, "-c", SIMULATOR, token, str(seconds)], guarded=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def family(token: str) -> list[int]:
    """The shells of a simulator and their children that are there."""
    shells = [p for p in psutil.process_iter(["cmdline", "status"]) if _is_shell(p, token)]
    return [p.pid for shell in shells for p in (shell, *shell.children())]


def _is_shell(process: psutil.Process, token: str) -> bool:
    return (process.info["cmdline"] or [])[:1] == ["sh"] and process.info["cmdline"][-1] == token


def worker_of(guard: subprocess.Popen[str]) -> psutil.Process:
    return psutil.Process(guard.pid).children()[0]


@pytest.fixture
def token() -> str:
    return f"token-{time.time_ns()}"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda guard: None, 7),
        (lambda guard: worker_of(guard).kill(), -signal.SIGKILL),
        (lambda guard: worker_of(guard).send_signal(signal.SIGSEGV), -signal.SIGSEGV),
        (lambda guard: worker_of(guard).send_signal(signal.SIGUSR1), -signal.SIGUSR1),
        (lambda guard: guard.terminate(), 7),  # a guard does not end before what it guards
        (lambda guard: guard.send_signal(lifeline.END), -signal.SIGKILL),
    ],
    ids=["itself", "killed", "crashed", "by the signal of guards", "the guard terminated", "at once"],
)
def test_nothing_is_left_however_it_ended(end: Callable[[subprocess.Popen[str]], None], code: int, token: str) -> None:
    guard = started(token, 0.7)
    there = family(token)
    assert len(there) >= 4
    end(guard)
    assert guard.wait(10) == code
    assert not [pid for pid in there if psutil.pid_exists(pid)]


def test_nothing_is_left_once_its_parent_is_killed(token: str) -> None:
    command = [sys.executable, "-c", GUARDING, SIMULATOR, token, "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(lifeline.__file__).parents[1]) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        there = family(token)
        parent.kill()
    deadline = time.monotonic() + 5
    while left := [pid for pid in there if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
