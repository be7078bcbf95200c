"""Several hosts, played by network namespaces: the run of one node, over TCP with keys, to the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_faults import DEADLINE_SECONDS, SMALL, result_of, start

AGENT = """#!/bin/sh
# What mpiexec takes for ssh: leave out the options, take the host, run the rest there.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
"""
HOSTS = 4


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Namespaces in a network of their own, 10.78.0.0/24, behind a bridge in another namespace."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare")):
        pytest.skip("hosts are played by network namespaces, which need root and iproute2")
    tag = f"bm{os.getpid()}"
    names, switch = [f"{tag}n{i}" for i in range(HOSTS)], f"{tag}sw"
    made: list[str] = []
    try:
        for name in (switch, *names):
            try:
                run("ip", "netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            made.append(name)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"10.78.0.{i + 1} {name}\n" for i, name in enumerate(names))
        for i, name in enumerate(names):
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(table)
            run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{i}", "netns", switch)
            run("ip", "-n", switch, "link", "set", f"v{i}", "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"10.78.0.{i + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def test_four_hosts_compute_what_one_node_computes(hosts: list[str], tmp_path: Path) -> None:
    agent = tmp_path / "agent.sh"
    agent.write_text(AGENT)
    agent.chmod(0o700)
    (tmp_path / "hosts").write_text("\n".join(hosts))
    size = ["--actors", "4", "--steps", "1200"]
    options = [*size, "--nodes", str(HOSTS), "--hostfile", str(tmp_path / "hosts")]
    train = [sys.executable, "-m", "launch.cli", "train", "--run", "hosts", *SMALL, *options]
    first = f'hostname {hosts[0]}; exec "$@"'
    done = subprocess.run(
        ["ip", "netns", "exec", hosts[0], "unshare", "--uts", "sh", "-c", first, "sh", *train],
        cwd=tmp_path,
        env=os.environ | {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(agent)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for i, name in enumerate(hosts):
        assert re.search(rf"node {i} \({name}, 10\.78\.0\.{i + 1}, .*supervisor-{i}.* actor-{i}", done.stdout)
    assert re.search(r"experience tcp://10\.78\.0\.1:\d+", done.stdout)
    targets = json.loads((tmp_path / "runs" / "hosts" / "targets.json").read_text())
    assert {target["targets"][0].partition(":")[0] for target in targets} == {f"10.78.0.{i + 1}" for i in range(HOSTS)}
    alone = start(tmp_path, "alone", *size)
    output, _ = alone.communicate(timeout=DEADLINE_SECONDS)
    assert alone.returncode == 0, output
    assert result_of(tmp_path, "hosts")["policy_sha256"] == result_of(tmp_path, "alone")["policy_sha256"]
