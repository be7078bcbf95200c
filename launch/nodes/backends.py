"""What starts one supervisor per node: Slurm's srun, mpiexec over a list of hosts, or mpiexec on this machine alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from bm3il.launch.config import Config
from bm3il.launch.surroundings import module_command
from bm3il.protocol.errors import InputError

MPI_SETTINGS = {
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS": "4",
    "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_CELL_SIZE": "2048",
}
"""For MPICH: MPI exchanges a few addresses here. UCX takes containers for one host, and its addresses are so long that
Slurm's PMI2 was seen to cut them in two. Its cells of shared memory take a MiB per rank as they are."""

LEFT_OVER = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "MPI_LOCAL")
"""Variables of another MPI, or of a rank that we may be ourselves: ranks of ours would take them for their own."""
LEFT_BY_SLURM, OF_THE_CLUSTER = "SLURM_", "SLURM_CONF"

BATCH_JOB = "BM3IL_BATCH_JOB"
"""Set by the script of `bm3il submit`: the number of its job, which may be started again."""
HOST = re.compile(r"(?P<host>\w[\w.@-]*)(:(?P<colon>[1-9]\d{0,5})|\s+slots\s*=\s*(?P<slots>[1-9]\d{0,5}))?", re.ASCII)
"""A line of a host file: the slots are as MPICH writes them, or as Open MPI does."""
SLURM_JOB, SLURM_NODES, SLURM_CORES = "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK"


@dataclass(frozen=True)
class Backend:
    """What starts the nodes: a program, to which the command of a node is added, and its environment.

    hosts: of the nodes, in their order, as far as known.
    queues: the program may have to wait for resources, for as long as it takes.
    """

    program: tuple[str, ...]
    environment: dict[str, str]
    hosts: tuple[str, ...] = ()
    queues: bool = False

    def command(self, network: str) -> list[str]:
        """That runs `launch.nodes.node` once per node, the first with our standard input."""
        # Two hosts are enough: at least one of them is not the node itself, and shows the way to the others.
        return [*self.program, *module_command("bm3il.launch.nodes.node", f"--network={network}", *self.hosts[:2])]


def backend(config: Config, environment: Mapping[str, str] = os.environ) -> Backend:
    """With `hostfile` mpiexec on the hosts that it names; inside a Slurm allocation srun; else mpiexec here.

    Raises InputError if the allocation or the file has too few nodes.
    """
    foreign = LEFT_OVER if in_slurm(environment) and not config.hostfile else (*LEFT_OVER, LEFT_BY_SLURM)
    clean = {k: v for k, v in environment.items() if not k.startswith(foreign) or k == OF_THE_CLUSTER} | MPI_SETTINGS
    if config.hostfile:
        nodes = Counter(_hosts(config.hostfile, config.nodes))
        listed = ",".join(f"{host}:{count}" for host, count in nodes.items())
        # Without auto-cleanup the other supervisors outlive one that dies.
        options: tuple[str, ...] = ("-hosts", listed, "-n", str(config.nodes), "-disable-auto-cleanup")
        return Backend((_mpiexec(), *options), clean, tuple(nodes.elements()))
    if in_slurm(environment):
        _expect(int(environment.get(SLURM_NODES, "1")), config.nodes, "nodes in this Slurm allocation")
        # One node that is lost shall not take the others with it.
        size = [f"--nodes={config.nodes}", f"--ntasks={config.nodes}", "--ntasks-per-node=1"]
        if cores := environment.get(SLURM_CORES):  # since 22.05 a step does not take over what its job asked for
            size.append(f"--cpus-per-task={cores}")
        options = ("--mpi=pmi2", "--no-kill", "--kill-on-bad-exit=0", "--input=0", *size)
        return Backend((_srun(), *options), clean, _slurm_hosts(), queues=True)
    return Backend((_mpiexec(), "-n", str(config.nodes)), clean)


def check_hosts(config: Config) -> None:
    """Raise InputError for a host file that cannot be read, names too few hosts, or that a single node ignores."""
    if not config.hostfile:
        return
    _hosts(config.hostfile, config.nodes)
    if config.nodes == 1:
        raise InputError(
            f"--hostfile names the hosts of several nodes, and --nodes is 1: say how many of {config.hostfile} take "
            "part with --nodes, or leave out --hostfile to run on this machine alone"
        )


def start_again(environment: Mapping[str, str] = os.environ) -> None:
    """Have Slurm start our batch job again, if we are one: its first node is lost, and with it the batch script.

    Slurm itself, which is told not to end the job with a node, would keep the others in it until the time is over.
    """
    if job := environment.get(BATCH_JOB):
        subprocess.run(["scontrol", "requeue", job], check=False)


def in_slurm(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process stands in an allocation of several nodes."""
    return SLURM_JOB in environment and environment.get(SLURM_NODES, "1") != "1"


def _mpiexec() -> str:
    mpiexec = Path(sys.prefix, "bin", "mpiexec")  # another MPI's mpiexec would start N worlds of one rank
    if not mpiexec.exists():
        raise InputError(f"{mpiexec} is missing: install bm3il with its dependency mpich in this environment")
    return str(mpiexec)


def _srun() -> str:
    if (srun := shutil.which("srun")) is None:
        raise InputError(
            f"this is a Slurm allocation ({SLURM_JOB} is set), but there is no srun on the PATH; if the allocation is "
            f"over, unset {SLURM_JOB}"
        )
    return srun


def _slurm_hosts() -> tuple[str, ...]:
    # Names are for messages and for the choice of an interface: a run goes on without them.
    with suppress(OSError, subprocess.SubprocessError):
        show = ["scontrol", "show", "hostnames"]
        return tuple(subprocess.run(show, capture_output=True, text=True, timeout=10, check=True).stdout.split())
    return ()


def _hosts(path: str, nodes: int) -> list[str]:
    """The host of each node: one after the other in the order of the file, and again while they have slots left."""
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the hosts in {path}: {cause}; write one host a line") from error
    slots: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if line and not (found := HOST.fullmatch(line)):
            raise InputError(f"{path}, line {number}: expected 'host', 'host:2' or 'host slots=2', got '{line}'")
        if line and found:
            slots[found["host"]] += int(found["colon"] or found["slots"] or 1)
    _expect(slots.total(), nodes, f"hosts in {path}")
    order = (host for turn in count() for host in slots if turn < slots[host])
    return list(islice(order, nodes))


def _expect(found: int, wanted: int, what: str) -> None:
    if found < wanted:
        raise InputError(f"asked for {wanted} nodes, but there are {found} {what}")
