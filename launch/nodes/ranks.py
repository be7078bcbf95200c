"""The command line's side of a run on several nodes: mpiexec or srun, whose ranks are the nodes' supervisors.

They are waited for, but not for ever, until they have met (`launch.nodes.rendezvous`). From then on the first of them
leads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bm3il.launch.config import Config
from bm3il.launch.nodes.backends import Backend, backend
from bm3il.launch.nodes.rendezvous import MEET_SECONDS, REPORT, START_SECONDS, STOP_LINE
from bm3il.launch.outcome import CRASHED, DEADLINE, INPUT_ERROR, INTERRUPTED, Outcome
from bm3il.launch.processes import lifeline
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.result import concluded
from bm3il.launch.topology import processes_of
from bm3il.protocol.keys import Keys
from bm3il.protocol.specs import EnvironmentSpec

MEETINGS = 3
"""How often the nodes are started if they do not find each other."""
MET = "targets.json"
"""A file of the run folder that is there once the first node leads."""
TELL_SECONDS = 10.0
"""After which it is told, again and again, what is waited for."""
KILL_AFTER_SECONDS = 3.0
LAST_RANK_SECONDS = 10.0
"""How long, once the first node has written down the end, the others have to end: mpiexec waits for a host that lost
its power for ever."""
KEPT_LINES = 1000
NAMED = 5
"""How many nodes are named one by one."""


def run_nodes(config: Config, spec: EnvironmentSpec, folder: Path, run_id: str, stopped: StopRequests) -> Outcome:
    """Run on `config.nodes` nodes; returns how the run ended, as its first node wrote it down, or could only say.

    Raises InputError if the nodes cannot be started as the configuration asks.
    """
    starts = backend(config)
    order: dict[str, Any] = {"run_folder": str(folder), "config_yaml": config.to_yaml()}
    order |= {"spec_json": json.dumps(spec.to_json()), "processes": [asdict(each) for each in processes_of(config)]}
    for attempt in range(1, MEETINGS + 1):
        begin = time.monotonic()
        with _Ranks(starts, config, folder, run_id, stopped) as ranks:
            # New keys for each attempt: a rank that is left from the one before must not get in.
            ranks.tell(json.dumps(order | {"run_id": run_id, "keys": Keys.create().to_text()}))
            gave_up = ranks.wait()
        # What mpiexec or srun return says little (it may be 0 after a lost rank): the first node's word counts.
        if result := concluded(folder, run_id):
            return Outcome(result["exit_code"], result.get("error", ""))
        if said := gave_up or ranks.ended:
            return said
        if ranks.met or attempt == MEETINGS or time.monotonic() - begin > MEET_SECONDS:
            break
        print(f"the nodes did not meet ({ranks.how_it_ended()}); trying again", file=sys.stderr)
    return Outcome(CRASHED, f"the nodes ended without a result ({ranks.how_it_ended()})")


class _Ranks:
    """The program that starts the ranks, at work. What it and they say is held back until they have met; if they do
    not, it tells why."""

    def __init__(self, starts: Backend, config: Config, folder: Path, run_id: str, stopped: StopRequests) -> None:
        self._starts, self._nodes, self._stopped = starts, config.nodes, stopped
        self._folder, self._run_id = folder, run_id
        self._started: set[int] = set()
        self._failure = ""
        self._kept: deque[tuple[bool, str]] = deque(maxlen=KEPT_LINES)  # whether of standard error, and a line
        self._begin = self._changed = self._told_people = time.monotonic()
        self._told_to_stop, self._kill_at = 0, float("inf")
        self._end: Outcome | None = None
        self.ended: Outcome | None = None  # what the first node said of it
        self.met = False
        # From an earlier start, it would say that these nodes have already met.
        (folder / MET).unlink(missing_ok=True)
        # A session of its own: Ctrl-C reaches only this process, which then asks the first node for an orderly end.
        self._program = subprocess.Popen(
            lifeline.command(starts.command(config.network), guarded=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=starts.environment,
        )
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        work = ((self._write,), (self._listen, self._program.stdout, False), (self._listen, self._program.stderr, True))
        self._threads = [threading.Thread(target=run, args=args, name="ranks", daemon=True) for run, *args in work]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._program.wait()
        self.met = self.met or (self._folder / MET).exists()
        self._lines.put(None)
        for thread in self._threads:
            thread.join(KILL_AFTER_SECONDS)  # somebody may have inherited the other end
        self._tell_people()

    def tell(self, line: str) -> None:
        """A line for the first rank."""
        self._lines.put(line)

    def wait(self) -> Outcome | None:
        """Until the program has ended. Returns how the run ended if that is known: it was stopped, or given up, before
        the nodes had met."""
        while self._program.poll() is None:
            self.met = self.met or (self._folder / MET).exists()
            if self._stopped.count > self._told_to_stop:
                self._pass_on_stop()
            if self.met:
                self._tell_people()
                if self._kill_at == float("inf") and concluded(self._folder, self._run_id):
                    self._kill_after(LAST_RANK_SECONDS)
            elif self._end is None:
                self._look()
            if time.monotonic() > self._kill_at:
                self._kill()
            time.sleep(0.1)
        return self._end or (Outcome(INPUT_ERROR, self._failure) if self._failure else None)

    def how_it_ended(self) -> str:
        """For people, in one line; all that was said before the nodes had met is then in a file of the run folder."""
        code = f"code {self._program.returncode}"
        # mpiexec itself says on standard output that something was wrong.
        said = [line for _, line in sorted(self._kept, key=lambda each: not each[0]) if line.strip(" =\r\n")]
        if self.met or not said:
            return code
        log = self._folder / "logs" / "mpi.log"
        with suppress(OSError):
            log.parent.mkdir(exist_ok=True)
            log.write_text("".join(line for _, line in self._kept), encoding="utf-8", errors="replace")
        return f"{code}: {said[0].strip()[:300]}; more: {log}"

    def _pass_on_stop(self) -> None:
        self._told_to_stop = self._stopped.count
        self.tell(STOP_LINE)
        if not self.met and self._end is None:
            self._give_up(Outcome(INTERRUPTED))
        if self._told_to_stop > 1:
            self._kill_after(KILL_AFTER_SECONDS)

    def _look(self) -> None:
        """Whether nodes come, and have met: tell people, and give up some time."""
        now, missing = time.monotonic(), self._missing()
        if self._failure:
            self._give_up(Outcome(INPUT_ERROR, self._failure))
        elif missing and now - self._begin > START_SECONDS and (self._started or not self._starts.queues):
            text = (
                f"{self._named(missing)} did not start within {START_SECONDS:.0f} s: does the host answer (ssh, without"
            )
            self._give_up(Outcome(DEADLINE, f"{text} a password), and is bm3il installed there at the same path?"))
        elif not missing and now - self._changed > MEET_SECONDS:
            text = f"the nodes have started, but did not meet within {MEET_SECONDS:.0f} s: MPI does not get through"
            self._give_up(Outcome(DEADLINE, f"{text}; name the network that all are in with --network"))
        elif now - self._told_people > TELL_SECONDS:
            self._told_people = now
            print(f"{self._waits_for()}, for {now - self._begin:.0f} s now; Ctrl-C ends it", file=sys.stderr)

    def _give_up(self, end: Outcome) -> None:
        self._end = end
        if self._program.poll() is None:
            os.killpg(self._program.pid, signal.SIGTERM)  # its guard does not heed it
        self._kill_after(KILL_AFTER_SECONDS)

    def _kill_after(self, seconds: float) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)

    def _waits_for(self) -> str:
        if self._starts.queues and not self._started:
            return f"waiting for Slurm to start {self._nodes} nodes{self._last_words()}"
        if missing := self._missing():
            return f"waiting for {self._named(missing)} to start{self._last_words()}"
        return "all nodes have started; waiting until they have met"

    def _last_words(self) -> str:
        return f" ({self._kept[-1][1].strip()[:200]})" if self._kept else ""

    def _missing(self) -> list[int]:
        return sorted(set(range(self._nodes)) - self._started)

    def _named(self, nodes: Iterable[int]) -> str:
        hosts = dict(enumerate(self._starts.hosts))
        names = [f"node {node}" + (f" ({hosts[node]})" if node in hosts else "") for node in nodes]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + more

    def _kill(self) -> None:
        """With all that it started here: an ssh that waits for a host would go on waiting."""
        if self._program.poll() is None:
            os.kill(self._program.pid, lifeline.END)

    def _write(self) -> None:
        """In a thread: a program that does not get to read would hold up whoever waits for it."""
        assert self._program.stdin is not None
        with suppress(OSError), self._program.stdin as pipe:
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()

    def _listen(self, pipe: Iterable[bytes], is_error: bool) -> None:
        for line in pipe:
            text = line.decode(errors="replace")
            match _reported(text):
                case ["started", int(node)]:
                    self._started.add(node)
                    self._changed = time.monotonic()
                case ["failed", str(reason)] if not self.met:
                    self._failure = self._failure or reason  # it is that of all
                case ["ended", int(code), str(text)]:
                    self.ended = Outcome(code, text)
                case ["failed", str(reason)]:
                    self._kept.append((True, f"{reason}\n"))
                case _:
                    self._kept.append((is_error, text))

    def _tell_people(self) -> None:
        while self.met and self._kept:
            is_error, line = self._kept.popleft()
            with suppress(OSError):  # nobody may listen any more, and the run goes on all the same
                print(line, end="", file=sys.stderr if is_error else sys.stdout, flush=True)


def _reported(line: str) -> Any:
    word, _, rest = line.strip().partition(" ")
    with suppress(ValueError):
        return json.loads(rest) if word == REPORT else None
    return None
