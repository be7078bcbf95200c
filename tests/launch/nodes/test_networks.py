"""Hosts whose addresses and names tell little: a run finds its way all the same, or says in a line what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, NoHosts

from tests.launch.test_faults import DEADLINE_SECONDS, SMALL, result_of

pytestmark = pytest.mark.processes

HOSTS = 3
SIZE = ["--actors", "3", "--steps", "300", "--learner.deadline-seconds", "30"]


@pytest.fixture(params=[False])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    try:
        with Hosts(HOSTS, routed=request.param) as made:
            yield made
    except NoHosts as error:
        pytest.skip(str(error))


def add_interface(hosts: Hosts, name: str, addresses: list[str]) -> None:
    """An interface of that name on every host, which leads nowhere."""
    for host, address in enumerate(addresses):
        hosts.configure(host, "link", "add", name, "type", "veth", "peer", "name", f"{name}peer")
        hosts.configure(host, "addr", "add", address, "dev", name)
        for device in (name, f"{name}peer"):
            hosts.configure(host, "link", "set", device, "up")


def train_on(hosts: Hosts, folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Exit code and output."""
    more = ["--nodes", str(HOSTS), "--hostfile", str(hosts.hostfile(folder)), *options]
    program = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", "run", *SMALL, *SIZE, *more]
    environment = os.environ | hosts.mpiexec_environment(folder) | environment
    done = subprocess.run(
        hosts.command(0, program),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def nodes_of(output: str) -> list[str]:
    """Names and addresses of the nodes, as printed."""
    return re.findall(r"^node \d \((\S+, \S+),", output, re.MULTILINE)


def test_an_address_that_every_host_has_is_no_network(hosts: Hosts, tmp_path: Path) -> None:
    add_interface(hosts, "docker0", ["172.17.0.1/16"] * HOSTS)
    add_interface(hosts, "abox", ["10.0.2.15/24"] * HOSTS)
    code, output = train_on(hosts, tmp_path)
    assert (code, result_of(tmp_path, "run")["status"]) == (0, "finished"), output
    pairs = zip(hosts.names, hosts.addresses, strict=True)
    assert nodes_of(output) == [f"{name}, {address}" for name, address in pairs]


def test_hosts_of_one_name_are_not_one_machine(hosts: Hosts, tmp_path: Path) -> None:
    code, output = train_on(hosts, tmp_path, PLAYED_HOST_NAME=hosts.names[0])
    assert code == 0, output
    assert nodes_of(output) == [f"{hosts.names[0]}, {address}" for address in hosts.addresses]


@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_hosts_without_a_common_network_are_reached_over_a_router(hosts: Hosts, tmp_path: Path) -> None:
    code, output = train_on(hosts, tmp_path)
    assert code == 0, output
    assert [each.partition(", ")[2] for each in nodes_of(output)] == hosts.addresses


def test_the_network_can_be_named(hosts: Hosts, tmp_path: Path) -> None:
    for host in range(HOSTS):
        hosts.configure(host, "addr", "add", f"10.79.0.{host + 1}/24", "dev", "eth0")
    code, output = train_on(hosts, tmp_path, "--network", "10.79.0.0/24")
    assert code == 0, output
    assert [each.partition(", ")[2] for each in nodes_of(output)] == ["10.79.0.1", "10.79.0.2", "10.79.0.3"]


def test_a_network_that_a_host_is_not_in_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    add_interface(hosts, "eth1", ["10.79.0.1/24", "10.79.0.2/24"])
    code, output = train_on(hosts, tmp_path, "--network", "eth1")
    name, address = hosts.names[2], hosts.addresses[2]
    assert code == 2
    said = [line for line in output.splitlines() if line.startswith("bm3il: ")]
    has = f"lo 127.0.0.1/8, eth0 {address}/24"
    assert said == [f"bm3il: --network eth1 fits no address of node 2 ({name}); it has {has}"]
    assert "trying again" not in output


def test_who_cannot_reach_whom_is_said_before_anything_starts(hosts: Hosts, tmp_path: Path) -> None:
    # As a firewall would that lets only MPI through.
    hosts.configure(2, "rule", "add", "ipproto", "tcp", "dport", "20000-31999", "prohibit")
    code, output = train_on(hosts, tmp_path)
    assert code == 2, output
    first, last = hosts.names[0], hosts.names[2]
    said = next(line for line in output.splitlines() if line.startswith("bm3il: "))
    assert said.startswith(f"bm3il: node 2 ({last}) cannot reach node 0 ({first}): 127.0.0.1 (")
    assert f"{hosts.addresses[0]} (" in said
    assert "--network" in said
    assert output.count("cannot reach") == 1
