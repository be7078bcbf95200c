"""Several hosts, played by network namespaces: the run of one node, over TCP with keys, to the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Hosts, NoHosts

from tests.launch.test_faults import SMALL, finished, iterations, result_of, wait_for

pytestmark = pytest.mark.processes

HOSTS = 4
SIZE = [
    *("--actors", "4", "--steps", "3000", "--learner.deadline-seconds", "60"),
    *("--learner.clipped.epochs", "2", "--learner.clipped.parts", "4"),
]
DEADLINE_SECONDS = 140.0


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts(HOSTS) as made:
            yield made
    except NoHosts as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the same run on one node."""
    return finished(tmp_path_factory.mktemp("alone"), "run", *SIZE)


def start_on(hosts: Hosts, folder: Path, *command: str) -> subprocess.Popen[str]:
    """The command line, on the first host."""
    program = hosts.command(0, [sys.executable, "-m", "bm3il.launch.cli", *command])
    env = os.environ | hosts.mpiexec_environment(folder)
    return subprocess.Popen(program, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_on(hosts: Hosts, folder: Path) -> subprocess.Popen[str]:
    options = [*SIZE, "--nodes", str(HOSTS), "--hostfile", str(hosts.hostfile(folder))]
    return start_on(hosts, folder, "train", "--run", "run", *SMALL, *options)


def on_host(hosts: Hosts, host: int, module: str) -> psutil.Process:
    """A process of the run on a host, by the module that it runs."""
    for pid in hosts.processes(host):
        try:
            command = (process := psutil.Process(pid)).cmdline()
            if module in command and "bm3il.launch.processes.lifeline" not in command and command[0] == sys.executable:
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no {module} on host {host}")


def finish(process: subprocess.Popen[str], folder: Path, alone: dict[str, Any]) -> str:
    """Wait for the end; the policy must be that of one node. Returns what was printed."""
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert result_of(folder, "run")["policy_sha256"] == alone["policy_sha256"], output
    return output


def test_four_hosts_compute_what_one_node_computes(hosts: Hosts, tmp_path: Path, alone: dict[str, Any]) -> None:
    output = finish(train_on(hosts, tmp_path), tmp_path, alone)
    for i, (name, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
        assert re.search(rf"node {i} \({name}, {re.escape(address)}, .*supervisor-{i}", output)
    assert re.search(r"experience tcp://10\.78\.0\.1:\d+", output)
    targets = json.loads((tmp_path / "runs" / "run" / "targets.json").read_text())
    assert {target["targets"][0].partition(":")[0] for target in targets} == set(hosts.addresses)


def test_a_cut_that_heals_is_only_a_pause(hosts: Hosts, tmp_path: Path, alone: dict[str, Any]) -> None:
    process = train_on(hosts, tmp_path)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    hosts.cut(2)
    time.sleep(2)  # a chunk that was under way may still come
    before = iterations(tmp_path, "run")
    time.sleep(4)
    assert iterations(tmp_path, "run") <= before + 1
    hosts.heal(2)
    output = finish(process, tmp_path, alone)
    assert "lost" not in output


@pytest.mark.parametrize("how", ["supervisor killed", "power gone"])
def test_the_processes_of_a_lost_node_go_on_at_the_first(
    hosts: Hosts, tmp_path: Path, alone: dict[str, Any], how: str
) -> None:
    process = train_on(hosts, tmp_path)
    wait_for(lambda: iterations(tmp_path, "run") >= 8, process)
    if how == "power gone":
        hosts.power_off(3)
    else:
        on_host(hosts, 3, "bm3il.launch.nodes.node").send_signal(signal.SIGKILL)
    output = finish(process, tmp_path, alone)
    assert "node 3 is lost; its processes go on here" in output
    assert not hosts.processes(3)


def test_a_run_whose_first_node_lost_its_power_is_resumed(hosts: Hosts, tmp_path: Path, alone: dict[str, Any]) -> None:
    process = train_on(hosts, tmp_path)
    wait_for(lambda: iterations(tmp_path, "run") >= 12, process)
    hosts.power_off(0)
    process.communicate(timeout=20)
    hosts.heal(0)
    deadline = time.monotonic() + 30
    while any(hosts.processes(host) for host in range(HOSTS)):
        assert time.monotonic() < deadline, "orphans on the other hosts"
        time.sleep(0.2)
    finish(start_on(hosts, tmp_path, "resume", "runs/run"), tmp_path, alone)
