"""Hosts of a cluster, played by network namespaces of this machine (needs root, iproute2, util-linux).

Each has a name, an address in a network of their own, 10.78.0.0/24, and a cable that can be cut; nothing of them is to
be seen outside. Or, as in a cloud, each has an address without a network (/32), and a router leads to the others. Used
by the tests of several hosts and by `make chaos`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType

NETWORK = "10.78.0"
AGENT = """#!/bin/sh
# What mpiexec takes for ssh: leave out the options, take the host, run the rest there.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "$host" unshare --uts sh -c "hostname ${PLAYED_HOST_NAME:-$host}; $*"
"""
_CLUSTERS = count()


class NoHosts(RuntimeError):
    """This machine cannot play hosts; the text says what it lacks."""


class Hosts:
    """`with Hosts(4) as hosts:` makes four of them and takes them away at the end, with all that runs on them."""

    def __init__(self, number: int, routed: bool = False) -> None:
        tag = f"bm{os.getpid()}x{next(_CLUSTERS)}"
        self.names = [f"{tag}n{i}" for i in range(number)]
        self.addresses = [f"10.78.{i + 1}.1" if routed else f"{NETWORK}.{i + 1}" for i in range(number)]
        self._routed = routed
        self._switch = f"{tag}sw"
        self._made: list[str] = []

    def __enter__(self) -> Hosts:
        """Raises NoHosts."""
        if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare")):
            raise NoHosts("hosts are played by network namespaces, which need root and iproute2")
        try:
            self._build()
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NoHosts(f"no network namespaces here: {error.stderr.strip()}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def command(self, host: int, program: Sequence[str]) -> list[str]:
        """What runs a program on a host."""
        name = self.names[host]
        return [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name}; exec "$@"',
            "sh",
            *program,
        ]

    def hostfile(self, folder: Path) -> Path:
        """A file with their names, for `--hostfile`."""
        path = folder / "hosts"
        path.write_text("\n".join(self.names) + "\n")
        return path

    def mpiexec_environment(self, folder: Path) -> dict[str, str]:
        """With which mpiexec starts its ranks on them."""
        agent = folder / "agent.sh"
        agent.write_text(AGENT)
        agent.chmod(0o700)
        return {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(agent)}

    def configure(self, host: int, *words: str) -> None:
        """Change its network: the words of an `ip` command."""
        _run("ip", "-n", self.names[host], *words)

    def cut(self, host: int) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        _run("ip", "-n", self._switch, "link", "set", f"v{host}", "down")

    def heal(self, host: int) -> None:
        """Put it in again."""
        _run("ip", "-n", self._switch, "link", "set", f"v{host}", "up")

    def processes(self, host: int) -> list[int]:
        """Pids of what runs on a host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.names[host]).split()]

    def power_off(self, host: int) -> None:
        """All that runs on a host is gone at once, without a word to the others; `heal` brings the empty host back."""
        self.cut(host)
        deadline = time.monotonic() + 10
        while (pids := self.processes(host)) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _build(self) -> None:
        for name in (self._switch, *self.names):
            _run("ip", "netns", "add", name)
            self._made.append(name)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        lines = [f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True)]
        for i, name in enumerate(self.names):
            folder = Path("/etc/netns", name)  # which `ip netns exec` lays over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
            _run(
                "ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{i}", "netns", self._switch
            )
            mask = 32 if self._routed else 24
            _run("ip", "-n", name, "addr", "add", f"{self.addresses[i]}/{mask}", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", name, "link", "set", device, "up")
            if self._routed:
                self._route(i)
            else:
                _run("ip", "-n", self._switch, "link", "set", f"v{i}", "master", "br0", "up")

    def _route(self, host: int) -> None:
        gateway = self.addresses[host].removesuffix("1") + "254"
        _run("ip", "-n", self._switch, "link", "set", f"v{host}", "up")
        _run("ip", "-n", self._switch, "addr", "add", f"{gateway}/24", "dev", f"v{host}")
        _run("ip", "netns", "exec", self._switch, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.configure(host, "route", "add", "default", "via", gateway, "dev", "eth0", "onlink")

    def _remove(self) -> None:
        for name in self._made:
            if name != self._switch:
                self.power_off(self.names.index(name))
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
