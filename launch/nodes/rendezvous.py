"""How the supervisors of several nodes find each other: MPI, for one exchange of addresses, and then never again.

`launch.nodes.ranks` (on the machine of the command line) starts mpiexec; its ranks are the supervisors,
`launch.nodes.node`, and meet in `meet`. The first rank gets what to run, and later the wish to stop, as lines on its
standard input; all of them report on their standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import psutil

from bm3il.launch.config import Config
from bm3il.launch.nodes import reach
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.surroundings import cores
from bm3il.launch.topology import Node, Plan, Process, listeners, place, tcp_addresses
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import Keys

START_SECONDS = 300.0
"""For all nodes to have started: a host may not answer ssh for minutes, and importing Python and its packages may take
a minute where many nodes read them from one slow disk."""
MEET_SECONDS = 60.0
"""For nodes that have all started to meet."""
STOP_LINE = "stop"
REPORT = "bm3il-node:"
"""Begins a line of standard error that is for the command line, not for people."""
SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES, SHARED_BYTES_PER_RANK = 2**20, 2**16
"""What MPI wants there, with room to spare. It does not look: a rank that gets less dies of a bus error, or waits."""
RANKS = ("PMI_SIZE", "SLURM_NTASKS")
RANK = ("PMI_RANK", "SLURM_PROCID")
"""Variables that tell a rank its number before MPI does."""


def report(what: str, *values: str | int) -> None:
    """Tell the command line: that we have `started`, with our number; have `failed`, with the reason; or that the run
    has `ended`, with its exit code and the reason."""
    os.write(sys.stderr.fileno(), f"{REPORT} {json.dumps([what, *values])}\n".encode())  # in one piece


def number_of(variables: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """The first of these variables that is set; 0 without."""
    return next((int(environment[name]) for name in variables if environment.get(name, "").isdigit()), 0)


def meet(private: Path, network: str = "", hosts: Sequence[str] = ()) -> tuple[Plan, int]:
    """Exchange what the nodes must know of each other; returns the plan of the run and the number of this node.

    private: a folder that only its owner may enter, for the keys of the run.
    network: what the user named for the nodes to talk in.   hosts: names of the first nodes, as far as known.
    A rank that never comes ends the others in the end, with a traceback, if nobody else does.
    Raises InputError, on all nodes alike, if they cannot work together.
    """
    faulthandler.dump_traceback_later(START_SECONDS + MEET_SECONDS, exit=True)  # works inside a blocking call of C, too
    check_shared_memory(SHARED_MEMORY, number_of(RANKS))
    found = reach.interfaces()
    reach.check_in(network, node_name(number_of(RANK)), found)
    _lead_mpi(network, hosts, found)
    # Here, since importing MPI initialises it: the command line imports this module, too, and must not be a rank.
    import mpi4py

    # Only the main thread calls MPI.
    mpi4py.rc.threads = False
    from mpi4py import MPI

    # No pickle: also here, what another process sends is data and never code.
    MPI.pickle.__init__(msgpack.packb, msgpack.unpackb)  # type: ignore[misc]
    world = MPI.COMM_WORLD
    _gather_quietly(world)
    order = json.loads(sys.stdin.readline() or "{}") if world.rank == 0 else None
    _gather_quietly(world)  # the first may have waited for its input
    order = world.bcast(order)
    try:
        _check_size(order, world.size)
        address = _address(world, network, found)
        with ExitStack() as held:  # the ports stay taken until everybody knows theirs
            ports = len(listeners(_processes(order)))  # as many as if all were on this node
            facts = world.allgather(asdict(_this_node(address, ports, held)))
    finally:
        number = world.rank
        MPI.Finalize()
        faulthandler.cancel_dump_traceback_later()
    keys_file = private / "keys.json"
    Keys.from_text(order["keys"]).save(keys_file)
    return replace(_plan(order, facts), keys_file=str(keys_file)), number


def node_name(number: int) -> str:
    """This node, for people."""
    return f"node {number} ({socket.gethostname()})"


def check_shared_memory(path: Path, ranks: int) -> None:
    """Raise InputError if MPI would not find as much of it as so many ranks on this machine need."""
    needed = max(SHARED_BYTES, ranks * SHARED_BYTES_PER_RANK)
    if not path.is_dir():
        return
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize if os.access(path, os.W_OK) else 0
    if free < needed:
        raise InputError(
            f"{socket.gethostname()}: {path} has room for {free / 2**20:.1f} MiB, and MPI needs {needed / 2**20:.0f}; "
            "remove what is left there, or give the container more (docker run --shm-size=64m)"
        )


def _lead_mpi(network: str, hosts: Sequence[str], found: reach.Interfaces) -> None:
    """Have MPI's own connections use the network that was named, or that leads to the other hosts; of several it would
    take one by its speed, even if all hosts have the same address there."""
    inside = reach.in_network(found, network) if network else ()
    if name := inside[0][0] if inside else reach.interface_towards(hosts, found):
        os.environ["FI_TCP_IFACE"] = name


def _address(world: Any, network: str, found: reach.Interfaces) -> str:
    """By which this node is reached."""
    names = world.allgather(node_name(world.rank))
    with ExitStack() as held:
        doors: list[tuple[str, int]] = []
        token = secrets.token_bytes(16)
        if world.rank == 0:
            doors = reach.answer(reach.in_network(found, network), token, held)
        doors, token = world.bcast((doors, token))
        tried = reach.attempt(doors, token) if world.rank else {}
        _gather_quietly(world)
        return reach.chosen(names, world.allgather(tried)[1:], network)[int(world.rank)]


def _gather_quietly(world: Any) -> None:
    """Wait for all ranks without spinning, as MPI's blocking calls do."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def _this_node(address: str, ports: int, held: ExitStack) -> Node:
    # Not asked of PyTorch: supervisors do without it, because its import takes long.
    gpus = Path("/proc/driver/nvidia/gpus")
    return Node(
        host=socket.gethostname(),
        address=address,
        ports=tuple(int(each.getsockname()[1]) for each in reach.free_sockets(address, ports, held)),
        cores=cores(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=len(list(gpus.iterdir())) if gpus.is_dir() else 0,
    )


def listen_for_stop(stopped: StopRequests) -> None:
    """Turn the lines that the command line sends to the first rank into requests to stop; blocks for ever."""
    for line in sys.stdin:
        if line.strip() == STOP_LINE:
            stopped.add()


def _check_size(order: dict[str, Any], size: int) -> None:
    config = Config.from_yaml(order.get("config_yaml", ""), "config.yaml")
    if size != config.nodes:
        raise InputError(
            f"expected {config.nodes} nodes, but MPI made a world of {size}: "
            "is it another MPI's mpiexec, or an srun without pmi2?"
        )


def _plan(order: dict[str, Any], facts: list[dict[str, Any]]) -> Plan:
    nodes = tuple(Node(**(fact | {"ports": tuple(fact["ports"])})) for fact in facts)
    processes = place(_processes(order), nodes)
    wanted = len(listeners(processes))
    if len(nodes[0].ports) < wanted:
        ports = f"{reach.PORTS.start}..{reach.PORTS.stop - 1}"
        raise InputError(f"expected {wanted} free ports in {ports} on {nodes[0].address}, found {len(nodes[0].ports)}")
    return Plan(
        run_id=order["run_id"],
        run_folder=order["run_folder"],
        config_yaml=order["config_yaml"],
        spec_json=order["spec_json"],
        nodes=nodes,
        processes=processes,
        addresses=tcp_addresses(nodes, processes),
    )


def _processes(order: dict[str, Any]) -> list[Process]:
    return [Process(**process) for process in order["processes"]]
