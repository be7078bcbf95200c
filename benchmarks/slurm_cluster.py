"""A real Slurm on the hosts of `hosts.py`: a controller and some nodes, with keys and state of their own.

Nothing of it is installed or left: it reads no configuration of the machine and disturbs no Slurm that runs there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from hosts import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
READY_SECONDS = 30.0
HUNG_SECONDS = 240.0
"""Of a command: half a minute for a whole run under salloc on an idle machine, several times that beside others."""
CONFIGURATION = """\
ClusterName=bm3il
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
# A requeued job waits until its old credentials have expired: two minutes if nothing is said.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
# A node may claim what it likes; one that was lost is welcome back; how soon it counts as lost, in seconds.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class NoSlurm(RuntimeError):
    """Slurm is not installed here, or does not start; the text says which."""


class SlurmCluster:
    """`with SlurmCluster(4) as slurm:` runs the controller on host 0 and the nodes on hosts 1 to 4 of `slurm.hosts`.

    A job in the partition `high` takes the nodes of one in `low`, the default.
    """

    def __init__(self, nodes: int) -> None:
        self.hosts = Hosts(nodes + 1)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        """Raises NoSlurm or NoHosts."""
        # Debian has its daemons in folders that only root has on the PATH.
        if missing := [name for name in PROGRAMS if not shutil.which(name)]:
            raise NoSlurm(f"Slurm is not installed: no {', '.join(missing)}")
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
            stack.enter_context(self.hosts)
            stack.callback(self._kill_daemons)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """With which Slurm's commands find this cluster, on any of its hosts."""
        return os.environ | {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run a program on the controller's host; returns what it printed, of both kinds."""
        done = subprocess.run(
            self.hosts.command(0, command),
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HUNG_SECONDS,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, NodeList, …"""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def at_work(self) -> list[str]:
        """Commands of all that runs on the nodes, beside Slurm itself."""
        pids = [pid for host in range(1, len(self.hosts.names)) for pid in self.hosts.processes(host)]
        return [command for pid in pids if "slurm" not in (command := _command(pid)) and command]

    def boot(self, host: int) -> None:
        """Start the node on a host, again after `hosts.power_off` and `hosts.heal`."""
        self._daemon(self.hosts.command(host, ["slurmd", "-D", "-N", self.hosts.names[host]]))

    def _start(self) -> None:
        names, addresses = self.hosts.names, self.hosts.addresses
        lines = [f"NodeName={name} NodeAddr={at} CPUs=1" for name, at in zip(names[1:], addresses[1:], strict=True)]
        text = CONFIGURATION.format(
            folder=self._folder, controller=f"{names[0]}({addresses[0]})", nodes="\n".join(lines)
        )
        (self._folder / "slurm.conf").write_text(text)
        # Without a version named, the nodes look for cgroups, although nothing here needs them.
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self._folder / "state").mkdir()
        key = self._folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(256))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon(
            ["munged", "--foreground", "--force", *(f"--{k}={self._folder}/munge.{v}" for k, v in files.items())]
        )
        self._wait(lambda: (self._folder / "munge.socket").exists(), "munged")
        self._daemon(self.hosts.command(0, ["slurmctld", "-D"]))
        for host in range(1, len(names)):
            self.boot(host)
        self._wait(self._idle, "the nodes")

    def _idle(self) -> bool:
        count = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
        done = subprocess.run(self.hosts.command(0, count), env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() == str(len(self.hosts.names) - 1)

    def _daemon(self, command: Sequence[str]) -> None:
        with (self._folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment)
            )

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise NoSlurm(f"{what} did not get ready: {(self._folder / 'daemons.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _kill_daemons(self) -> None:
        """Before the hosts go: who is killed starts nothing any more."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
