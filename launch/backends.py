"""What starts one supervisor per node: Slurm's srun, mpiexec over a list of hosts, or mpiexec on this machine alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.config import Config
from protocol.errors import InputError

PLAIN_TRANSPORT = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
"""For MPICH: MPI exchanges a few addresses here. UCX takes containers for one host, and its addresses are so long that
Slurm's PMI2 was seen to cut them in two."""

BATCH_JOB = "BM3IL_BATCH_JOB"
"""Set by the script of `bm3il submit`: the number of its job, which may be started again."""
SLURM_JOB, SLURM_NODES, SLURM_CORES = "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK"


def rank_command(config: Config, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that runs `launch.node` once per node, the first with our standard input.

    Inside a Slurm allocation srun; with `hostfile` mpiexec on the hosts that it names; else simulated nodes here.
    Raises InputError if the allocation or the file has too few nodes.
    """
    node = [sys.executable, "-m", "launch.node"]
    if config.hostfile:
        _expect(len(_hosts(config.hostfile)), config.nodes, f"hosts in {config.hostfile}")
        # Without auto-cleanup the other supervisors outlive one that dies.
        options = ["-f", config.hostfile, "-ppn", "1", "-n", str(config.nodes), "-disable-auto-cleanup"]
        return [_mpiexec(), *options, *node]
    if in_slurm(environment):
        _expect(int(environment.get(SLURM_NODES, "1")), config.nodes, "nodes in this Slurm allocation")
        # One node that is lost shall not take the others with it.
        size = [f"--nodes={config.nodes}", f"--ntasks={config.nodes}", "--ntasks-per-node=1"]
        if cores := environment.get(SLURM_CORES):  # since 22.05 a step does not take over what its job asked for
            size.append(f"--cpus-per-task={cores}")
        return [_srun(), "--mpi=pmi2", "--no-kill", "--kill-on-bad-exit=0", "--input=0", *size, *node]
    return [_mpiexec(), "-n", str(config.nodes), *node]


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
        raise InputError("this is a Slurm allocation, but there is no srun on the PATH")
    return srun


def _hosts(path: str) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the hosts in {path}: {error}; write one host a line") from error
    return [line for line in lines if line]


def _expect(found: int, wanted: int, what: str) -> None:
    if found < wanted:
        raise InputError(f"asked for {wanted} nodes, but there are {found} {what}")
