from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bm3il.launch.config import Config, load_preset, parse_config
from bm3il.launch.nodes.backends import MPI_SETTINGS, backend
from bm3il.launch.nodes.rendezvous import _check_size, _plan
from bm3il.launch.run import check
from bm3il.launch.topology import Node, Plan, Process, ipc_addresses, place, processes_of, tcp_addresses
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment


def test_actors_go_where_cores_are_left() -> None:
    processes = processes_of(replace(load_preset("rover_tower_8"), actors=8))
    placed = place(processes, (Node("first", cores=4), Node("small", cores=2), Node("large", cores=5)))
    assert Counter(p.node for p in placed if p.role == "actor") == {0: 1, 1: 2, 2: 5}
    assert {p.role for p in placed if p.node == 0} == {"learner", "evaluator", "reward-server", "actor"}
    assert {(p.role, p.index) for p in placed} == {(p.role, p.index) for p in processes}


def test_actors_go_round_equal_nodes() -> None:
    processes = processes_of(replace(load_preset("rover_tower_8"), actors=6))
    placed = place(processes, [Node(host, cores=64) for host in "abc"])
    assert Counter(p.node for p in placed) == {0: 3, 1: 3, 2: 3}


def test_a_gpu_that_the_learner_does_not_get_is_told() -> None:
    config = replace(load_preset("rover_tower_8"), nodes=2)
    first, second = Node("a"), Node("b", gpus=1)
    plans = [Plan("id", "", config.to_yaml(), "", nodes, (), {}) for nodes in ((first, second), (second, first))]
    assert "no GPU" in plans[0].lines()[-1]
    assert not any("no GPU;" in line for line in plans[1].lines())


def test_cloning_needs_neither_actors_nor_rewards() -> None:
    processes = processes_of(replace(load_preset("rover_tower_8"), algorithm="bc"))
    assert {p.role for p in processes} == {"learner", "evaluator"}


def test_sockets_are_where_their_processes_are() -> None:
    nodes = (Node("a", "10.0.0.1", (1, 2, 3, 4, 5)), Node("b", "10.0.0.2", (6, 7, 8, 9, 10)))
    processes = (Process("learner", 0, 0), Process("reward-server", 0, 1), Process("reward-server", 1, 1))
    addresses = tcp_addresses(nodes, processes)
    assert addresses == {
        "learner-0": {"experience": "tcp://10.0.0.1:1", "weights": "tcp://10.0.0.1:2"},
        "reward-server-0": {"rewards": "tcp://10.0.0.2:6"},
        "reward-server-1": {"rewards": "tcp://10.0.0.2:7"},
        "supervisor-0": {"control": "tcp://10.0.0.1:3"},
    }


def test_a_process_uses_its_own_sockets_and_those_whose_turn_it_is(tmp_path: Path) -> None:
    processes = (*(Process("learner", n, 0) for n in range(2)), *(Process("reward-server", n, 0) for n in range(3)))
    plan = Plan("id", "", "", "", (Node("a"),), processes, ipc_addresses(tmp_path, processes))
    used = [plan.endpoints(index) for index in range(4)]
    assert [e.weights.rpartition("/")[2] for e in used] == ["weights-0", "weights-1", "weights-0", "weights-1"]
    assert [e.rewards.rpartition("/")[2] for e in used] == ["rewards-0", "rewards-1", "rewards-2", "rewards-0"]
    assert len({e.control for e in used}) == 1
    alone = Plan("id", "", "", "", (Node("a"),), processes[:1], ipc_addresses(tmp_path, processes[:1]))
    assert alone.endpoints(0).rewards == ""


def test_a_plan_round_trips_and_can_be_read(tmp_path: Path) -> None:
    config = replace(load_preset("rover_tower_8"), nodes=2, actors=2)
    nodes = (Node("a", ports=(1, 2, 3, 4)), Node("b", ports=(5, 6, 7, 8)))
    processes = place(processes_of(config), nodes)
    spec = make_environment(config.environment, 1).spec
    description = json.dumps(spec.to_json())
    addresses = tcp_addresses(nodes, processes)
    plan = Plan("id", str(tmp_path), config.to_yaml(), description, nodes, processes, addresses)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.config == config
    assert plan.job(0).spec == spec
    assert "node 1 (b): supervisor-1 actor-0 actor-1" in plan.lines()


def test_more_threads_than_cores_are_told() -> None:
    config = replace(load_preset("rover_tower_8"), actors=2)
    processes = processes_of(config)

    def warned(changed: Config, cores: int) -> list[str]:
        plan = Plan("id", "", changed.to_yaml(), "", (Node("a", cores=cores),), processes, {})
        return [line for line in plan.lines() if "threads" in line]

    assert warned(config, 1) == []  # the default, on a laptop
    assert warned(replace(config, threads=2), 10) == []
    assert "compute in 10 threads on 9 cores" in warned(replace(config, threads=2), 9)[0]
    own = replace(config, learner=replace(config.learner, threads=8))
    assert warned(own, 12) == []
    assert "12 threads on 11 cores" in warned(own, 11)[0]


def test_a_long_temporary_folder_is_refused() -> None:
    ipc_addresses(Path("/tmp/bm3il-x"), [])
    with pytest.raises(InputError, match="set TMPDIR"):
        ipc_addresses(Path("/tmp", "x" * 100), [])


def test_a_world_of_the_wrong_size_is_refused() -> None:
    order = {"config_yaml": replace(load_preset("rover_tower_8"), nodes=2).to_yaml()}
    with pytest.raises(InputError, match="a world of 1"):
        _check_size(order, 1)
    _check_size(order, 2)


def test_a_first_node_without_free_ports_is_refused() -> None:
    config = replace(load_preset("rover_tower_8"), nodes=2)
    processes = [asdict(process) for process in processes_of(config)]
    order = {"config_yaml": config.to_yaml(), "spec_json": "", "run_folder": "r", "run_id": "i", "processes": processes}
    facts = [{"host": host, "address": "10.1.0.7", "ports": [1, 2, 3, 4]} for host in ("a", "b")]
    assert [node.host for node in _plan(order, facts).nodes] == ["a", "b"]
    with pytest.raises(InputError, match=r"expected 4 free ports in 20000\.\.31999 on 10\.1\.0\.7, found 1"):
        _plan(order, [facts[0] | {"ports": [1]}, facts[1]])


def hosts_of(config: Config, folder: Path, text: str) -> list[str]:
    (folder / "hosts").write_text(text)
    command = backend(replace(config, hostfile=str(folder / "hosts")), {}).program
    return command[command.index("-hosts") + 1].split(",")


def test_a_backend_for_hosts_slurm_and_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/cluster/{name}")
    config = replace(load_preset("rover_tower_8"), nodes=2)
    assert backend(config, {}).command("")[1:3] == ["-n", "2"]
    slurm = backend(config, {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"})
    assert slurm.queues
    assert slurm.program[:2] == ("/cluster/srun", "--mpi=pmi2")
    assert not any(option.startswith("--cpus-per-task") for option in slurm.program)
    asked = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    assert "--cpus-per-task=16" in backend(config, asked).program
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="if the allocation is over, unset SLURM_JOB_ID"):
        backend(config, asked)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("# ours\n\nsub0\n  sub1  # the new one\nsub2\n", ["sub0:1", "sub1:1"]),
        ("sub0 slots=16\nsub1 slots=16\n", ["sub0:1", "sub1:1"]),
        ("sub0:16\nsub1:16\n", ["sub0:1", "sub1:1"]),
        ("sub0 slots = 2\n", ["sub0:2"]),
        ("sub0\nsub0\n", ["sub0:2"]),
    ],
)
def test_a_host_file_is_of_mpich_or_of_open_mpi(tmp_path: Path, text: str, hosts: list[str]) -> None:
    assert hosts_of(replace(load_preset("rover_tower_8"), nodes=2), tmp_path, text) == hosts


def test_hosts_with_more_slots_take_what_is_left(tmp_path: Path) -> None:
    config = replace(load_preset("rover_tower_8"), nodes=5)
    assert hosts_of(config, tmp_path, "sub0\nsub1 slots=2\nsub2:9\n") == ["sub0:1", "sub1:2", "sub2:2"]


@pytest.mark.parametrize("line", ["sub0 slots=0", "sub0:x", "sub0 max_slots=4", "sub0 sub1", "-oProxyCommand=x", ":2"])
def test_a_line_that_names_no_host_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="hosts, line 2: expected 'host', 'host:2' or 'host slots=2', got") as error:
        hosts_of(load_preset("rover_tower_8"), tmp_path, f"sub0\n{line}\n")
    assert "\n" not in str(error.value)


def test_too_few_hosts_are_refused(tmp_path: Path) -> None:
    config = replace(load_preset("rover_tower_8"), nodes=2)
    with pytest.raises(InputError, match="asked for 2 nodes, but there are 1 hosts"):
        hosts_of(config, tmp_path, "# ours\nsub0\n")
    with pytest.raises(InputError, match="write one host a line"):
        backend(replace(config, hostfile=str(tmp_path / "none")), {})


@pytest.mark.parametrize(
    ("hosts", "nodes", "expected"),
    [
        ("none", "1", "cannot read the hosts in none: No such file or directory; write one host a line"),
        ("none", "2", "cannot read the hosts in none: No such file or directory; write one host a line"),
        ("hosts", "3", "asked for 3 nodes, but there are 2 hosts in hosts"),
        ("hosts", "1", "and --nodes is 1: say how many of hosts take part with --nodes, or leave out --hostfile"),
    ],
)
def test_a_host_file_is_read_before_anything_starts(
    hosts: str, nodes: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("sub0\nsub1\n")
    with pytest.raises(InputError, match=expected):
        check(parse_config(["--hostfile", hosts, "--nodes", nodes]))


def test_what_another_mpi_has_left_in_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/cluster/{name}")
    config = replace(load_preset("rover_tower_8"), nodes=2)
    left = {"PMI_FD": "7", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3", "FI_PROVIDER": "psm9"}
    job = {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "gone[1-4]"}
    kept = {"HOME": "/root", "HYDRA_LAUNCHER": "ssh", "SLURM_CONF": "slurm.conf"}
    assert backend(config, left | job | kept).environment == kept | MPI_SETTINGS
    job |= {"SLURM_JOB_NUM_NODES": "2"}
    assert backend(config, left | job | kept).environment == kept | job | MPI_SETTINGS


def plan_of(metrics_port: int, metrics_address: str = "") -> Plan:
    config = replace(load_preset("rover_tower_8"), metrics_port=metrics_port, metrics_address=metrics_address, actors=2)
    nodes = (Node("a", "127.0.0.1"), Node("localhost", "127.0.0.1"))
    return Plan("run", "", config.to_yaml(), "", nodes, place(processes_of(config), nodes), {})


def test_metrics_have_ports_of_their_own_also_of_nodes_on_one_machine() -> None:
    plan = plan_of(9400)
    assert {name: plan.metrics_port(name) for name in ("supervisor-0", "supervisor-1", "learner-0", "evaluator-0")} == {
        "supervisor-0": 9400,
        "supervisor-1": 9401,
        "learner-0": 9402,
        "evaluator-0": 9403,
    }
    assert len({plan.metrics_port(name) for name in (p.name for p in plan.processes)}) == len(plan.processes)
    assert plan_of(0).metrics_port("learner-0") == 0


def test_metrics_listen_where_they_are_asked_to() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    telemetry = plan_of(port, "0.0.0.0").telemetry("supervisor", 0, 0)
    try:
        assert telemetry.metrics_address == f"a:{port}"  # what others reach it by
        for address in ("127.0.0.1", "127.0.0.2"):
            with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=5) as answer:
                assert answer.status == 200
    finally:
        telemetry.close()


def test_a_port_in_use_is_told_with_the_name_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bm3il.protocol.telemetry.PORT_SECONDS", 0.3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = rf"metrics of supervisor-0 cannot listen on 127\.0\.0\.1:{port}: Address already in use.*--metrics-port"
        with pytest.raises(InputError, match=words):
            plan_of(port).telemetry("supervisor", 0, 0)
    with pytest.raises(InputError, match=r"metrics of supervisor-0 cannot listen on 203\.0\.113\.7"):
        plan_of(0, "203.0.113.7").telemetry("supervisor", 0, 0)


def test_nodes_and_whoever_looks_at_runs_do_without_torch() -> None:
    looked = "import sys, bm3il.launch.nodes.node, bm3il.launch.status, bm3il.launch.cli; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", looked], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False"]
