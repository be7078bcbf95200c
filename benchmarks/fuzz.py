"""Hostile bytes against everything that reads some: `python benchmarks/fuzz.py [--cases 1000000] [--seed 0]`.

Messages are mutated on the level of bytes and of header fields, and go to the codec, and over real sockets to the
learner and the reward server; files of demonstrations, checkpoints and scenarios are mutated as bytes. Whatever comes
of it must be the documented error or an accepted value: another exception, a case of more than 5 s, or more than
512 MiB of new memory ends this with the seed of the case. After the storm on the sockets an honest request must still
be answered.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgpack
import numpy as np
import psutil
import torch
import zmq

from actors.environments.berlin.scenario_file import parse_scenario
from actors.experts.recording import record
from actors.policy import Policy, UniformPolicy
from actors.settings import ActorSettings
from learner.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint
from learner.streaming import StreamedExperience
from protocol.channels import Client, Server
from protocol.demonstrations import Demonstrations
from protocol.errors import InputError, NumericalError, ProtocolError
from protocol.job import Endpoints, Job
from protocol.layout import JointRows, Layout
from protocol.messages import Begin, Chunk, Done, GetState, Observe, Query, Sender, Status, Update, decode, encode
from protocol.registry import make_environment
from protocol.telemetry import Telemetry
from protocol.trajectories import Trajectories
from reward_server.particles import RewardModel, state_table
from reward_server.process import RewardServer, request_schema
from reward_server.settings import RewardSettings

CASE_SECONDS, NEW_BYTES = 5.0, 512 << 20
ENVIRONMENT = "rover_tower?pairs=2"
SPEC = make_environment(ENVIRONMENT, 1).spec
LAYOUT = Layout.of(SPEC, "type")
SETTINGS = RewardSettings(hidden=(4,), particles=2, updates=1, batch_size=4, window_steps=50, max_queue_rows=1000)
STEPS = SPEC.episode_length
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 63, -(1 << 63), 1e308, float("nan"), float("inf"), "", "x" * 70_000, b"", [], {}, [[]]),
    *({"a": {"b": [1]}}, [1 << 40], ["float32"], "object", "int64", "__class__", "\x00", "9" * 400),
)


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, inserted or replaced by extremes."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(out) + 1)
        span = dice.choice((1, 1, 2, 4, 8, 64))
        match dice.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << dice.randrange(8)
            case 1:
                out[at : at + span] = dice.randbytes(span)
            case 2:
                del out[at : at + span]
            case 3:
                out[at:at] = out[at : at + span] * dice.choice((1, 2, 100))
            case 4:
                out[at : at + span] = bytes([dice.choice((0, 0x7F, 0x80, 0xFF, 0xC1, 0xDF, 0x22, 0x7B))]) * span
            case _:
                del out[at:]
    return bytes(out)


def mutated_frames(frames: list[bytes], dice: random.Random) -> list[bytes]:
    """A message with hostile bytes, hostile header fields, or frames too many, too few or of another place."""
    frames = list(frames)
    match dice.randrange(5):
        case 0:
            frames[0] = mutated(frames[0], dice)
        case 1 | 2:
            frames[0] = _hostile_header(frames[0], dice)
        case 3:
            at = dice.randrange(len(frames))
            frames[at] = mutated(frames[at], dice)
        case _:
            match dice.randrange(3):
                case 0:
                    dice.shuffle(frames)
                case 1:
                    del frames[dice.randrange(len(frames))]
                case _:
                    frames += [dice.randbytes(8)] * dice.choice((1, 3, 5000))
    return frames


def _hostile_header(header: bytes, dice: random.Random) -> bytes:
    """Somewhere in the header, another value."""
    tree = msgpack.unpackb(header)
    branch: Any = tree
    while True:
        keys = list(branch) if isinstance(branch, dict) else list(range(len(branch)))
        if not keys:
            return mutated(header, dice)
        key = dice.choice(keys)
        if isinstance(branch[key], dict | list) and branch[key] and dice.random() < 0.7:
            branch = branch[key]
            continue
        branch[key] = dice.choice(HOSTILE)
        try:
            return bytes(msgpack.packb(tree))
        except (OverflowError, ValueError):
            return mutated(header, dice)


def corpus() -> list[list[bytes]]:
    """Honest messages of all kinds that a socket here accepts."""
    sender, random_rows = Sender("run", "actor-0"), np.random.default_rng(0)

    def filled(table: Any) -> dict[str, np.ndarray]:
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        for array in arrays.values():
            if array.dtype == np.float32:
                array[...] = random_rows.normal(size=array.shape)
        return arrays

    chunk = filled(Trajectories.array_table(SPEC, STEPS, 1))
    chunk["lengths"][:] = STEPS
    rows = filled(JointRows.array_table(LAYOUT, 3))
    bodies: list[tuple[Any, dict[str, np.ndarray]]] = [
        (Chunk("s", 0, 0, 0, STEPS, 1, 0.0), chunk),
        (Observe("s", 3), rows),
        (Query("s", 3, False, False), rows),
        (Query("s", 3, True, True), rows),
        (Update("s", 0.5), {}),
        (GetState("s"), {}),
        (Begin("s", restore=False), {}),
        (Done("taken"), {}),
        (Status("actor", 0, 0, 1, "collect", "127.0.0.1:1", {"a": 1.0}), {}),
    ]
    return [[bytes(frame) for frame in encode(sender, n, *body)] for n, body in enumerate(bodies)]


def codec_cases(dice: random.Random) -> Iterator[Callable[[], str]]:
    """The codec, and what reads values out of accepted arrays."""
    honest = corpus()
    schema = request_schema(LAYOUT, SETTINGS, state_table(LAYOUT, SETTINGS, False))

    def accepts(body: Any) -> Any:
        if isinstance(body, Chunk):
            if (body.steps, body.episodes) != (STEPS, 1):
                raise ProtocolError("body", "another shape")
            return Trajectories.array_table(SPEC, STEPS, 1)
        return {} if isinstance(body, Done | Status) else schema(body)

    while True:
        frames = mutated_frames(dice.choice(honest), dice)

        def case(frames: list[bytes] = frames) -> str:
            try:
                message = decode(frames, "run", accepts)
                if isinstance(message.body, Chunk):
                    Trajectories.from_arrays(message.arrays, SPEC)
                elif isinstance(message.body, Observe | Query):
                    JointRows.from_arrays(message.arrays, LAYOUT)
            except ProtocolError as error:
                return error.cause
            return "accepted"

        yield case


class Sockets:
    """A learner's and a reward server's socket, attacked by a raw one each."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self._dice, self._honest, self.drops = dice, corpus(), Counter[str]()
        endpoints = Endpoints(*(f"ipc://{folder}/{name}" for name in ("e", "w", "r", "c")))
        job = Job("run", folder, ENVIRONMENT, "", 0, "maac", "async", 0, 1, 1, "type", "cpu", 1, endpoints)
        telemetry = Telemetry("learner", 0, Sender("run", "learner-0"), 0, "127.0.0.1")
        telemetry.count_drop = self._count  # type: ignore[method-assign]
        policy = Policy(LAYOUT, (4,), torch.Generator().manual_seed(0))
        self._experience = StreamedExperience(job, policy, ActorSettings(STEPS), 4, 60.0, telemetry)
        self._experience.publish("s", 0, policy, 0)
        schema = request_schema(LAYOUT, SETTINGS, state_table(LAYOUT, SETTINGS, False))
        server = Server(endpoints.rewards, telemetry.sender, schema, self._count)
        expert = JointRows.from_arrays(
            {name: np.zeros(s, d) for name, (d, s) in JointRows.array_table(LAYOUT, 8).items()}, LAYOUT
        )
        self._rewards = RewardServer(
            server, lambda: RewardModel(LAYOUT, expert, SETTINGS, 0, "cpu", False), LAYOUT, SETTINGS, telemetry
        )
        self._clients = [
            Client(endpoint, Sender("run", "honest"), lambda body: None, self._count)
            for endpoint in (endpoints.experience, endpoints.rewards)
        ]
        self._attackers = [zmq.Context.instance().socket(zmq.DEALER) for _ in range(2)]
        for attacker, endpoint in zip(self._attackers, (endpoints.experience, endpoints.rewards), strict=True):
            attacker.linger = 0
            attacker.connect(endpoint)

    def _count(self, cause: str) -> None:
        self.drops[cause] += 1

    def cases(self) -> Iterator[Callable[[], str]]:
        """Each sends one message to each socket and lets both take in what has come."""
        while True:
            frames = mutated_frames(self._dice.choice(self._honest), self._dice)

            def case(frames: list[bytes] = frames) -> str:
                for attacker in self._attackers:
                    attacker.send_multipart(frames or [b""])
                    while attacker.poll(0):
                        attacker.recv_multipart()
                self.take_in()
                return "sent"

            yield case

    def take_in(self) -> None:
        """What a process does with what has come."""
        self._experience._receive(0)
        while len(self._experience._queue) >= 1:
            self._experience._take()
        self._rewards.serve(0)

    def assert_answers(self) -> None:
        """Honest requests of both kinds are answered as ever."""
        frames = self._honest[0]
        header = msgpack.unpackb(frames[0])
        arrays = {
            name: np.frombuffer(frame, dtype).reshape(shape)
            for (name, dtype, shape), frame in zip(header["arrays"], frames[1:], strict=True)
        }
        bodies = ((Chunk(**header["body"]), arrays), (Begin("s", restore=False), {}))
        for client, (body, given) in zip(self._clients, bodies, strict=True):
            client._schema = lambda _: {}
            ticket, deadline = client.submit(body, given), time.monotonic() + 10
            while (answer := client.take(ticket)) is None:
                assert time.monotonic() < deadline, f"an honest '{body.kind}' is no longer answered"
                self.take_in()
                client.pump(0.01)
            assert isinstance(answer.body, Done), answer.body


def file_cases(folder: Path, dice: random.Random) -> Iterator[tuple[str, Callable[[], str]]]:
    """Demonstrations, checkpoints and scenarios in turn."""
    environment = make_environment(ENVIRONMENT, 1)
    path = folder / "d.safetensors"
    record(environment, UniformPolicy(environment.spec), 1, 0, "fuzz").save(path)
    demonstrations = path.read_bytes()
    arrays = {"a": np.zeros((2, 3), np.float32)}
    CheckpointFolder(folder, 1).write(Checkpoint(1, "c", {"iteration": 1}, arrays, arrays))
    checkpoint = {file.name: file.read_bytes() for file in (folder / "00000001").iterdir()}
    from importlib import resources

    text = resources.files("actors.environments.berlin.scenarios").joinpath("berlin46.json").read_bytes()

    def read(reader: Callable[[], Any]) -> str:
        try:
            reader()
        except InputError:
            return "refused"
        return "accepted"

    def changed_checkpoint() -> str:
        name = dice.choice(list(checkpoint))
        (folder / "00000001" / name).write_bytes(mutated(checkpoint[name], dice))
        outcome = read(lambda: read_checkpoint(folder / "00000001"))
        (folder / "00000001" / name).write_bytes(checkpoint[name])
        return outcome

    def changed_demonstrations() -> str:
        # Most of the file are numbers; its header is where a reader could be led astray.
        head = dice.choice((200, 2_000, len(demonstrations)))
        path.write_bytes(mutated(demonstrations[:head], dice) + demonstrations[head:])
        return read(lambda: Demonstrations.load(path))

    def changed_scenario() -> str:
        return read(lambda: parse_scenario(mutated(text, dice).decode("utf-8", "replace")))

    while True:
        yield "demonstrations", changed_demonstrations
        yield "checkpoint", changed_checkpoint
        yield "scenario", changed_scenario


def main() -> int:
    """Run all cases; prints counts by outcome, and fails with the case that did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="over all surfaces")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    dice, counts = random.Random(given.seed), Counter[tuple[str, str]]()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bm3il-fuzz-") as name:
        folder = Path(name)
        sockets, codec, files = Sockets(folder, dice), codec_cases(dice), file_cases(folder, dice)
        storm = sockets.cases()
        for _ in range(100):  # what is needed anyhow is not counted as new memory
            next(codec)(), next(storm)(), next(files)[1]()
        limit = psutil.Process().memory_info().vms + NEW_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _too_long)
        for number in range(given.cases):
            surface, case = ("codec", next(codec)) if number % 10 else ("sockets", next(storm))
            if number % 50 == 5:
                surface, case = next(files)
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            try:
                counts[surface, case()] += 1
            except BaseException as error:
                if isinstance(error, NumericalError):
                    counts[surface, "numerical"] += 1
                    continue
                print(f"case {number} of seed {given.seed}, {surface}: {error!r}", file=sys.stderr)
                raise
        signal.setitimer(signal.ITIMER_REAL, 0)
        sockets.take_in()
        sockets.assert_answers()
    seconds = time.monotonic() - start
    by_surface: dict[str, dict[str, int]] = {}
    for (surface, outcome), count in sorted(counts.items()):
        by_surface.setdefault(surface, {})[outcome] = count
    by_surface["dropped by the sockets"] = dict(sorted(sockets.drops.items()))
    print(json.dumps(by_surface, indent=1))
    print(f"{given.cases} cases, {given.cases / seconds:.0f} a second; honest requests still answered")
    return 0


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {CASE_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
