"""What the fuzzers send: mutated messages, and mutated files with what reads them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from bm3il.actors.environments.berlin.scenario_file import parse_scenario
from bm3il.actors.experts.recording import record
from bm3il.actors.policy import UniformPolicy
from bm3il.learner.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint
from bm3il.protocol.codec import decode, encode
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.messages import (
    Arrays,
    Begin,
    Chunk,
    Evaluating,
    Evaluation,
    Event,
    GetState,
    Hold,
    Inquiry,
    Leaving,
    Query,
    Sender,
    Status,
    Update,
    Working,
)
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.particles import state_table
from bm3il.reward_server.process import request_schema
from bm3il.reward_server.settings import RewardSettings

ENVIRONMENT = "rover_tower?pairs=2"
TOWN = "berlin?types=2&agents=4&sight=near"
SPEC = make_environment(ENVIRONMENT, 1).spec
LAYOUT = Layout.of(SPEC, "type")
SETTINGS = RewardSettings(hidden=(4,), particles=2, updates=1, batch_size=4, window_steps=50, max_queue_rows=1000)
STEPS = SPEC.episode_length
EVALUATED = {"returns": np.zeros((2, SPEC.num_agents), np.float32), "random": np.zeros(SPEC.num_agents, np.float32)}
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
                    frames += [dice.randbytes(8)] * dice.choice((1, 3, 3, 3, 300) if dice.random() < 0.99 else (5000,))
    return frames or [b""]


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


def filled(table: ArrayTable) -> Arrays:
    """Normal floats, and zeros of other types."""
    random_rows = np.random.default_rng(0)
    return {
        name: random_rows.normal(size=shape).astype(dtype) if dtype == "float32" else np.zeros(shape, dtype)
        for name, (dtype, shape) in table.items()
    }


def chunk(spec: EnvironmentSpec = SPEC) -> tuple[Chunk, Arrays]:
    """An honest one, of session `s`."""
    steps = spec.episode_length
    arrays = filled(Trajectories.array_table(spec, steps, 1))
    arrays["lengths"][:] = steps
    return Chunk("s", 0, 0, 0, steps, 1, 0.0), arrays


def of_rows(layout: Layout) -> list[tuple[Any, Arrays]]:
    """Honest messages to a reward server about three rows, by value and by number."""
    rows, numbers = filled(JointRows.array_table(layout, 3)), {"numbers": np.arange(3)}
    return [
        (Hold("s", 3), rows),
        (Query("s", 3, False, False), rows),
        (Query("s", 3, True, True), rows),
        (Query("s", 3, numbered=True), numbers),
        (Update("s", 3, 0.5), rows),
        (Update("s", 3, 0.5, True), numbers),
    ]


def corpus(run: str = "run") -> dict[str, list[list[bytes]]]:
    """Honest messages of all kinds that each socket which answers takes. `Begin` is of the run `run`, always: whoever
    belongs to another run could end the session with it."""
    values = {"iteration": 3.0, "steps": 9.0, "steps_per_second": 1.0, "stage_seconds": 80.0, "seconds_collect": 1.0}
    bodies: dict[str, list[tuple[Any, Arrays]]] = {
        "experience": [
            chunk(),
            (Working(0), {}),
            (Leaving(0), {}),
            (Evaluating(1, 2), {}),
            (Evaluation("s", 0, 2), EVALUATED),
        ],
        "rewards": [*of_rows(LAYOUT), (GetState("s"), {})],
        "control": [
            (Status(role, 0, 0, 1, "collect", "127.0.0.1:1", values, "text"), {}) for role in ("learner", "supervisor")
        ]
        + [(Event("best", "learner-0", "return 3", 1.7e9), {})],
    }
    names = {"experience": ["actor-0"], "rewards": ["learner-0"], "control": ["learner-0", "supervisor-1", "actor-7"]}
    for of_socket in bodies.values():
        of_socket += [(Inquiry(1), {}), (Inquiry(2, repeat=True), {})]
    messages = {
        socket: [
            [bytes(frame) for frame in encode(Sender(run, name), number, *body, settled=number // 2)]
            for number, body in enumerate(of_socket)
            for name in names[socket]
        ]
        for socket, of_socket in bodies.items()
    }
    begin = encode(Sender("run", "learner-0"), 9, Begin("s", restore=False))
    messages["rewards"].append([bytes(frame) for frame in begin])
    return messages


class _Reader:
    """What reads messages about one world, and values out of the arrays that it accepts."""

    def __init__(self, environment: str) -> None:
        self._spec = make_environment(environment, 1).spec
        self._layout = Layout.of(self._spec, "type")
        self._schema = request_schema(self._layout, SETTINGS, state_table(self._layout, SETTINGS))
        bodies = [chunk(self._spec), *of_rows(self._layout)]
        self.honest = [list(map(bytes, encode(Sender("run", "x"), n, *body))) for n, body in enumerate(bodies)]
        assert {self.outcome(frames) for frames in self.honest} == {"accepted"}

    def outcome(self, frames: list[bytes]) -> str:
        """`accepted`, or why not."""
        try:
            message = decode(frames, "run", self._accepts)
            if isinstance(message.body, Chunk):
                Trajectories.from_arrays(message.arrays, self._spec)
            elif isinstance(message.body, Hold | Update | Query) and "numbers" not in message.arrays:
                JointRows.from_arrays(message.arrays, self._layout)
        except ProtocolError as error:
            return error.cause
        return "accepted"

    def _accepts(self, body: Any) -> Any:
        if isinstance(body, Chunk):
            if (body.steps, body.episodes) != (self._spec.episode_length, 1):
                raise ProtocolError("body", "another shape")
            return Trajectories.array_table(self._spec, body.steps, 1)
        return {} if isinstance(body, Status | Event) else self._schema(body)


def codec_cases(dice: random.Random) -> Iterator[Callable[[], str]]:
    """The codec, and what reads values out of arrays: of a world of numbers, and of one of codes and tables."""
    readers = [_Reader(world) for world in (ENVIRONMENT, TOWN)]
    others = [frames for messages in corpus().values() for frames in messages]
    while True:
        reader = dice.choice(readers)
        frames = mutated_frames(dice.choice(reader.honest + others), dice)

        def case(frames: list[bytes] = frames, reader: _Reader = reader) -> str:
            return reader.outcome(frames)

        yield case


def file_cases(folder: Path, dice: random.Random) -> Iterator[tuple[str, Callable[[], str]]]:
    """Demonstrations, checkpoints and scenarios in turn."""
    path, demonstrations = folder / "d.safetensors", []
    for world in (ENVIRONMENT, TOWN):
        environment = make_environment(world, 1)
        record(environment, UniformPolicy(environment.spec), 1, 0, "fuzz").save(path)
        demonstrations.append(path.read_bytes())
    arrays = {"a": np.zeros((2, 3), np.float32)}
    CheckpointFolder(folder, 1).write(Checkpoint(1, "c", {"iteration": 1}, arrays, arrays))
    checkpoint = {file.name: file.read_bytes() for file in (folder / "00000001").iterdir()}
    text = resources.files("bm3il.actors.environments.berlin.scenarios").joinpath("berlin46.json").read_bytes()

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
        recorded = dice.choice(demonstrations)
        head = dice.choice((200, 2_000, len(recorded)))
        path.write_bytes(mutated(recorded[:head], dice) + recorded[head:])
        return read(lambda: Demonstrations.load(path))

    def changed_scenario() -> str:
        return read(lambda: parse_scenario(mutated(text, dice).decode("utf-8", "replace")))

    while True:
        yield "demonstrations", changed_demonstrations
        yield "checkpoint", changed_checkpoint
        yield "scenario", changed_scenario
