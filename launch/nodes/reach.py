"""By which address the other nodes reach the first, with whom all of them talk: they try all that it has.

An address says little by itself: every machine may have the same 172.17.0.1, two clones have one name, and routed
networks have nothing in common. So the first node answers on each of its addresses with a token that nobody else knows.
"""

from __future__ import annotations

import ipaddress
import random
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import psutil

from bm3il.protocol.errors import InputError

PORTS = range(20_000, 32_000)
"""Below 32,768, where Linux begins to give ports to outgoing connections."""
TRY_SECONDS = 3.0
"""The kernel asks a second time after one second."""
NAMED = 3
"""How many nodes, or addresses, an error names one by one."""
ANOTHER = "another machine answers"

Interfaces = Sequence[tuple[str, str]]
"""Names with addresses and their networks: (`eth0`, `10.0.0.7/24`)."""
Tried = Mapping[str, tuple[str, str]]
"""Address → (own address by which it was reached, or empty; else what happened)."""


def interfaces() -> list[tuple[str, str]]:
    """The IPv4 addresses of this machine, the loopback's first."""
    found = []
    for name, parts in psutil.net_if_addrs().items():
        up = name in (states := psutil.net_if_stats()) and states[name].isup
        for part in parts:
            if up and part.family == socket.AF_INET and part.netmask:
                found.append((name, str(ipaddress.ip_interface(f"{part.address}/{part.netmask}"))))
    return sorted(found, key=lambda each: not _of(each).is_loopback)


def check_network(network: str) -> None:
    """Raise InputError for what is neither a network nor can be the name of an interface."""
    if "/" in network:
        with suppress(ValueError):
            ipaddress.ip_network(network, strict=False)
            return
        raise InputError(f"--network must be a network, as 10.1.0.0/24, or an interface, as eth1; got '{network}'")


def in_network(found: Interfaces, network: str) -> list[tuple[str, str]]:
    """Those that a network, or an interface, has; all if it is empty."""
    try:
        wanted = ipaddress.ip_network(network, strict=False)
    except ValueError:
        return [(name, address) for name, address in found if network in ("", name)]
    return [each for each in found if _of(each).ip in wanted]


def check_in(network: str, node: str, found: Interfaces) -> None:
    """Raise InputError if a node, with its name for people, has no address in the network that was named."""
    if network and not in_network(found, network):
        raise InputError(f"--network {network} fits no address of {node}; it has {_listed(found)}")


def interface_towards(hosts: Sequence[str], found: Interfaces) -> str:
    """That by which this machine reaches the first of the hosts that is another; empty if their names do not tell."""
    own = {str(_of(each).ip): each[0] for each in found}
    for host in hosts:
        # connecting a datagram socket sends nothing
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            there, here = probe.getpeername()[0], probe.getsockname()[0]
            if there not in own and not there.startswith("127."):
                return own.get(here, "")
    return ""


def free_sockets(address: str, count: int, held: ExitStack) -> list[socket.socket]:
    """Bound to so many free ports, as far as there are, until `held` is closed.

    The ports lie below the range that the kernel gives to outgoing connections: those would take them again before, or
    while, the process that they are meant for restarts.
    """
    found: list[socket.socket] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        taken = socket.socket()
        try:
            taken.bind((address, port))
        except OSError:
            taken.close()
        else:
            found.append(held.enter_context(taken))
    return found


def answer(found: Interfaces, token: bytes, held: ExitStack) -> list[tuple[str, int]]:
    """Tell everybody who connects the token, until `held` is closed; returns addresses and ports."""
    doors = [door for each in found for door in free_sockets(str(_of(each).ip), 1, held)]
    asked, ended = selectors.DefaultSelector(), threading.Event()
    for door in doors:
        # All other nodes connect at the same moment; a full queue would cost them a second of the three.
        door.listen(1024)
        door.setblocking(False)
        asked.register(door, selectors.EVENT_READ)

    def serve() -> None:
        while not ended.is_set():
            for key, _ in asked.select(0.1):
                with suppress(OSError), key.fileobj.accept()[0] as caller:  # type: ignore[union-attr]
                    caller.send(token)

    thread = threading.Thread(target=serve, name="reach", daemon=True)
    thread.start()
    held.callback(asked.close)
    held.callback(thread.join)
    held.callback(ended.set)  # the first of the three
    return [door.getsockname() for door in doors]


def attempt(doors: Sequence[Sequence[Any]], token: bytes) -> Tried:
    """Connect to all addresses with their ports at once; takes `TRY_SECONDS` at most."""
    if not doors:
        return {}
    with ThreadPoolExecutor(len(doors)) as pool:
        return dict(pool.map(lambda door: (door[0], _try(door, token)), doors))


def chosen(names: Sequence[str], tried: Sequence[Tried], network: str = "") -> list[str]:
    """The address of each node: for the first, one by which all others reached it, for them their own at that end.

    names: of all nodes, for people.   tried: of all nodes but the first, in their order.
    Raises InputError that says who cannot reach it, and what happened.
    """
    addresses = list(tried[0])
    # The loopback comes first (`interfaces`), so that nodes on one machine use it.
    for address in addresses:
        if all(of_node[address][0] for of_node in tried):
            return [address, *(of_node[address][0] for of_node in tried)]
    others = list(zip(names[1:], tried, strict=True))
    if deaf := [(name, of_node) for name, of_node in others if not any(own for own, _ in of_node.values())]:
        text = _and([f"{name} cannot reach {names[0]}: {_happened(of_node)}" for name, of_node in deaf])
    else:
        lacking = {address: next(name for name, of_node in others if not of_node[address][0]) for address in addresses}
        lacks = [f"{address} not by {name}" for address, name in lacking.items()]
        text = f"no address of {names[0]} is reached by all nodes: {_and(lacks)}"
    advice = f"is --network {network} right" if network else "name the network that all are in with --network"
    ports = f"ports {PORTS.start}-{PORTS.stop - 1} of the first node must be open to the others"
    raise InputError(f"{text}; {advice}; {ports}")


def _try(door: Sequence[Any], token: bytes) -> tuple[str, str]:
    deadline = time.monotonic() + TRY_SECONDS
    try:
        with socket.create_connection((door[0], door[1]), timeout=TRY_SECONDS) as peer:
            said = b""
            while len(said) < len(token):
                peer.settimeout(max(0.01, deadline - time.monotonic()))
                part = peer.recv(len(token) - len(said))
                if not part:
                    break
                said += part
            return (peer.getsockname()[0], "") if said == token else ("", ANOTHER)
    except TimeoutError:
        return "", f"no answer within {TRY_SECONDS:.0f} s"
    except OSError as error:
        return "", (error.strerror or str(error)).lower()


def _happened(tried: Tried) -> str:
    return _and([f"{address} ({what})" for address, (_, what) in tried.items()]) or "it has no address"


def _of(each: tuple[str, str]) -> ipaddress.IPv4Interface:
    return ipaddress.IPv4Interface(each[1])


def _listed(found: Interfaces) -> str:
    return ", ".join(f"{name} {address}" for name, address in found) or "none"


def _and(parts: Sequence[str]) -> str:
    more = f", and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more
