"""What a GPU makes of bm3il: `python benchmarks/gpu.py [--json FILE]`, at most six minutes, no network.

First whether it is right: 20 updates of every kind of learner and of the particles, from the same numbers, on the CPU
and on the GPU. Then how fast: milliseconds, and the device share, the part of that time in which the GPU computed
(without copies), by its own events. Then whether people can train on it: a short run of every algorithm, and one that
goes on from a checkpoint. Without a GPU it says so and ends well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from random_data import EPISODE, shaken, some_batch, some_rows, some_segments
from torch.profiler import ProfilerActivity, profile

from bm3il.actors.policy import Policy
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.algorithms import ALGORITHMS
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.critics import Context, Critic, ValueCritic
from bm3il.learner.settings import ClippedSettings, LearnerSettings
from bm3il.protocol.layout import Layout, ParameterSharing
from bm3il.protocol.settings import Precision
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.settings import KernelScope, RewardSettings

UPDATES = 20
LARGEST_DISTANCE = 1e-4
"""Between the parameters of both devices after `UPDATES` updates in float32, as a part of their norm."""
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONTEXTS: tuple[Context, ...] = ("types", "uniform_types", "agents", "none")
CLI = (sys.executable, "-m", "bm3il.launch.cli")


@dataclass(frozen=True)
class Shape:
    """A problem: `types` are (count, observation_dim, action_dim); `rows` of one update; networks of `hidden`."""

    types: tuple[tuple[int, int, int], ...]
    rows: int
    hidden: int
    parameter_sharing: ParameterSharing
    discrete: bool = True

    @property
    def layout(self) -> Layout:
        types = tuple(TypeSpec(f"type-{m}", *t, discrete=self.discrete) for m, t in enumerate(self.types))
        return Layout.of(EnvironmentSpec("random", types, EPISODE), self.parameter_sharing)


SMALL = Shape(((3, 20, 6), (2, 20, 6), (4, 12, 5)), 200, 32, "type")
TIMED = {
    "Berlin, 50 agents of 10 types": Shape(((5, 103, 46),) * 10, 1_000, 128, "agent"),
    "5,000 agents of 100 types": Shape(((50, 103, 46),) * 100, 256, 64, "type"),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--only", nargs="+", choices=("right", "fast", "usable"), default=("right", "fast", "usable"))
    parser.add_argument("--steps", type=int, default=4_000, help="of each run")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("not run: there is no GPU that this PyTorch can use")
        return 0
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    card = torch.cuda.get_device_name()
    print(f"{card}, PyTorch {torch.__version__}", flush=True)
    figures: dict[str, Any] = {"card": card, "torch": torch.__version__, "distance": {}, "milliseconds": {}, "runs": {}}
    failed = 0
    for name, distance, largest in equality() if "right" in given.only else ():
        figures["distance"][name] = {"distance": distance, "largest": largest}
        failed += not distance <= largest
        verdict = "" if distance <= LARGEST_DISTANCE else "allowed" if distance <= largest else "TOO FAR: at most"
        bound = f" {verdict} {largest:.1e}" if verdict else ""
        print(f"{name:58} CPU to GPU {distance:.1e}{bound}", flush=True)
    for name, timing in timings() if "fast" in given.only else ():
        figures["milliseconds"][name] = timing
        print(f"{name:58} {describe(timing)}", flush=True)
    for name, run in runs(given.steps) if "usable" in given.only else ():
        figures["runs"][name] = run
        failed += run["exit_code"] != 0
        print(f"{name:58} {describe_run(run)}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    return int(failed > 0)


# Right.


def equality() -> Iterator[tuple[str, float, float]]:
    """What was updated, how far the devices came apart, and how far they may."""
    for context in CONTEXTS:
        shape = SMALL if context in ("types", "agents") else dataclasses.replace(SMALL, parameter_sharing="agent")
        for kind in ("actor", "boltzmann", "clipped"):
            yield f"{kind}, context {context}", *_apart(partial(_learned, kind, shape, context, "float32"))
    continuous = dataclasses.replace(SMALL, discrete=False)
    for kind in ("actor", "clipped"):
        yield f"{kind}, continuous actions", *_apart(partial(_learned, kind, continuous, "types", "float32"))
    # Beside float32 on the CPU: products of 8 bits of mantissa, and steps of Adam that follow their signs.
    for kind in ("actor", "clipped"):
        states = [_learned(kind, SMALL, "types", "float32", CPU), _learned(kind, SMALL, "types", "bfloat16", GPU)]
        yield f"{kind}, bfloat16 on the GPU alone", _distance(*states), 0.1
    scopes: tuple[KernelScope, ...] = ("function", "tensor", "network", "none")
    for scope in scopes:
        yield f"particles, kernel on {scope}", *_apart(partial(_particles_after, SMALL, scope))


def _apart(after: Callable[[torch.device, int], list[torch.Tensor]]) -> tuple[float, float]:
    """The distance, and how far it may be: twice what the last bits of the observations do on the CPU alone, if that is
    more. A unit that is just at its ReLU's corner goes one way or the other, and Adam's first steps make much of it.

    Args:
        after: The parameters after the updates on a device, and the seed of the last bits (0: as they are).
    """
    reference = after(CPU, 0)
    distance = _distance(reference, after(GPU, 0))
    if distance <= LARGEST_DISTANCE:
        return distance, LARGEST_DISTANCE
    other = (after(CPU, seed) for seed in range(1, 9))
    return distance, max(LARGEST_DISTANCE, *(2 * _distance(reference, parameters) for parameters in other))


def _learned(
    kind: str, shape: Shape, context: Context, precision: Precision, device: torch.device, last_bits: int = 0
) -> list[torch.Tensor]:
    learner, update = make_learner(kind, shape, context, precision, device, last_bits)
    # A clipped update has as many steps; the second one is recorded.
    for _ in range(2 if kind == "clipped" else UPDATES):
        update()
    return [p.detach().cpu() for network in (learner.policy, learner.critic) for p in network.parameters()]


def _particles_after(shape: Shape, scope: KernelScope, device: torch.device, last_bits: int = 0) -> list[torch.Tensor]:
    model = make_model(shape, scope, device, last_bits=last_bits)
    for _ in range(UPDATES):
        model.update(0.0)
    rewards, _ = model.query(some_rows(shape.layout, shape.rows, 7))
    arrays = [torch.from_numpy(array) for name, array in model.state().items() if name.endswith(".parameter")]
    return arrays + [r.cpu() for r in rewards]


def _distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The largest distance of two tensors that belong together, as a part of their norm."""
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(left, right, strict=True))


def make_learner(
    kind: str, shape: Shape, context: Context, precision: Precision, device: torch.device, last_bits: int = 0
) -> tuple[ActorCritic | ClippedActorCritic, Callable[[], object]]:
    """Networks of a seed, and one update of them from data of a seed; `last_bits` shakes those of the observations."""
    layout, generator = shape.layout, torch.Generator().manual_seed(0)
    policy = Policy(layout, (shape.hidden, shape.hidden), generator)
    settings = LearnerSettings(
        hidden=shape.hidden, precision=precision, policy="boltzmann" if kind == "boltzmann" else "actor"
    )
    if kind == "clipped":
        settings = dataclasses.replace(
            settings, clipped=ClippedSettings(epochs=4, parts=UPDATES // 4, clone_weight=0.1)
        )
        value = ValueCritic(layout, context, shape.hidden, settings.heads, True, generator)
        clipped = ClippedActorCritic(policy, value, settings, device, 0)
        clipped.start_from(clipped.policy)
        segments = some_segments(layout, max(1, shape.rows // EPISODE))
        segments.observations = shaken(segments.observations, last_bits)
        rewards = segments.of_rows(segments.rewards)
        return clipped, lambda: clipped.update(segments, rewards, 0.0)
    discrete = all(block.discrete for block in layout.blocks)
    critic = (Critic if discrete else ActionCritic)(layout, context, shape.hidden, settings.heads, True, generator)
    learner = (ActorCritic if discrete else ActionActorCritic)(policy, critic, settings, device, 0)
    batch = some_batch(layout, shape.rows)
    batch.rows.observations = shaken(batch.rows.observations, last_bits)
    return learner, lambda: learner.update(batch, batch.rewards, 0.0)


def make_model(
    shape: Shape, scope: KernelScope, device: torch.device, precision: Precision = "float32", last_bits: int = 0
) -> RewardModel:
    settings = RewardSettings(
        precision=precision,
        hidden=(shape.hidden, shape.hidden // 2),
        kernel_scope=scope,
        updates=1,
        batch_size=shape.rows,
        window_steps=2 * shape.rows,
    )
    experts, agents = (some_rows(shape.layout, 2 * shape.rows, seed) for seed in (1, 2))
    experts.observations = shaken(experts.observations, last_bits)
    model = RewardModel(shape.layout, experts, settings, 0, device.type)
    model.observe(agents)
    return model


# Fast.


def timings() -> Iterator[tuple[str, dict[str, float]]]:
    for place, shape in TIMED.items():
        for precision in get_args(Precision):
            for kind in ("actor", "clipped"):
                _, update = make_learner(kind, shape, "types", precision, GPU)
                yield f"{place}: {kind} update, {precision}", timed(update)
                del update
            model, rows = make_model(shape, "function", GPU, precision), some_rows(shape.layout, shape.rows, 7)
            yield f"{place}: SVGD step, {precision}", timed(partial(model.update, 0.0))
            yield f"{place}: reward query, {precision}", timed(partial(model.query, rows))
            del model


def timed(run: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Median, least and most wall milliseconds, and what the GPU did in them: kernels, copies, how many kernels."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        walls.append(1_000 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = [
        (e.key.startswith(("Memcpy", "Memset")), e.self_device_time_total / 1_000, e.count) for e in seen.key_averages()
    ]
    busy = sum(milliseconds for copies, milliseconds, _ in events if not copies)
    return {
        "median": statistics.median(walls),
        "least": min(walls),
        "most": max(walls),
        "kernels": busy,
        "copies": sum(milliseconds for copies, milliseconds, _ in events if copies),
        "number_of_kernels": sum(count for copies, milliseconds, count in events if not copies and milliseconds),
        "device_share": busy / statistics.median(walls),
    }


def describe(timing: dict[str, float]) -> str:
    spread = f"{timing['median']:8.1f} ms [{timing['least']:.1f}–{timing['most']:.1f}]"
    busy = f"busy {timing['device_share']:4.0%} in {timing['number_of_kernels']:.0f} kernels"
    return f"{spread}  {busy}, {timing['copies']:.1f} ms of copies"


# Usable.


def runs(steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Short runs of every algorithm on the GPU, of one through processes, of Berlin's presets, and a resumed one."""
    base = ["--preset", "rover_tower_8", "--steps", str(steps), "--evaluation.final-episodes", "20"]
    serial = [*base, "--mode", "serial"]
    wanted = {name: [*serial, "--algorithm", name] for name in ALGORITHMS}
    wanted["bm3il, clipped, from the clone"] = [*serial, "--learner.policy", "clipped", "--learner.start", "cloned"]
    wanted["bm3il, bfloat16"] = [*serial, "--learner.precision", "bfloat16"]
    wanted["bm3il, through processes"] = [*base, "--mode", "lockstep", "--actors", "2"]
    for preset in ("berlin", "berlin_slip"):
        short = ["--steps", "12000", "--evaluation.interval", "100", "--evaluation.final-episodes", "20"]
        wanted[f"preset {preset}"] = ["--preset", preset, *short, "--mode", "serial"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 4)) as pool:
        places = {name: Path(folder) / f"run-{number}" for number, name in enumerate(wanted)}
        started = {name: pool.submit(_train, places[name], flags) for name, flags in wanted.items()}
        for name, future in started.items():
            yield name, future.result()
        yield "bm3il, stopped and resumed", _resumed(Path(folder) / "stopped", wanted["bm3il"])


def _train(place: Path, flags: Sequence[str]) -> dict[str, Any]:
    started = _start(place, flags)
    printed, _ = started.communicate()
    return _outcome(place, started.returncode, printed)


def _resumed(place: Path, flags: Sequence[str]) -> dict[str, Any]:
    """A run that is stopped at its first checkpoint and goes on from there."""
    started = _start(place, [*flags, "--learner.checkpoint-interval", "1"])
    while started.poll() is None and not list(place.glob("checkpoints/*")):
        time.sleep(0.05)
    started.terminate()
    printed, _ = started.communicate()
    if started.returncode == 0:
        return {"exit_code": 1, "error": "it ended before it could be stopped; ask for more --steps"}
    done = subprocess.run(
        [*CLI, "resume", str(place)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return _outcome(place, done.returncode, printed + done.stdout)


def _start(place: Path, flags: Sequence[str]) -> subprocess.Popen[str]:
    command = [*CLI, "train", *flags, "--device", GPU.type, "--runs-folder", str(place.parent), "--run", place.name]
    threads = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=threads)


def _outcome(place: Path, exit_code: int, printed: str) -> dict[str, Any]:
    if exit_code:
        return {"exit_code": exit_code, "error": printed[-600:]}
    result = json.loads((place / "result.json").read_text())
    clock = [json.loads(line)["wall_seconds"] for line in (place / "log.jsonl").read_text().splitlines()]
    between = [later - earlier for earlier, later in pairwise(clock)]
    return {
        "exit_code": 0,
        "normalized_return": result["normalized_return"],
        "policy_sha256": result["policy_sha256"],
        "wall_seconds": result["wall_seconds"],
        "iteration_milliseconds": 1_000 * statistics.median(between) if between else None,
    }


def describe_run(run: dict[str, Any]) -> str:
    if run["exit_code"]:
        return f"FAILED ({run['exit_code']}): {run['error']}"
    iteration = run["iteration_milliseconds"]
    every = "" if iteration is None else f", {iteration:.0f} ms an iteration"
    return f"normalised {run['normalized_return']:.3f} after {run['wall_seconds']:.0f} s{every}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
