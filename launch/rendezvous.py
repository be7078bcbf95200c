"""How the supervisors of several nodes find each other: MPI, for one exchange of addresses, and then never again.

`run_nodes` (on the machine of the command line) starts mpiexec; its ranks are the supervisors, `launch.node`, and meet
in `meet`. The first rank gets what to run, and later the wish to stop, as lines on its standard input.
"""

from __future__ import annotations

import faulthandler
import ipaddress
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import psutil

from launch import lifeline, run_folder
from launch.backends import PLAIN_TRANSPORT, rank_command
from launch.config import Config
from launch.outcome import CRASHED, Outcome
from launch.supervisor import StopRequests
from launch.topology import LOOPBACK, Node, Plan, Process, listeners, place, processes_of, tcp_addresses
from protocol.errors import InputError
from protocol.keys import Keys
from protocol.specs import EnvironmentSpec

RENDEZVOUS_SECONDS = 120.0
"""Importing Python and its packages may take a minute where many nodes read them from one slow disk."""
MEETINGS = 3
"""How often the nodes are started if they do not find each other."""
MET = "targets.json"
"""A file of the run folder that is there once the first node leads."""
KILL_AFTER_SECONDS = 3.0
LAST_RANK_SECONDS = 10.0
"""How long, once the first node has written down the end, the others have to end: mpiexec waits for a host that lost
its power for ever."""
STOP_LINE = "stop"
PORTS = range(20_000, 32_000)
"""Below 32,768, where Linux begins to give ports to outgoing connections."""


def run_nodes(config: Config, spec: EnvironmentSpec, folder: Path, stopped: StopRequests) -> Outcome:
    """Run on `config.nodes` nodes; returns how the run ended, as its first node wrote it down.

    Raises InputError if the nodes cannot be started as the configuration asks.
    """
    program, spec_json = rank_command(config), json.dumps(spec.to_json())
    for attempt in range(1, MEETINGS + 1):
        start = time.monotonic()
        code = _run_ranks(program, config, spec_json, folder, stopped)
        # What mpiexec or srun return says little (it may be 0 after a lost rank): the first node's word counts.
        result = run_folder.read_result(folder)
        if "exit_code" in result:
            return Outcome(result["exit_code"], result.get("error", ""))
        early = time.monotonic() - start < RENDEZVOUS_SECONDS and not (folder / MET).exists()
        if stopped.count or not early or attempt == MEETINGS:
            break
        print(f"the nodes did not meet (code {code}); trying again", file=sys.stderr)
    return Outcome(CRASHED, f"the nodes ended without a result (code {code})")


def _run_ranks(program: list[str], config: Config, spec_json: str, folder: Path, stopped: StopRequests) -> int:
    (folder / MET).unlink(missing_ok=True)
    # A session of its own: Ctrl-C reaches only this process, which then asks the first node for an orderly end.
    with subprocess.Popen(
        lifeline.command(program), stdin=subprocess.PIPE, start_new_session=True, env=PLAIN_TRANSPORT | os.environ
    ) as mpi:
        order: dict[str, Any] = {
            "run_folder": str(folder),
            "config_yaml": config.to_yaml(),
            "spec_json": spec_json,
            "run_id": secrets.token_hex(8),
            "keys": Keys.create().to_text(),
        }
        order["processes"] = [asdict(process) for process in processes_of(config)]
        _tell(mpi, json.dumps(order))
        told, kill_at = 0, float("inf")
        while mpi.poll() is None:
            if stopped.count > told:
                told = stopped.count
                _tell(mpi, STOP_LINE)
                kill_at = time.monotonic() + KILL_AFTER_SECONDS if told > 1 else kill_at
            if kill_at == float("inf") and "exit_code" in run_folder.read_result(folder):
                kill_at = time.monotonic() + LAST_RANK_SECONDS
            if time.monotonic() > kill_at:
                mpi.kill()
            time.sleep(0.1)
    return int(mpi.returncode)


def meet(private: Path) -> tuple[Plan, int]:
    """Exchange what the nodes must know of each other; returns the plan of the run and the number of this node.

    private: a folder that only its owner may enter, for the keys of the run.
    A rank that never comes ends the others after `RENDEZVOUS_SECONDS`, with a traceback.
    Raises InputError, on all nodes alike, if they cannot work together.
    """
    faulthandler.dump_traceback_later(RENDEZVOUS_SECONDS, exit=True)  # works inside a blocking call of C, too
    import mpi4py

    mpi4py.rc.threads = False
    from mpi4py import MPI

    MPI.pickle.__init__(msgpack.packb, msgpack.unpackb)  # type: ignore[misc]
    world = MPI.COMM_WORLD
    _gather_quietly(world)
    order = json.loads(sys.stdin.readline() or "{}") if world.rank == 0 else None
    _gather_quietly(world)  # the first may have waited for its input
    order, reached = world.bcast(order), world.allgather((socket.gethostname(), addresses()))
    facts: list[dict[str, Any]] = []
    with ExitStack() as held:  # the ports stay taken until everybody knows theirs
        chosen = common_addresses(reached)
        if chosen is not None:
            ports = len(listeners(_processes(order)))  # as many as if all were on this node
            facts = world.allgather(asdict(_this_node(chosen[world.rank], ports, held)))
        number, size = world.rank, world.size
        MPI.Finalize()
    faulthandler.cancel_dump_traceback_later()
    if chosen is None:
        raise InputError(f"the nodes have no network in common: {reached}")
    keys_file = private / "keys.json"
    Keys.from_text(order["keys"]).save(keys_file)
    return replace(_plan(order, facts, size), keys_file=str(keys_file)), number


def addresses() -> list[str]:
    """IPv4 addresses of this machine with their networks, `10.0.0.7/24`, without the loopback's."""
    found = []
    for name, parts in psutil.net_if_addrs().items():
        up = name in (states := psutil.net_if_stats()) and states[name].isup
        for part in parts:
            if up and part.family == socket.AF_INET and not part.address.startswith("127.") and part.netmask:
                found.append(str(ipaddress.ip_interface(f"{part.address}/{part.netmask}")))
    return found


def common_addresses(reached: Sequence[tuple[str, Sequence[str]]]) -> list[str] | None:
    """Of (host, addresses) of all nodes: the address of each by which the others reach it.

    The loopback if all are one machine; else those in the first network of the first node in which all of them are;
    None if there is none.
    """
    if len({host for host, _ in reached}) == 1:
        return [LOOPBACK] * len(reached)
    of_node = [[ipaddress.ip_interface(address) for address in found] for _, found in reached]
    for first in of_node[0]:
        same = [next((a for a in found if a.network == first.network), None) for found in of_node]
        if all(same):
            return [str(a.ip) for a in same if a is not None]
    return None


def _gather_quietly(world: Any) -> None:
    """Wait for all ranks without spinning, as MPI's blocking calls do."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def _this_node(address: str, ports: int, held: ExitStack) -> Node:
    gpus = Path("/proc/driver/nvidia/gpus")
    return Node(
        host=socket.gethostname(),
        address=address,
        ports=_free_ports(address, ports, held),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=len(list(gpus.iterdir())) if gpus.is_dir() else 0,
    )


def listen_for_stop(stopped: StopRequests) -> None:
    """Turn the lines that the command line sends to the first rank into requests to stop; blocks for ever."""
    for line in sys.stdin:
        if line.strip() == STOP_LINE:
            stopped.add()


def _plan(order: dict[str, Any], facts: list[dict[str, Any]], size: int) -> Plan:
    config = Config.from_yaml(order.get("config_yaml", ""), "config.yaml")
    if size != config.nodes:
        raise InputError(
            f"expected {config.nodes} nodes, but MPI made a world of {size}: "
            "is it another MPI's mpiexec, or an srun without pmi2?"
        )
    nodes = tuple(Node(**(fact | {"ports": tuple(fact["ports"])})) for fact in facts)
    processes = place(_processes(order), nodes)
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


def _free_ports(address: str, count: int, held: ExitStack) -> tuple[int, ...]:
    """So many free ports, taken until `held` is closed.

    They lie below the range that the kernel gives to outgoing connections: those would take them again before, or
    while, the process that they are meant for restarts.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        taken = held.enter_context(socket.socket())
        with suppress(OSError):
            taken.bind((address, port))
            ports.append(port)
        if len(ports) == count:
            return tuple(ports)
    raise InputError(f"no free ports in {PORTS.start}..{PORTS.stop - 1} on {address}")


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    with suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
