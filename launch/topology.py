"""Which process of a run lives on which node, and where it listens: plain data, known before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dacite

from bm3il.launch.config import Config
from bm3il.launch.surroundings import cores
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.keys import Keys
from bm3il.protocol.messages import Sender
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.telemetry import Telemetry

# Linux has 108 bytes for the path of a socket, with a zero at the end.
MAX_IPC_PATH_BYTES = 107
LOOPBACK = "127.0.0.1"
ANY_ADDRESS = ("0.0.0.0", "::")

LISTENERS = {"experience": "learner", "weights": "learner", "rewards": "reward-server", "control": "supervisor"}
"""Which role listens on which endpoint."""
DIRECTOR = "supervisor-0"
"""The supervisor that listens: that of the first node."""

Addresses = dict[str, dict[str, str]]
"""Name of a process that listens → endpoint → where."""


@dataclass(frozen=True)
class Process:
    """One process of a run, beside the supervisors."""

    role: str
    index: int
    node: int

    @property
    def name(self) -> str:
        """Unique in the run: `actor-3`."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Node:
    """One node: the address that its processes are reached at, and free ports for those of them that listen; what it
    has, as far as known."""

    host: str
    address: str = LOOPBACK
    ports: tuple[int, ...] = ()
    cores: int = 0
    memory_bytes: int = 0
    gpus: int = 0

    @property
    def description(self) -> str:
        """For people."""
        parts = [self.host]
        if self.address != LOOPBACK:
            parts.append(self.address)
        if self.cores:
            parts.append(f"{self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB, {self.gpus or 'no'} GPU")
        return ", ".join(parts)


@dataclass(frozen=True)
class Plan:
    """All that the nodes and processes of one start of a run must agree on.

    spec_json: the environment's description.
    addresses: of all processes that listen; there may be several of a role.
    keys_file: where this node keeps the keys of the run; empty on a single node, whose sockets are files.
    """

    run_id: str
    run_folder: str
    config_yaml: str
    spec_json: str
    nodes: tuple[Node, ...]
    processes: tuple[Process, ...]
    addresses: Addresses
    keys_file: str = ""

    @property
    def control(self) -> str:
        """Where the director listens."""
        return self.addresses[DIRECTOR]["control"]

    def endpoints(self, index: int) -> Endpoints:
        """The sockets that the process of a role with this number uses: its own, and of the other roles' processes the
        one whose turn it is."""
        urls = {"control": self.control}
        for name, role in LISTENERS.items():
            listening = [process.name for process in self.processes if process.role == role]
            if listening:
                urls[name] = self.addresses[listening[index % len(listening)]][name]
        return Endpoints(*(urls.get(name, "") for name in LISTENERS))

    def telemetry(self, role: str, index: int, node: int) -> Telemetry:
        """That of the process which calls this.

        Raises InputError if the keys or the token cannot be read, or the metrics cannot listen.
        """
        keys = Keys.load(Path(self.keys_file)) if self.keys_file else None
        sender = Sender(self.run_id, f"{role}-{index}", keys=keys)
        here, config = self.nodes[node], self.config
        host, bind = config.metrics_address or here.address, ""
        if host in ANY_ADDRESS:
            host, bind = here.host if here.address == LOOPBACK else here.address, host
        return Telemetry(role, index, sender, node, host, config.metrics_token(), self.metrics_port(sender.name), bind)

    def metrics_port(self, name: str) -> int:
        """Of a process's metrics, 0 for any. Those of one run differ, since its nodes may be one machine, and a process
        whose node is lost goes on at another."""
        if not (first := self.config.metrics_port):
            return 0
        supervisors = [f"supervisor-{number}" for number in range(len(self.nodes))]
        return first + [*supervisors, *(process.name for process in self.processes)].index(name)

    @property
    def config(self) -> Config:
        """The configuration, rebuilt from its text."""
        return Config.from_yaml(self.config_yaml, "config.yaml")

    def job(self, index: int) -> Job:
        """What the process of a role with this number is told."""
        spec = EnvironmentSpec.from_json(json.loads(self.spec_json))
        return make_job(self.config, spec, self.run_id, Path(self.run_folder), self.endpoints(index))

    def on(self, node: int) -> list[Process]:
        """The processes of a node, without its supervisor."""
        return [process for process in self.processes if process.node == node]

    def lines(self) -> list[str]:
        """For people: the processes of each node, and below them the endpoints that they listen on."""
        lines = []
        for number, node in enumerate(self.nodes):
            names = [f"supervisor-{number}", *(process.name for process in self.on(number))]
            lines.append(f"node {number} ({node.description}): {' '.join(names)}")
            for name in names:
                lines += [f"    {endpoint:<10} {url}" for endpoint, url in self.addresses.get(name, {}).items()]
        lines += [warning for number in range(len(self.nodes)) if (warning := self._crowding(number))]
        better = next((number for number, node in enumerate(self.nodes) if node.gpus > self.nodes[0].gpus), None)
        if better is not None and not self.nodes[0].gpus:
            lines.append(f"the learner runs on node 0, which has no GPU; start with the host of node {better} first")
        return lines

    def _crowding(self, node: int) -> str:
        """A sentence if the threads of a node's processes are more than its cores: those that wait for the others of
        their process do so busily, and take the core from them. One thread each waits for nobody.
        """
        threads = [self.config.threads_of(process.role) for process in self.on(node)]
        has = self.nodes[node].cores or cores()
        if max(threads, default=1) == 1 or sum(threads) <= has:
            return ""
        return (
            f"the processes of node {node} compute in {sum(threads)} threads on {has} cores, which slows all of them "
            "down: ask for fewer with --threads, or of a role with --learner.threads, --actor.threads, --reward.threads"
        )

    def to_json(self) -> str:
        """For the standard input of a process that this one starts."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        return dacite.from_dict(cls, json.loads(text), dacite.Config(cast=[tuple], strict=True))


def processes_of(config: Config) -> tuple[Process, ...]:
    """Which processes a run has; all on the first node until they are placed."""
    from bm3il.learner.algorithms import algorithm  # supervisors read plans, and do without torch

    processes = [Process("learner", 0, 0), Process("evaluator", 0, 0)]
    if not algorithm(config.algorithm).clones:
        processes.append(Process("reward-server", 0, 0))
        processes += [Process("actor", index, 0) for index in range(config.actors)]
    return tuple(processes)


def place(processes: Iterable[Process], nodes: Sequence[Node]) -> tuple[Process, ...]:
    """The processes on their nodes: each needs a core, and an actor goes to the node with most of them left.

    All others stay at the first node, whose disk holds the run folder. Of equal nodes the first is taken.
    """
    left = [node.cores for node in nodes]
    placed = []
    # The others first: actors are spread over what these leave of the first node.
    for process in sorted(processes, key=lambda process: process.role == "actor"):
        node = left.index(max(left)) if process.role == "actor" else 0
        left[node] -= 1
        placed.append(replace(process, node=node))
    return tuple(placed)


def listeners(processes: Iterable[Process]) -> list[tuple[Process, str]]:
    """All sockets that listen, each with its process."""
    supervisor = Process("supervisor", 0, 0)
    return [(p, name) for p in (*processes, supervisor) for name, role in LISTENERS.items() if p.role == role]


def ipc_addresses(folder: Path, processes: Iterable[Process]) -> Addresses:
    """Sockets in a private folder, for a run on one node.

    Raises InputError if the folder's path is too long for a socket.
    """
    addresses: Addresses = {}
    for process, name in listeners(processes):
        path = folder / f"{name}-{process.index}"
        if len(str(path).encode()) > MAX_IPC_PATH_BYTES:
            raise InputError(
                f"the temporary folder {folder} has too long a path for sockets; set TMPDIR to a shorter one"
            )
        addresses.setdefault(process.name, {})[name] = f"ipc://{path}"
    return addresses


def tcp_addresses(nodes: Sequence[Node], processes: Iterable[Process]) -> Addresses:
    """Sockets on the ports that the nodes of the listening processes found free, one of them for each."""
    free = [iter(node.ports) for node in nodes]
    addresses: Addresses = {}
    for process, name in listeners(processes):
        url = f"tcp://{nodes[process.node].address}:{next(free[process.node])}"
        addresses.setdefault(process.name, {})[name] = url
    return addresses


def make_job(config: Config, spec: EnvironmentSpec, run_id: str, run_folder: Path, endpoints: Endpoints) -> Job:
    """What every process of the run is told."""
    return Job(
        run_id=run_id,
        run_folder=run_folder,
        environment=config.environment,
        spec=spec,
        demonstrations=config.demonstrations,
        demonstration_episodes=config.demonstration_episodes,
        algorithm=config.algorithm,
        mode=config.mode,
        seed=config.seed,
        steps=config.steps,
        actors=config.actors,
        parameter_sharing=config.parameter_sharing,
        agent_identity=config.actor.agent_identity,
        endpoints=endpoints,
    )
