"""How the supervisors of several nodes find each other: MPI, for one exchange of addresses, and then never again.

`run_nodes` (on the machine of the command line) starts mpiexec; its ranks are the supervisors, `launch.node`, and meet
in `meet`. The first rank gets what to run, and later the wish to stop, as lines on its standard input.
"""

from __future__ import annotations

import faulthandler
import json
import random
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack

from launch import lifeline, run_folder
from launch.config import Config
from launch.outcome import CRASHED, Outcome
from launch.supervisor import StopRequests
from launch.topology import LISTENERS, Node, Plan, Process, place, tcp_endpoints
from protocol.errors import InputError

RENDEZVOUS_SECONDS = 120.0
KILL_AFTER_SECONDS = 3.0
STOP_LINE = "stop"
ADDRESS = "127.0.0.1"
PORTS = range(20_000, 32_000)


def run_nodes(config: Config, folder: Path, stopped: StopRequests) -> Outcome:
    """Run on `config.nodes` nodes through mpiexec; returns how the run ended, as its first node wrote it down."""
    mpiexec = Path(sys.prefix, "bin", "mpiexec")  # another MPI's mpiexec would start N worlds of one rank
    if not mpiexec.exists():
        raise InputError(f"{mpiexec} is missing: install bm3il with its dependency mpich in this environment")
    program = [str(mpiexec), "-n", str(config.nodes), sys.executable, "-m", "launch.node"]
    # A session of its own: Ctrl-C reaches only this process, which then asks the first node for an orderly end.
    with subprocess.Popen(lifeline.command(program), stdin=subprocess.PIPE, start_new_session=True) as mpi:
        order: dict[str, Any] = {
            "run_folder": str(folder),
            "config_yaml": config.to_yaml(),
            "run_id": secrets.token_hex(8),
        }
        order["processes"] = [asdict(process) for process in place(config)]
        _tell(mpi, json.dumps(order))
        told, kill_at = 0, float("inf")
        while mpi.poll() is None:
            if stopped.count > told:
                told = stopped.count
                _tell(mpi, STOP_LINE)
                kill_at = time.monotonic() + KILL_AFTER_SECONDS if told > 1 else kill_at
            if time.monotonic() > kill_at:
                mpi.kill()
            time.sleep(0.1)
    # What mpiexec returns says little (it may be 0 after a lost rank): the first node's word counts.
    result = run_folder.read_result(folder)
    if "exit_code" not in result:
        return Outcome(CRASHED, f"the nodes ended without a result (mpiexec: {mpi.returncode})")
    return Outcome(result["exit_code"], result.get("error", ""))


def meet() -> tuple[Plan, int]:
    """Exchange what the nodes must know of each other; returns the plan of the run and the number of this node.

    A rank that never comes ends the others after `RENDEZVOUS_SECONDS`, with a traceback.
    Raises InputError, on all nodes alike, if they cannot work together.
    """
    faulthandler.dump_traceback_later(RENDEZVOUS_SECONDS, exit=True)  # works inside a blocking call of C, too
    import mpi4py

    mpi4py.rc.threads = False
    from mpi4py import MPI

    MPI.pickle.__init__(msgpack.packb, msgpack.unpackb)  # type: ignore[misc]
    world = MPI.COMM_WORLD
    order = json.loads(sys.stdin.readline() or "{}") if world.rank == 0 else None
    with ExitStack() as held:  # the ports stay taken until everybody knows theirs
        node = Node(socket.gethostname(), ADDRESS, _free_ports(ADDRESS, held))
        order, facts = world.bcast(order), world.allgather(asdict(node))
        number, size = world.rank, world.size
        MPI.Finalize()
    faulthandler.cancel_dump_traceback_later()
    return _plan(order, facts, size), number


def listen_for_stop(stopped: StopRequests) -> None:
    """Turn the lines that the command line sends to the first rank into requests to stop; blocks for ever."""
    for line in sys.stdin:
        if line.strip() == STOP_LINE:
            stopped.add()


def _plan(order: dict[str, Any], facts: list[dict[str, Any]], size: int) -> Plan:
    config = Config.from_yaml(order.get("config_yaml", ""), "config.yaml")
    if size != config.nodes:
        raise InputError(
            f"expected {config.nodes} nodes, but MPI made a world of {size}: is its mpiexec another MPI's?"
        )
    nodes = tuple(Node(fact["host"], fact["address"], tuple(fact["ports"])) for fact in facts)
    if len({node.host for node in nodes}) > 1:
        raise InputError("the nodes must be on one machine: traffic between machines is not encrypted yet")
    processes = tuple(Process(**process) for process in order["processes"])
    return Plan(
        order["run_id"], order["run_folder"], order["config_yaml"], nodes, processes, tcp_endpoints(nodes, processes)
    )


def _free_ports(address: str, held: ExitStack) -> tuple[int, ...]:
    """One free port per endpoint, taken until `held` is closed.

    They lie below the range that the kernel gives to outgoing connections: those would take them again before, or
    while, the process that they are meant for restarts.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        taken = held.enter_context(socket.socket())
        with suppress(OSError):
            taken.bind((address, port))
            ports.append(port)
        if len(ports) == len(LISTENERS):
            return tuple(ports)
    raise InputError(f"no free ports in {PORTS.start}..{PORTS.stop - 1} on {address}")


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    with suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
