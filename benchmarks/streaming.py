"""Async mode: `python benchmarks/streaming.py [wire] [busy] [scaling] [efficiency] [--json FILE]`.

wire: MB/s of chunks from an actor's socket into the replay, beside raw pyzmq at the same message size with one copy.
busy: the part of its time in which the learner of a Rover Tower run computes instead of waiting.
scaling: joint steps per second of 1 to 32 actors, when every step of the environment takes 10 ms more.
efficiency: what a fresh step teaches in async mode, beside lockstep, over five seeds of Rover Tower. A quarter hour,
and only when asked for.
All ratios are inside one run. All but the first start whole runs with `bm3il train`, on whatever else the machine does.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import zmq
from scipy.integrate import trapezoid
from scipy.stats import bootstrap

from bm3il.actors.policy import Policy
from bm3il.actors.settings import ActorSettings
from bm3il.learner.replay import Replay
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.learner.streaming import StreamedExperience
from bm3il.protocol.channels import Client
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Chunk, Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

ENVIRONMENT, EPISODES = "berlin?scenario=berlin46&types=10&agents=50", 4
CHUNKS, WARM_UP, ROUNDS = 100, 8, 5
WANTED_WIRE, WANTED_BUSY, WANTED_SCALING, WANTED_EFFICIENCY = 0.6, 0.95, 0.9, 0.9
SEEDS, EFFICIENCY_STEPS, LEVEL = (1, 2, 3, 4, 5), 120_000, 0.8
WAITING = ("collect", "query", "wait_for_particles")
LATENCY = """
import time
from bm3il.actors.environments.rover_tower import RoverTower

class Slow(RoverTower):
    def step(self, actions):
        time.sleep(0.01)
        return super().step(actions)
"""


def wire() -> dict[str, float]:
    """Medians over rounds of MB/s, and their ratio; sender and receiver have a core each."""
    torch.set_num_threads(1)
    arrays = _chunk()
    megabytes = sum(array.nbytes for array in arrays.values()) / 1e6
    ours, raw = [], []
    for _ in range(ROUNDS):
        ours.append(CHUNKS * megabytes / _time_ours())
        raw.append(CHUNKS * megabytes / _time_raw(arrays))
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    return {
        "chunk_megabytes": megabytes,
        "bm3il_megabytes_per_second": statistics.median(ours),
        "pyzmq_megabytes_per_second": statistics.median(raw),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _chunk() -> dict[str, np.ndarray]:
    spec = make_environment(ENVIRONMENT, 1).spec
    table = Trajectories.array_table(spec, spec.episode_length, EPISODES)
    # Written, as by a rollout: pages that never were are all one page, which every cache holds.
    arrays = {name: np.full(shape, 0, dtype) for name, (dtype, shape) in table.items()}
    arrays["lengths"][:] = spec.episode_length
    return arrays


def _time_ours() -> float:
    with tempfile.TemporaryDirectory() as folder:
        endpoints = Endpoints(*(f"ipc://{folder}/{name}" for name in ("e", "w", "r", "c")))
        spec = make_environment(ENVIRONMENT, 1).spec
        steps = EPISODES * spec.episode_length
        job = Job("run", Path(folder), ENVIRONMENT, spec, "", 0, "maac", "async", 0, 1, 1, "type", False, endpoints)
        telemetry = Telemetry("learner", 0, Sender("run", "learner-0"), 0, "127.0.0.1")
        layout = Layout.of_job(job)
        policy = Policy(layout, (4,), torch.Generator().manual_seed(0))
        learner = LearnerSettings(max_policy_lag=4, deadline_seconds=60.0)
        settings = Settings(learner, actor=ActorSettings(steps_per_iteration=steps))
        experience = StreamedExperience(job, settings, telemetry)
        experience.publish("s", 0, policy, 0)
        replay = Replay(layout, 4 * steps)
        process = multiprocessing.get_context("spawn").Process(target=_send_ours, args=(endpoints,))
        process.start()
        for _ in range(WARM_UP):  # the sender is up, the ring was written once
            replay.add(experience.collect(lambda: None)[0])
        start = time.perf_counter()
        for _ in range(CHUNKS):
            replay.add(experience.collect(lambda: None)[0])
        seconds = time.perf_counter() - start
        process.join()
        experience.close()
        telemetry.close()
    return seconds


def _send_ours(endpoints: Endpoints) -> None:
    arrays = _chunk()
    steps = make_environment(ENVIRONMENT, 1).spec.episode_length
    client = Client(endpoints.experience, Sender("run", "actor-0"), lambda _: {}, lambda _: None)
    for _ in range(WARM_UP + CHUNKS):
        while client.pending >= 2:
            client.pump(0.1)
        client.submit(Chunk("s", 0, 0, 0, steps, EPISODES, 0.0), arrays)
    while client.pending:
        client.pump(0.1)


def _time_raw(arrays: dict[str, np.ndarray]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.bind(f"ipc://{folder}/raw")
        size = sum(array.nbytes for array in arrays.values())
        process = multiprocessing.get_context("spawn").Process(target=_send_raw, args=(f"ipc://{folder}/raw", size))
        process.start()
        ring = np.zeros((4, size), np.uint8)
        for number in range(WARM_UP):
            ring[number % 4] = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)
        start = time.perf_counter()
        for number in range(CHUNKS):
            ring[number % 4] = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)
        seconds = time.perf_counter() - start
        process.join()
        socket.close(linger=0)
    return seconds


def _send_raw(endpoint: str, size: int) -> None:
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.set_hwm(2)
    socket.connect(endpoint)
    data = np.full(size, 0, np.uint8)  # written, as ours is
    for _ in range(WARM_UP + CHUNKS):
        socket.send(data, copy=False)
    socket.close(linger=60_000)
    zmq.Context.instance().term()  # the memory that is being sent must outlive the last chunk


def busy(folder: Path) -> dict[str, float]:
    """From a quarter of the run on: one minus waiting seconds per second."""
    with _run(folder, "busy", "--preset", "rover_tower_8", "--steps", "120000", "--actors", "1") as run:
        first = _until(run, 30_000)
        last = _until(run, 110_000)
    waiting = {stage: last.seconds(stage) - first.seconds(stage) for stage in WAITING}
    wall = last.time - first.time
    return {"busy": 1 - sum(waiting.values()) / wall, "wall_seconds": wall} | waiting


def scaling(folder: Path) -> dict[str, float]:
    """Joint steps per second by number of actors, and the smallest part of linear."""
    package = folder / "slow"
    (package / "slow-1.0.dist-info").mkdir(parents=True)
    (package / "slow_environment.py").write_text(LATENCY)
    (package / "slow-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1.0\n")
    points = "[bm3il.environments]\nslow = slow_environment:Slow\n"
    (package / "slow-1.0.dist-info" / "entry_points.txt").write_text(points)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    rates: dict[str, float] = {}
    for actors in (1, 2, 4, 8, 16, 32):
        cheap = ["--learner.updates", "1", "--learner.batch-size", "32", "--reward.updates", "1"]
        size = ["--steps", "100000000", "--actors", str(actors), "--actor.steps-per-iteration", str(400 * actors)]
        options = [*("--environment", "slow?pairs=4", "--demonstrations", "rover_tower_8"), *cheap, *size]
        options += ["--learner.checkpoint-interval", "100000", "--evaluation.interval", "100000"]
        options += ["--evaluation.starts", "fresh", "--evaluation.final-episodes", "1", "--reward.batch-size", "32"]
        with _run(folder, f"actors-{actors}", *options) as run:
            first = _until(run, 4000 * actors)
            time.sleep(10)
            last = _scrape(run)
            assert last is not None
        rates[str(actors)] = (last.steps - first.steps) / (last.time - first.time)
    return rates | {"linear": min(rate / rates["1"] / int(actors) for actors, rate in rates.items())}


def efficiency(folder: Path) -> dict[str, Any]:
    """Lockstep over async: the steps to a normalised return of 0.8; async over lockstep: the area under the curve.

    Pairs of runs of one seed with the same updates per fresh step; means over seeds, with 95 % bootstrap intervals.
    """
    curves = {}
    for seed in SEEDS:
        for mode in ("lockstep", "async"):
            name = f"{mode}-{seed}"
            steps = ["--steps", str(EFFICIENCY_STEPS), "--evaluation.interval", "5", "--actors", "2"]
            command = ["train", "--preset", "rover_tower_8", "--mode", mode, "--seed", str(seed), "--run", name, *steps]
            with (folder / f"{name}.log").open("w") as log:
                start = [sys.executable, "-m", "bm3il.launch.cli", *command, "--runs-folder", str(folder)]
                subprocess.run(start, stdout=log, stderr=log, check=True)
            curves[mode, seed] = _curve(folder / name)
            print(name, f"steps to {LEVEL}: {_steps_to(curves[mode, seed]):.0f}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for mode in ("lockstep", "async"):
        result[f"{mode}_steps"] = [_steps_to(curves[mode, seed]) for seed in SEEDS]
        result[f"{mode}_area"] = [float(trapezoid(*curves[mode, seed][::-1])) / EFFICIENCY_STEPS for seed in SEEDS]
        result[f"{mode}_final"] = [float(curves[mode, seed][1][-1]) for seed in SEEDS]
    ratios = {
        "steps": np.array(result["lockstep_steps"]) / np.array(result["async_steps"]),
        "area": np.array(result["async_area"]) / np.array(result["lockstep_area"]),
    }
    for name, ratio in ratios.items():
        interval = bootstrap((ratio,), np.mean, random_state=0).confidence_interval
        result |= {name: float(ratio.mean()), f"{name}_interval": [float(interval.low), float(interval.high)]}
    return result | {"efficiency": min(result["steps"], result["area"])}


def _curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with (run / "curve.csv").open(newline="") as file:
        rows = [(float(row["env_steps"]), float(row["normalized_return"])) for row in csv.DictReader(file)]
    steps, returns = np.array(rows).T
    return steps, returns


def _steps_to(curve: tuple[np.ndarray, np.ndarray]) -> float:
    """Where the curve first passes the level, on the straight line between two evaluations."""
    steps, returns = curve
    after = int(np.argmax(returns >= LEVEL))
    if not after:
        raise ValueError(f"the curve ends at {returns[-1]:.2f} and never passes {LEVEL}")
    part = (LEVEL - returns[after - 1]) / (returns[after] - returns[after - 1])
    return float(steps[after - 1] + part * (steps[after] - steps[after - 1]))


class Scraped:
    """The learner's metrics at a time."""

    def __init__(self, text: str) -> None:
        self.time, self._text = time.monotonic(), text
        found = re.search(r"^bm3il_learner_env_steps (\S+)", text, re.M)
        self.steps = float(found.group(1)) if found else 0.0

    def seconds(self, stage: str) -> float:
        """All seconds spent in a stage."""
        found = re.search(rf'^bm3il_learner_stage_seconds_sum{{stage="{stage}"}} (\S+)', self._text, re.M)
        return float(found.group(1)) if found else 0.0


@contextmanager
def _run(folder: Path, name: str, *options: str) -> Iterator[Path]:
    command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--mode", "async", "--run", name]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--runs-folder", str(folder), *options], stdout=log, stderr=log)
        try:
            yield folder / name
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _until(run: Path, steps: int) -> Scraped:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (scraped := _scrape(run)) is not None and scraped.steps >= steps:
            return scraped
        time.sleep(0.2)
    raise TimeoutError(f"{run} did not come to {steps} steps; see its .log")


def _scrape(run: Path) -> Scraped | None:
    try:
        targets = json.loads((run / "targets.json").read_text())
        address = next(t["targets"][0] for t in targets if t["labels"]["role"] == "learner")
        return Scraped(urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode())
    except (OSError, StopIteration, ValueError):
        return None


IN_RUNS = {"busy": busy, "scaling": scaling, "efficiency": efficiency}


def main() -> None:
    """Measure, print, and fail if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="wire, busy, scaling, efficiency; default: the first three")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    parts, missed, results = given.parts or ["wire", "busy", "scaling"], [], dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            results[part] = wire() if part == "wire" else IN_RUNS[part](Path(folder))
            print(part, json.dumps(results[part]))
    if given.json:
        given.json.write_text(json.dumps(results))
    bars = {"wire": ("ratio", WANTED_WIRE), "busy": ("busy", WANTED_BUSY), "scaling": ("linear", WANTED_SCALING)}
    bars["efficiency"] = ("efficiency", WANTED_EFFICIENCY)
    for part, (figure, wanted) in bars.items():
        if part in results and results[part][figure] < wanted:
            missed.append(f"{part}: {results[part][figure]:.2f}, wanted {wanted}")
    assert not missed, "; ".join(missed)


if __name__ == "__main__":
    main()
