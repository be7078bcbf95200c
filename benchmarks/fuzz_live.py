"""A run that is attacked at all its sockets while it trains, and ends with the policy of one that is left alone."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import psutil
import zmq
from fuzz_cases import corpus, mutated_frames
from fuzz_sockets import BATCH, until

WATCH_SECONDS, START_SECONDS, HELD_SECONDS, END_SECONDS = 0.5, 60.0, 30.0, 600.0
LISTENING = {"learner-0", "reward-server-0", "supervisor-0"}
SMALL = [
    *("--preset", "rover_tower_4", "--environment", "rover_tower?pairs=2", "--demonstrations", "rover_tower_4"),
    *("--seed", "3", "--actor.steps-per-iteration", "100", "--actor.hidden", "16"),
    *("--learner.hidden", "16", "--learner.heads", "2", "--learner.updates", "8", "--learner.batch-size", "64"),
    *("--learner.checkpoint-interval", "5", "--reward.hidden", "16", "--reward.updates", "2"),
    *("--reward.batch-size", "64", "--reward.particles", "2", "--evaluation.interval", "10"),
    *("--evaluation.episodes", "20", "--evaluation.final-episodes", "20"),
]
LAST_WORDS = 1500
"""Characters of each log of a run that went wrong."""
DROPPED = re.compile(r'^bm3il_\w+_dropped_messages_total\{cause="(\w+)"\} (\S+)', re.MULTILINE)


class Live:
    """The attacked run. `sent` by socket, `drops` by process and cause, as its metrics tell.

    Its actor is held before it plays, until everybody who listens has told of drops: so all of the training happens
    under attack, and is not over before the metrics are read, however fast the machine is.
    """

    def __init__(self, folder: Path, dice: random.Random, steps: int, new_bytes: int) -> None:
        self._folder, self._dice, self._new_bytes = folder, dice, new_bytes
        self._options = [*SMALL, "--steps", str(steps)]
        self.sent, self.drops = Counter[str](), dict[tuple[str, str], float]()
        self._workers: dict[str, set[int]] = {}
        self._resident: dict[int, int] = {}

    def attack(self) -> None:
        """Train twice. Raises AssertionError if the attacked run did anything else than the undisturbed one."""
        undisturbed = self._start("undisturbed", "--mode", "serial")
        assert undisturbed.wait(END_SECONDS) == 0
        run = self._start("attacked")
        try:
            self._storm(run)
        finally:
            run.kill()
        assert run.returncode == 0, f"the attacked run ended with {run.returncode}"
        restarted = {role: pids for role, pids in self._workers.items() if len(pids) > 1}
        assert not restarted, f"processes were started again: {restarted}\n{self._said()}"
        first, second = (self._result(name)["policy_sha256"] for name in ("undisturbed", "attacked"))
        assert first == second, "the attacked run learned another policy"
        assert self._told >= LISTENING, f"drops are told by {self._told} only"

    def _said(self) -> str:
        """By the attacked run, of what happened to it: nobody can look when its folder is gone."""
        folder = self._folder / "runs" / "attacked"
        logs = [path for path in (folder / "events.jsonl", *sorted(folder.glob("logs/*.log"))) if path.exists()]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-LAST_WORDS:]}" for path in logs)

    @property
    def _told(self) -> set[str]:
        return {process for process, _ in self.drops}

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        temporary = self._folder / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", name, *self._options, *options]
        log = (self._folder / f"{name}.log").open("wb")
        environment = os.environ | {"TMPDIR": str(temporary)}
        return subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)

    def _result(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self._folder / "runs" / name / "result.json").read_text()))

    def _storm(self, run: subprocess.Popen[bytes]) -> None:
        actor = self._actor(run)
        actor.suspend()
        sockets = self._sockets()
        guessed, known = corpus("guess"), corpus(self._run_id(sockets["weights"]))
        attackers = {name: self._attacker(name, path) for name, path in sockets.items()}
        began, watched, turn, held = time.monotonic(), 0.0, 0, True
        while run.poll() is None:
            assert time.monotonic() < began + END_SECONDS, "the attacked run does not come to its end"
            if time.monotonic() - watched > WATCH_SECONDS:
                watched = time.monotonic()
                self._watch(run.pid)
                if held and (self._told >= LISTENING or watched > began + HELD_SECONDS):
                    actor.resume()
                    held = False
            turn += 1
            if turn % 50 == 0:  # libzmq remembers every prefix of a peer for as long as it is connected
                attackers["weights"].close()
                attackers["weights"] = self._attacker("weights", sockets["weights"])
            for name, attacker in attackers.items():
                messages = self._dice.choice((known, known, known, guessed)).get(name, [])
                self._send(name, attacker, messages)
            time.sleep(0.001)
        for attacker in attackers.values():
            attacker.close()

    def _send(self, name: str, attacker: zmq.Socket[bytes], messages: list[list[bytes]]) -> None:
        while attacker.poll(0):
            attacker.recv_multipart()
        for _ in range(BATCH):
            if messages:
                frames = mutated_frames(self._dice.choice(messages), self._dice)
            else:
                frames = [
                    self._dice.choice((b"\x01", b"\x00", b"")) + self._dice.randbytes(self._dice.choice((0, 9, 500)))
                ]
            try:
                attacker.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:  # it has enough for now
                return
            self.sent[name] += 1

    def _sockets(self) -> dict[str, Path]:
        names = ("experience", "rewards", "control", "weights")

        def found() -> dict[str, Path]:
            paths = {name: list(self._folder.glob(f"tmp/bm3il-*/{name}-0")) for name in names}
            return {name: found[0] for name, found in paths.items() if found}

        until(lambda: len(found()) == len(names), "the run listens", START_SECONDS)
        return found()

    def _actor(self, run: subprocess.Popen[bytes]) -> psutil.Process:
        """The process of the actor, as soon as it exists: it needs seconds to be ready to play."""
        found: list[psutil.Process] = []

        def exists() -> bool:
            time.sleep(0.01)
            for child in psutil.Process(run.pid).children(recursive=True):
                with suppress(psutil.Error):
                    command = child.cmdline()
                    works = command[-3:] == ["bm3il.launch.processes.worker", "actor", "0"]
                    if works and "bm3il.launch.processes.lifeline" not in command:
                        found.append(child)
            return bool(found)

        until(exists, "the run has an actor", START_SECONDS)
        return found[0]

    def _run_id(self, weights: Path) -> str:
        with zmq.Context.instance().socket(zmq.SUB) as listener:
            listener.subscribe(b"")
            listener.connect(f"ipc://{weights}")
            assert listener.poll(START_SECONDS * 1000), "nobody broadcasts weights"
            return str(msgpack.unpackb(listener.recv_multipart()[0])["run"])

    def _attacker(self, name: str, path: Path) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XSUB if name == "weights" else zmq.DEALER)
        socket.linger, socket.reconnect_ivl = 0, 1
        socket.set_hwm(64)
        socket.connect(f"ipc://{path}")
        return socket

    def _watch(self, pid: int) -> None:
        """Who was started, how much memory they took since, and what they counted."""
        with suppress(psutil.Error):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with suppress(psutil.Error):
                    self._weigh(process)
        with suppress(OSError, ValueError):
            for target in json.loads((self._folder / "runs/attacked/targets.json").read_text()):
                if re.fullmatch(r"127\.0\.0\.1:\d+", address := target["targets"][0]):
                    with suppress(OSError, ValueError):
                        page = urllib.request.urlopen(f"http://{address}/metrics", timeout=1).read().decode()
                        for cause, count in DROPPED.findall(page):
                            self.drops[target["labels"]["process"], cause] = float(count)

    def _weigh(self, process: psutil.Process) -> None:
        command, resident = process.cmdline(), process.memory_info().rss
        if "bm3il.launch.processes.worker" in command and "bm3il.launch.processes.lifeline" not in command:
            pids = self._workers.setdefault(" ".join(command[-2:]), set())
            if process.ppid() not in pids:  # a fork goes by its parent's command until it is another program
                pids.add(process.pid)
        if time.time() - process.create_time() < 10:  # it is still importing
            return
        grown = resident - self._resident.setdefault(process.pid, resident)
        assert grown < self._new_bytes, f"{command} grew by {grown >> 20} MiB under attack"
