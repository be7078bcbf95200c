"""Nodes try the addresses of the first; here they are threads of one machine, or plain tables."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack

import pytest

from bm3il.launch.nodes.reach import (
    ANOTHER,
    PORTS,
    answer,
    attempt,
    check_in,
    check_network,
    chosen,
    free_sockets,
    in_network,
    interface_towards,
    interfaces,
)
from bm3il.protocol.errors import InputError

TOKEN = b"t" * 16
FOUND = [("lo", "127.0.0.1/8"), ("eth0", "10.1.0.7/32"), ("docker0", "172.17.0.1/16")]
NAMES = ["node 0 (a)", "node 1 (b)", "node 2 (c)"]


def test_an_address_is_reached_where_the_token_is_heard() -> None:
    with ExitStack() as held:
        doors = answer([("lo", "127.0.0.1/8"), ("lo", "127.0.0.2/8")], TOKEN, held)
        assert {address for address, _ in doors} == {"127.0.0.1", "127.0.0.2"}
        assert {port in PORTS for _, port in doors} == {True}
        for _ in range(70):  # as often as many nodes do
            assert attempt(doors, TOKEN) == {"127.0.0.1": ("127.0.0.1", ""), "127.0.0.2": ("127.0.0.1", "")}
        assert attempt(doors[:1], b"u" * 16) == {"127.0.0.1": ("", ANOTHER)}
    assert attempt(doors[:1], TOKEN) == {"127.0.0.1": ("", "connection refused")}


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", TOKEN[:8]])
def test_a_stranger_is_not_taken_for_the_node(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def speak() -> None:
            with stranger.accept()[0] as caller:
                caller.sendall(said)

        thread = threading.Thread(target=speak)
        thread.start()
        assert attempt([stranger.getsockname()], TOKEN) == {"127.0.0.1": ("", ANOTHER)}
        thread.join()


def test_who_accepts_and_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bm3il.launch.nodes.reach.TRY_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert attempt([mute.getsockname()], TOKEN)["127.0.0.1"][1].startswith("no answer")


def test_the_first_address_that_all_have_reached_is_taken() -> None:
    b = {"127.0.0.1": ("", "connection refused"), "10.1.0.7": ("10.2.0.8", ""), "10.9.0.1": ("10.9.0.2", "")}
    c = {"127.0.0.1": ("", "connection refused"), "10.1.0.7": ("10.3.0.9", ""), "10.9.0.1": ("", "timed out")}
    assert chosen(NAMES, [b, c]) == ["10.1.0.7", "10.2.0.8", "10.3.0.9"]
    one = {"127.0.0.1": ("127.0.0.1", ""), "10.1.0.7": ("10.1.0.7", "")}
    assert chosen(NAMES, [one, one]) == ["127.0.0.1"] * 3


def test_who_cannot_reach_whom_is_named() -> None:
    b = {"172.17.0.1": ("", ANOTHER), "10.1.0.7": ("10.2.0.8", "")}
    c = {"172.17.0.1": ("", ANOTHER), "10.1.0.7": ("", "connection refused")}
    with pytest.raises(InputError) as error:
        chosen(NAMES, [b, c])
    assert str(error.value).startswith(
        "node 2 (c) cannot reach node 0 (a): 172.17.0.1 (another machine answers), 10.1.0.7 (connection refused); "
    )
    assert "--network" in str(error.value)
    assert "node 1" not in str(error.value)
    with pytest.raises(InputError, match="is --network eth1 right"):
        chosen(NAMES, [b, c], "eth1")
    d = {"172.17.0.1": ("172.17.0.2", ""), "10.1.0.7": ("", "connection refused")}
    with pytest.raises(InputError, match=r"172.17.0.1 not by node 1 \(b\), 10.1.0.7 not by node 2 \(c\)"):
        chosen(NAMES, [b, d])
    with pytest.raises(InputError, match="it has no address"):
        chosen(NAMES, [{}, {}])


def test_an_error_of_many_nodes_is_still_a_line() -> None:
    names = [f"node {i} (host{i})" for i in range(64)]
    with pytest.raises(InputError) as error:
        chosen(names, [{"10.1.0.7": ("", "no route to host")}] * 63)
    assert "and 60 more" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("", ["lo", "eth0", "docker0"]),
        ("eth0", ["eth0"]),
        ("10.1.0.0/24", ["eth0"]),
        ("10.1.0.9/24", ["eth0"]),
        ("10.1.0.7", ["eth0"]),
        ("0.0.0.0/0", ["lo", "eth0", "docker0"]),
        ("eth1", []),
        ("10.2.0.0/16", []),
        ("fd00::/8", []),
    ],
)
def test_a_network_or_an_interface_is_named(network: str, names: list[str]) -> None:
    assert [name for name, _ in in_network(FOUND, network)] == names


def test_a_network_that_a_node_is_not_in_is_refused_with_what_it_has() -> None:
    check_in("eth0", "node 1 (b)", FOUND)
    check_in("", "node 1 (b)", [])
    with pytest.raises(InputError) as error:
        check_in("eth0", "node 1 (b)", FOUND[:1])
    assert str(error.value) == "--network eth0 fits no address of node 1 (b); it has lo 127.0.0.1/8"


@pytest.mark.parametrize("network", ["10.1.0/24", "10.1.0.0/33", "eth/0"])
def test_what_can_be_no_network_is_refused_at_once(network: str) -> None:
    with pytest.raises(InputError, match=r"as 10\.1\.0\.0/24"):
        check_network(network)


def test_the_interfaces_of_this_machine_begin_with_the_loopback() -> None:
    assert interfaces()[0][1].startswith("127.")


def test_the_way_to_the_other_hosts_is_not_that_to_oneself() -> None:
    assert interface_towards(["localhost", "127.0.1.1"], FOUND) == ""


def test_ports_are_free_and_not_for_outgoing_connections() -> None:
    with ExitStack() as held:
        ports = [each.getsockname()[1] for each in free_sockets("127.0.0.1", 4, held)]
        assert len(set(ports)) == 4
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", ports[0]))
    assert set(ports) <= set(PORTS)


def test_an_address_that_went_away_costs_no_descriptors() -> None:
    with ExitStack() as held:
        assert free_sockets("203.0.113.77", 1, held) == []
