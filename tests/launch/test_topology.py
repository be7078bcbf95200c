from __future__ import annotations

import json
import shutil
import socket
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from launch.backends import rank_command
from launch.config import load_preset
from launch.rendezvous import PORTS, _free_ports, _plan, common_addresses
from launch.topology import Node, Plan, Process, ipc_addresses, place, processes_of, tcp_addresses
from protocol.errors import InputError
from protocol.registry import make_environment


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


def test_a_long_temporary_folder_is_refused() -> None:
    ipc_addresses(Path("/tmp/bm3il-x"), [])
    with pytest.raises(InputError, match="set TMPDIR"):
        ipc_addresses(Path("/tmp", "x" * 100), [])


def test_ports_are_free_and_not_for_outgoing_connections() -> None:
    with ExitStack() as held:
        ports = _free_ports("127.0.0.1", 4, held)
        assert len(set(ports)) == 4
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports[0]))
    assert set(ports) <= set(PORTS)


def test_a_world_of_the_wrong_size_is_refused() -> None:
    config = replace(load_preset("rover_tower_8"), nodes=2)
    order = {"config_yaml": config.to_yaml(), "spec_json": "", "run_folder": "r", "run_id": "i", "processes": []}
    facts = [{"host": host, "address": "127.0.0.1", "ports": [1, 2, 3, 4]} for host in ("a", "b")]
    with pytest.raises(InputError, match="a world of 1"):
        _plan(order, facts[:1], 1)
    assert [node.host for node in _plan(order, facts, 2).nodes] == ["a", "b"]


def test_nodes_are_reached_in_a_network_that_all_are_in() -> None:
    one = ("a", ["10.0.0.1/24", "192.168.1.1/24"])
    assert common_addresses([one, one]) == ["127.0.0.1", "127.0.0.1"]
    assert common_addresses([one, ("b", ["192.168.1.9/24"])]) == ["192.168.1.1", "192.168.1.9"]
    assert common_addresses([one, ("b", ["192.168.2.9/24"])]) is None


def test_a_backend_for_hosts_slurm_and_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/cluster/{name}")
    config = replace(load_preset("rover_tower_8"), nodes=2)
    assert rank_command(config, {})[1:3] == ["-n", "2"]
    slurm = rank_command(config, {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"})
    assert slurm[:2] == ["/cluster/srun", "--mpi=pmi2"]
    assert not any(option.startswith("--cpus-per-task") for option in slurm)
    asked = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    assert "--cpus-per-task=16" in rank_command(config, asked)
    (tmp_path / "hosts").write_text("# ours\nsub0\n")
    with pytest.raises(InputError, match="asked for 2 nodes, but there are 1 hosts"):
        rank_command(replace(config, hostfile=str(tmp_path / "hosts")), {})
    with pytest.raises(InputError, match="write one host a line"):
        rank_command(replace(config, hostfile=str(tmp_path / "none")), {})


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
    monkeypatch.setattr("protocol.telemetry.PORT_SECONDS", 0.3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = rf"metrics of supervisor-0 cannot listen on 127\.0\.0\.1:{port}: Address already in use.*--metrics-port"
        with pytest.raises(InputError, match=words):
            plan_of(port).telemetry("supervisor", 0, 0)
    with pytest.raises(InputError, match=r"metrics of supervisor-0 cannot listen on 203\.0\.113\.7"):
        plan_of(0, "203.0.113.7").telemetry("supervisor", 0, 0)
