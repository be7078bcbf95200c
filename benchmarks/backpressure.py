"""A learner ten times slower than its actors: `python benchmarks/backpressure.py --seconds 600 --chunk-megabytes 8`.

Four actors of async mode play a world that costs nothing, in processes of their own, and stream to the product's own
learner side, which sleeps ten times as long as they play for a share, and five seconds at least: deaf, as a learner is
while it computes. All bytes to the learner pass through a process that counts them, on the wire, so what the protocol
says beside is counted too.

Prints bytes on the wire against bytes trained on, between two pauses at whose end all actors waited, and the resident
memory of every process: a straight line over the second half of the time, and the peaks of its two quarters. Fails if
there are 2 % more bytes on the wire than trained on, or if a peak grew by a tenth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket as sockets
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from resident_memory import Memory

from bm3il.actors.policy import Policy
from bm3il.actors.process import run_actor
from bm3il.actors.settings import ActorSettings
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.learner.streaming import StreamedExperience
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

ACTORS, STEPS = 4, 25
SLOWER, SHORTEST_PAUSE_SECONDS = 10, 5.0
WIDTH = 1000
"""Numbers that an agent observes: an episode has a tenth of a megabyte."""
WARM_UP = 5
"""Iterations by which the actors' speed is measured."""
BYTES_AT_ONCE = 1 << 20
WANTED_WIRE, WANTED_PEAKS = 1.02, 1.1
WORLD = f"""
import numpy as np
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

class Wide:
    spec = EnvironmentSpec("wide", (TypeSpec("a", 1, {WIDTH}, 2),), {STEPS})

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self._seen = np.random.default_rng(0).normal(size=(num_envs, 1, {WIDTH})).astype(np.float32)
        self._masks, self._active = np.ones((num_envs, 1, 2), bool), np.ones((num_envs, 1), bool)

    def reset(self, seed, starts=None):
        self._step = 0
        return self._now()

    def step(self, actions):
        self._step += 1
        return self._now()

    def _now(self):
        rewards, never = np.zeros((self.num_envs, 1), np.float32), np.zeros(self.num_envs, bool)
        ended = np.full(self.num_envs, self._step >= {STEPS})
        return TimeStep([self._seen], [self._masks], [self._active], [rewards], never, ended)
"""


def install_world(folder: Path) -> None:
    """So that this process and those that it starts know the environment `wide`."""
    info = folder / "wide-1.dist-info"
    info.mkdir()
    (folder / "wide_environment.py").write_text(WORLD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wide\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[bm3il.environments]\nwide = wide_environment:Wide\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def job_of(folder: Path, experience: str) -> Job:
    """The job, of which actors and learner see another address each."""
    endpoints = Endpoints(f"ipc://{folder}/{experience}", *(f"ipc://{folder}/{name}" for name in ("w", "r", "c")))
    spec = make_environment("wide", 1).spec
    return Job("run", folder, "wide", spec, "", 0, "maac", "async", 0, 1, ACTORS, "type", False, endpoints)


def act(folder: Path, settings: ActorSettings, index: int) -> None:
    """An actor of the product."""
    telemetry = Telemetry("actor", index, Sender("run", f"actor-{index}"))
    run_actor(job_of(folder, "wire"), settings, index, telemetry)


def hand_on(folder: Path, counted: Any) -> None:
    """Hand bytes on from whoever connects to `wire` to the learner and back; count those to the learner."""

    def pipe(source: sockets.socket, sink: sockets.socket, counts: bool) -> None:
        buffer = bytearray(BYTES_AT_ONCE)
        with suppress(OSError):
            while size := source.recv_into(buffer):
                sink.sendall(memoryview(buffer)[:size])
                if counts:
                    with counted.get_lock():
                        counted.value += size
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(sockets.SHUT_RDWR)

    listening = sockets.socket(sockets.AF_UNIX)
    listening.bind(f"{folder}/wire")
    listening.listen()
    while True:
        near, far = listening.accept()[0], sockets.socket(sockets.AF_UNIX)
        far.connect(f"{folder}/learner")
        for ends in ((near, far, True), (far, near, False)):
            threading.Thread(target=pipe, args=ends, daemon=True).start()


class Learning:
    """The learner, less what it computes."""

    def __init__(self, experience: StreamedExperience, policy: Policy) -> None:
        self._experience, self._policy, self._version = experience, policy, 0
        experience.publish("s", 0, policy, 0)

    def iterate(self) -> int:
        """Bytes of the chunks of an iteration."""
        taken = sum(chunk.num_bytes for chunk in self._experience.collect(lambda: None))
        self._version += 1
        self._experience.publish("s", self._version, self._policy, 0)
        return taken

    def share_seconds(self) -> float:
        """How long the actors play for an iteration, when nobody lets them wait."""
        self.iterate()
        begun = time.monotonic()
        for _ in range(WARM_UP):
            self.iterate()
        return (time.monotonic() - begun) / WARM_UP

    def go_slow(self, seconds: float, pause_seconds: float, wire: Any) -> tuple[int, int, int]:
        """Iterations in so many seconds, bytes on the wire, bytes taken; from a pause to another."""
        time.sleep(pause_seconds)
        before, iterations, taken, end = wire.value, 0, 0, time.monotonic() + seconds
        while time.monotonic() < end or not iterations:
            taken += self.iterate()
            iterations += 1
            time.sleep(pause_seconds)
        return iterations, wire.value - before, taken


def measure(folder: Path, seconds: float, chunk_megabytes: float) -> tuple[float, list[str]]:
    """Bytes on the wire for one that is trained on, and which processes grew; prints all figures."""
    install_world(folder)
    table = Trajectories.array_table(make_environment("wide", 1).spec, STEPS, 1)
    episode_bytes = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in table.values())
    episodes = max(1, round(chunk_megabytes * 1e6 / episode_bytes))
    acting = ActorSettings(steps_per_iteration=ACTORS * episodes * STEPS, hidden=(4,))
    settings = Settings(LearnerSettings(max_policy_lag=4, deadline_seconds=300.0), actor=acting)
    job, telemetry = job_of(folder, "learner"), Telemetry("learner", 0, Sender("run", "learner-0"))
    policy = Policy(Layout.of_job(job), acting.hidden, torch.Generator().manual_seed(0))
    experience = StreamedExperience(job, settings, telemetry)
    context = multiprocessing.get_context("spawn")
    wire = context.Value("q", 0)
    processes: list[BaseProcess] = [context.Process(target=hand_on, args=(folder, wire), daemon=True)]
    processes += [context.Process(target=act, args=(folder, acting, index), daemon=True) for index in range(ACTORS)]
    for process in processes:
        process.start()
    names = ["learner", "wire", *(f"actor-{index}" for index in range(ACTORS))]
    learning = Learning(experience, policy)
    try:
        share_seconds = learning.share_seconds()
        print(
            f"chunks of {episodes * episode_bytes / 1e6:.1f} MB; a share is played in {share_seconds:.2f} s", flush=True
        )
        memory = Memory(dict(zip(names, [os.getpid(), *(process.pid or 0 for process in processes)], strict=True)))
        iterations, on_wire, taken = learning.go_slow(
            seconds, max(SLOWER * share_seconds, SHORTEST_PAUSE_SECONDS), wire
        )
        grown = memory.grown(WANTED_PEAKS)
    finally:
        for process in processes:
            process.terminate()
        experience.close()
        telemetry.close()
    ratio = on_wire / taken
    print(f"{iterations} iterations: {on_wire / 1e6:.2f} MB on the wire, {taken / 1e6:.2f} MB trained on: {ratio:.4f}")
    return ratio, grown


def main() -> None:
    """Measure, print, and fail if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--chunk-megabytes", type=float, default=8.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratio, missed = measure(Path(folder), given.seconds, given.chunk_megabytes)
    if ratio > WANTED_WIRE:
        missed.append(f"{ratio:.4f} bytes on the wire for one trained on, wanted {WANTED_WIRE}")
    assert not missed, "; ".join(missed)


if __name__ == "__main__":
    main()
