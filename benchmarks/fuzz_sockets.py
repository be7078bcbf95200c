"""The sockets of a run in this process, each with somebody hostile at the other end.

A storm sends some mutated messages and then needs an honest one to be answered, or heard, within `PATIENCE_SECONDS`.
"""

from __future__ import annotations

import io
import random
import socket as sockets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np
import psutil
import torch
import zmq
from fuzz_cases import (
    ENVIRONMENT,
    EVALUATED,
    LAYOUT,
    SETTINGS,
    SPEC,
    STEPS,
    chunk,
    corpus,
    filled,
    mutated,
    mutated_frames,
)
from rich.console import Console

from bm3il.actors.policy import Policy
from bm3il.actors.process import _connect
from bm3il.actors.settings import ActorSettings
from bm3il.launch.config import load_preset
from bm3il.launch.processes.director import Director
from bm3il.launch.progress import Progress
from bm3il.launch.topology import Node, Plan, Process
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.learner.streaming import StreamedExperience
from bm3il.protocol.channels import Client, Refused, Server
from bm3il.protocol.codec import encode
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.keys import Keys
from bm3il.protocol.layout import JointRows
from bm3il.protocol.messages import (
    Done,
    Evaluation,
    GetState,
    Inquiry,
    Query,
    Refusal,
    Rewards,
    Sender,
    Standing,
    Statistics,
    Status,
    Update,
    Weights,
)
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.client import STATE, RemoteRewards, rewards_table
from bm3il.reward_server.particles import RewardModel, state_table
from bm3il.reward_server.process import RewardServer, listen

BATCH, CONNECTIONS = 32, 4
PATIENCE_SECONDS = 4.0
LARGE = 1 / 5000
"""How many messages have a frame above the limit of the socket: who is cut off needs a second to come again."""
STATE_TABLE = state_table(LAYOUT, SETTINGS)
LATEST = "f" * 24
"""The start of a learner that no mutated one supersedes."""
OF_RUN = Settings(LearnerSettings(deadline_seconds=60.0), actor=ActorSettings(STEPS))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"


class Surface(Protocol):
    """Something that reads what comes over a wire."""

    name: str

    def storm(self) -> Counter[str]:
        """Send what is hostile, then what is honest. Counts what became of it; raises for what must not happen."""


class Answering:
    """A ROUTER of ours. `take_in` does what its process does; `honest` is a request that is always answered."""

    def __init__(self, name: str, endpoint: str, dice: random.Random, take_in: Callable[[], None], honest: Any) -> None:
        self.name, self._dice, self._take_in, self._honest = name, dice, take_in, honest
        self._endpoint, self._messages = endpoint, corpus()[name]
        self._client = Client(endpoint, Sender("run", "honest"), lambda body: _answer_table(body), lambda cause: None)
        self._attacker = _raw(zmq.DEALER, endpoint)

    def storm(self) -> Counter[str]:
        if self._dice.random() < 0.02:
            self._attacker.close()
            self._attacker = _raw(zmq.DEALER, self._endpoint, self._dice.choice((b"", b"x", b"y" * 255)))
        for _ in range(BATCH):
            frames = _hostile(self._dice.choice(self._messages), self._dice)
            until(lambda frames=frames: self._sent(frames), f"{self.name} takes messages in")
        ticket = self._client.submit(*self._honest)
        until(lambda: self._answered(ticket), f"an honest request to {self.name} is answered")
        return Counter(sent=BATCH)

    def _sent(self, frames: list[bytes]) -> bool:
        try:
            self._attacker.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # it has enough
            self._take_in()
            return False
        return True

    def _answered(self, ticket: int) -> bool:
        self._take_in()
        _drain(self._attacker)
        self._client.pump()
        return self._client.take(ticket) is not None


class Broadcasting:
    """The learner's XPUB, of which a listener wants to hear."""

    name = "weights"

    def __init__(self, experience: StreamedExperience, policy: Policy, endpoint: str, dice: random.Random) -> None:
        self._experience, self._policy, self._endpoint, self._dice = experience, policy, endpoint, dice
        self._honest, self._version = _raw(zmq.SUB, endpoint), 0
        self._honest.subscribe(b"")
        self._attacker = _raw(zmq.XSUB, endpoint)
        self._storms = 0

    def storm(self) -> Counter[str]:
        self._storms += 1
        if self._storms % 8 == 0:  # libzmq remembers every prefix of a peer for as long as it is connected
            self._attacker.close()
            self._attacker = _raw(zmq.XSUB, self._endpoint)
        for _ in range(BATCH):
            self._attacker.send_multipart(self._subscription())
        self._version += 1
        self._experience.publish("s", 0, self._policy, self._version)
        until(self._heard, "an honest listener hears the newest weights")
        _drain(self._attacker)
        return Counter(sent=BATCH)

    def _subscription(self) -> list[bytes]:
        topic = self._dice.randbytes(self._dice.choice((0, 1, 2, 20, 800)))
        if self._dice.random() < LARGE:
            topic = bytes(1 << 14)  # libzmq walks down a topic by recursion, and the attacker shall live
        return [self._dice.choice((b"\x01", b"\x01", b"\x00", b"\x02", b"")) + topic] * self._dice.choice((1, 1, 1, 3))

    def _heard(self) -> bool:
        self._experience._weights.pump(repeat=True)
        while self._honest.poll(1):
            header = msgpack.unpackb(self._honest.recv_multipart()[0])
            if header["body"]["evaluate_episodes"] == self._version:
                return True
        return False


class Asking:
    """A client of ours asks somebody who answers with mutated messages first, and an honest one then."""

    def __init__(self, name: str, endpoint: str, dice: random.Random) -> None:
        self.name, self._dice = name, dice
        self._server = _raw(zmq.ROUTER, endpoint)
        self._ask: Callable[[], object] = lambda: None
        self._honest: tuple[Any, dict[str, np.ndarray]] = (Done(), {})
        self._answered = False

    def use(self, asks: list[Callable[[], object]]) -> None:
        """What the client may be made to ask; each waits for its answer."""
        self._ask = lambda: self._dice.choice(asks)()

    def storm(self) -> Counter[str]:
        self._answered = False
        try:
            self._ask()
        except Refused:
            return Counter(refused=1, sent=BATCH - 1)
        except NumericalError:
            return Counter(numerical=1, sent=BATCH - 1)
        return Counter(answered=1, sent=BATCH - 1)

    def serve(self) -> None:
        """Called by the client while it waits."""
        while self._server.poll(0 if self._answered else 20):
            peer, header, *_ = self._server.recv_multipart()
            request = msgpack.unpackb(header)
            sequence = request["seq"]
            if request["kind"] == Inquiry.kind:  # after what was answered, and may have been lost on the way
                self._server.send_multipart([peer, *_frames(sequence, *self._honest)])
                continue
            self._honest = honest = _honest_answer(request["kind"], request["body"])
            for _ in range(BATCH if not self._answered else 0):
                at = self._dice.choice((sequence, sequence, sequence, -1, 0))
                answer = honest if self._dice.random() < 0.6 else self._dice.choice(ANSWERS)
                self._server.send_multipart([peer, *_hostile(_frames(at, *answer), self._dice, LARGE / 20)])
            self._server.send_multipart([peer, *_frames(sequence, *honest)])
            self._answered = True


class Listening:
    """A listener of ours hears mutated broadcasts, and an honest one then."""

    name = "listener of weights"

    def __init__(self, endpoint: str, policy: Policy, dice: random.Random) -> None:
        self._socket, self._policy, self._dice, self._version = _raw(zmq.PUB, endpoint), policy, dice, 0
        self.listener: Any = None

    def storm(self) -> Counter[str]:
        for _ in range(BATCH):
            honest = _frames(1, Weights("s", -1, 0), self._policy.to_arrays())
            self._socket.send_multipart(_hostile(honest, self._dice, LARGE / 20))
        self._version += 1
        until(self._heard, "an honest broadcast is heard")
        return Counter(sent=BATCH)

    def _heard(self) -> bool:
        self._socket.send_multipart(_frames(1, Weights("s", self._version, 0), self._policy.to_arrays()))
        for _ in range(BATCH + 1):
            if (message := self.listener.newest(0.005)) is not None:
                self._policy.load_arrays(message.arrays)
                if message.body.version == self._version:
                    return True
        return False


class Knocking:
    """Bytes of no ZeroMQ, or of the beginning of it, to a socket that listens at a TCP port with keys, or a file."""

    def __init__(self, endpoint: str, keys: Keys | None, dice: random.Random) -> None:
        self.name = f"bytes to {endpoint.partition(':')[0]}"
        self._endpoint, self._dice, self.drops = endpoint, dice, Counter[str]()
        self._server = Server(endpoint, Sender("run", "s", keys=keys), lambda body: {}, self._count)
        self._client = Client(endpoint, Sender("run", "c", keys=keys), lambda body: {}, lambda cause: None)

    def storm(self) -> Counter[str]:
        for _ in range(CONNECTIONS):
            self._knock()
        ticket = self._client.submit(Done())
        until(lambda: self._answered(ticket), f"an honest client of {self._endpoint} is answered")
        assert set(self.drops) <= {"unauthorised", "header", "frame"}, self.drops
        return Counter(sent=CONNECTIONS)

    def assert_gone(self) -> None:
        """Nobody but the honest client is connected any more."""
        if self._endpoint.startswith("tcp"):
            port = int(self._endpoint.rpartition(":")[2])
            until(lambda: self._connected(port) <= 1, "strangers are gone", 10.0)

    def _connected(self, port: int) -> int:
        connections = psutil.Process().net_connections("tcp")
        return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)

    def _count(self, cause: str) -> None:
        self.drops[cause] += 1

    def _answered(self, ticket: int) -> bool:
        for request in self._server.poll(0.001):
            self._server.answer(request, Done())
        self._client.pump()
        return self._client.take(ticket) is not None

    def _knock(self) -> None:
        scheme, _, address = self._endpoint.partition("://")
        family = sockets.AF_UNIX if scheme == "ipc" else sockets.AF_INET
        with sockets.socket(family, sockets.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            host, _, port = address.rpartition(":")
            try:
                connection.connect(address if scheme == "ipc" else (host, int(port)))
                connection.sendall(self._bytes())
            except OSError:  # the other side has ended it already
                return

    def _bytes(self) -> bytes:
        dice = self._dice
        mechanism = dice.choice((b"CURVE", b"NULL", b"PLAIN"))
        greeting = GREETING + mechanism.ljust(20, b"\0") + bytes(32)
        ready = b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
        hello = b"\x04\xc8\x05HELLO\x01\0" + bytes(72) + dice.randbytes(112)
        rest = dice.choice((b"", ready, hello, ready + b"\0\x05" + dice.randbytes(5), dice.randbytes(300)))
        return dice.choice(
            (greeting + rest, mutated(greeting + rest, dice), dice.randbytes(dice.choice((1, 64, 5000))))
        )


class Sockets:
    """All surfaces. `drops`: counted by the sockets, by cause."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.drops = Counter[str]()
        self._telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
        self._telemetry.count_drop = self._count  # type: ignore[method-assign]
        self._policy = Policy(LAYOUT, (4,), torch.Generator().manual_seed(0))
        near, far = (Endpoints(*(f"ipc://{folder}/{side}{name}" for name in "ewrc")) for side in ("n", "f"))
        self._experience = StreamedExperience(_job(folder, near), OF_RUN, self._telemetry)
        self._experience.publish("s", 0, self._policy, 0)
        _model()  # what torch imports at its first use is no case's time
        server = listen(near.rewards, LAYOUT, SETTINGS, STATE_TABLE, self._telemetry)
        self._rewards = RewardServer(server, _model, LAYOUT, SETTINGS, self._telemetry)
        self._director = self._lead(folder, near)
        self._screens = [Progress(Console(file=io.StringIO(), force_terminal=terminal)) for terminal in (True, False)]
        self._knocking = [
            Knocking(endpoint, keys, dice)
            for endpoint, keys in ((f"ipc://{folder}/k", None), (_free_port(), Keys.create()))
        ]
        self.surfaces: list[Surface] = [
            Answering("experience", near.experience, dice, self._learn, (Evaluation("s", 0, 2), EVALUATED)),
            Answering("rewards", near.rewards, dice, self._serve, (GetState("s"),)),
            Answering("control", near.control, dice, self._direct, (Status("actor", 0, 0, 1, "", "", {}),)),
            Broadcasting(self._experience, self._policy, near.weights, dice),
            *self._receivers(folder, far, dice),
            *self._knocking,
        ]

    def assert_answers(self) -> None:
        """A new session begins, and everything that belongs to one is answered as ever."""
        for surface in self._knocking:
            surface.assert_gone()
        endpoint = self._rewards_endpoint
        rewards = RemoteRewards(
            endpoint, Sender("run", "learner-0", LATEST), LAYOUT, STATE_TABLE, print, PATIENCE_SECONDS, self._serve
        )
        rewards.begin("honest")
        rows = JointRows.from_arrays(filled(JointRows.array_table(LAYOUT, 3)), LAYOUT)
        rewards.updated(rewards.update(rows, 0.5))
        assert len(rewards.rewards(rewards.submit(rows))) == len(LAYOUT.blocks)
        rewards.begin("again", rewards.state())
        rewards.close()
        actor = Client(self._experience_endpoint, Sender("run", "actor-5"), lambda body: {}, print)
        assert actor.request(*chunk(), PATIENCE_SECONDS, self._learn).body.note == "taken"
        actor.close()

    def close(self) -> None:
        """The screens give back what `print` writes to."""
        for screen in self._screens:
            screen.close()

    def _receivers(self, folder: Path, far: Endpoints, dice: random.Random) -> list[Surface]:
        self._rewards_endpoint, self._experience_endpoint = f"ipc://{folder}/nr", f"ipc://{folder}/ne"
        rewards, learner = Asking("client of rewards", far.rewards, dice), Asking("actor", far.experience, dice)
        asking = RemoteRewards(
            far.rewards,
            Sender("run", "learner-0"),
            LAYOUT,
            STATE_TABLE,
            self._count,
            PATIENCE_SECONDS,
            rewards.serve,
        )
        rows = JointRows.from_arrays(filled(JointRows.array_table(LAYOUT, 3)), LAYOUT)
        rewards.use(
            [
                lambda: asking.begin("s"),
                lambda: asking.state(),
                lambda: asking.rewards(asking.submit(rows)),
                lambda: asking.answer(asking.submit(rows, deviation=True)),
                lambda: asking.updated(asking.update(rows, 0.5)),
            ]
        )
        policy = Policy(LAYOUT, (4,), torch.Generator().manual_seed(0))
        listening = Listening(far.weights, policy, dice)
        listening.listener, client = _connect(_job(folder, far), policy, self._telemetry)
        learner.use([lambda: client.request(*chunk(), PATIENCE_SECONDS, learner.serve)])
        return [rewards, learner, listening]

    def _lead(self, folder: Path, endpoints: Endpoints) -> Director:
        config, processes = load_preset("rover_tower_8"), (Process("learner", 0, 0), Process("actor", 0, 0))
        plan = Plan(
            "run",
            str(folder),
            config.to_yaml(),
            "",
            (Node("here"), Node("there")),
            processes,
            {"supervisor-0": {"control": endpoints.control}},
        )
        return Director(plan, self._telemetry)

    def _learn(self) -> None:
        self._experience._receive(0.001)
        while self._experience._queue:
            self._experience._take()
        self._experience._evaluated.clear()

    def _serve(self) -> None:
        self._rewards.serve(0.001)

    def _direct(self) -> None:
        self._director.pump(0.001)
        self._director.remote_outcome()
        self._director.lost_nodes()
        for screen in self._screens:
            screen.show(self._director.statuses.get("learner-0"), self._director.worries())
            screen._last_line = 0.0

    def _count(self, cause: str) -> None:
        self.drops[cause] += 1


ANSWERS: list[tuple[Any, dict[str, np.ndarray]]] = [
    (Done(), {}),
    (Done(STATE), filled(STATE_TABLE)),
    (Statistics(1, {"accuracy": 0.5}), {}),
    (Refusal("body", "no"), {}),
    *((Standing(state, attempt), {}) for state in ("unknown", "at_work", "answered", "?") for attempt in (0, 1, 2)),
    *((Rewards(3, 1, 0.0, 0.0, d), filled(rewards_table(LAYOUT, 3, d))) for d in (False, True)),
]


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Raises AssertionError if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true any more: {what}"


def _honest_answer(kind: str, body: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    answers = {
        GetState.kind: ANSWERS[1],
        Update.kind: ANSWERS[2],
        Query.kind: ANSWERS[-1 if body.get("deviation") else -2],
    }
    return answers.get(kind, ANSWERS[0])


def _hostile(frames: list[bytes], dice: random.Random, large: float = LARGE) -> list[bytes]:
    frames = mutated_frames(frames, dice)
    if dice.random() < large:
        frames[dice.randrange(len(frames))] = bytes(40 << 20)
    return frames


def _frames(sequence: int, body: Any, arrays: dict[str, np.ndarray]) -> list[bytes]:
    return [bytes(frame) for frame in encode(Sender("run", "somebody"), sequence, body, arrays)]


def _raw(kind: int, endpoint: str, identity: bytes = b"") -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.linger, socket.reconnect_ivl = 0, 1
    if identity:
        socket.routing_id = identity
    if kind in (zmq.ROUTER, zmq.PUB):
        socket.set_hwm(0)
        socket.bind(endpoint)
    else:
        socket.set_hwm(64 if kind == zmq.DEALER else 0)
        socket.connect(endpoint)
    return socket


def _drain(socket: zmq.Socket[bytes]) -> None:
    while socket.poll(0):
        socket.recv_multipart()


def _answer_table(body: Any) -> Any:
    return STATE_TABLE if isinstance(body, Done) and body.note == STATE else {}


def _model() -> RewardModel:
    expert = JointRows.from_arrays(filled(JointRows.array_table(LAYOUT, 8)), LAYOUT)
    return RewardModel(LAYOUT, expert, SETTINGS, 0, "cpu")


def _job(folder: Path, endpoints: Endpoints) -> Job:
    return Job("run", folder, ENVIRONMENT, SPEC, "", 0, "maac", "async", 0, 1, 1, "type", False, endpoints)


def _free_port() -> str:
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"
