"""`bm3il join`: more actors for an async run that is under way, from this machine or another."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import dacite

from bm3il.launch.outcome import DEADLINE, FINISHED, Outcome
from bm3il.launch.processes.director import Followed, follow
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.surroundings import lasting_output, private_folder
from bm3il.launch.topology import LOOPBACK, Node, Plan, Process
from bm3il.protocol.errors import InputError
from bm3il.protocol.keys import Keys

TICKET = "join.json"
JOINED_INDICES = range(1_000, 60_000)
"""Numbers of actors that join; far from those of the plan, and drawn so that two who join at once differ."""


@contextmanager
def ticket(plan: Plan) -> Iterator[None]:
    """While an async run is under way: the file with which actors join, readable by its owner only. It holds the plan,
    and the keys of a client. Raises InputError if it cannot be written."""
    if plan.config.mode != "async":
        yield
        return
    path = Path(plan.run_folder, TICKET)
    keys = Keys.load(Path(plan.keys_file)).of_client().to_text() if plan.keys_file else ""
    try:
        # Not `write_atomically`: the file holds keys, and must be its owner's alone from the moment it exists.
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({"plan": json.loads(plan.to_json()), "keys": keys}, file)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_ticket(path: Path) -> tuple[Plan, Keys | None]:
    """What the file that `ticket` wrote holds. Raises InputError for another one, and for a run that is not async."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(f"{path} can be read by others: chmod 600 {path}")
        value = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan.from_json(json.dumps(value["plan"]))
        keys = Keys.from_text(value["keys"]) if value["keys"] else None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; it is there while an async run is under way"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, dacite.DaciteError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not the {TICKET} of a run") from error
    if plan.config.mode != "async":
        raise InputError("only an async run takes more actors: in lockstep their number is part of the result")
    return plan, keys


def join(path: Path, actors: int) -> int:
    """Run actors for the run until it ends, it is not heard for long, or Ctrl-C. Returns the exit code.

    Raises InputError for a ticket that cannot be used.
    """
    if actors < 1:
        raise InputError(f"--actors must be at least 1, got {actors}")
    plan, keys = read_ticket(path)
    # The same number for all who join: the director knows them by their actors, and ignores their supervisors.
    node = len(plan.nodes)
    address = _address_towards(plan.control)
    indices = random.SystemRandom().sample(JOINED_INDICES, actors)
    with lasting_output(), private_folder() as private:
        if keys is not None:
            keys.save(Path(private, "keys.json"))
        plan = replace(
            plan,
            nodes=(*plan.nodes, Node(socket.gethostname(), address)),
            config_yaml=replace(plan.config, metrics_port=0).to_yaml(),  # others on this machine may have those ports
            processes=(*plan.processes, *(Process("actor", index, node) for index in indices)),
            keys_file=str(Path(private, "keys.json")) if keys is not None else "",
        )
        stopped = StopRequests()
        print(f"joining the run of {plan.control} with {', '.join(f'actor-{index}' for index in indices)}", flush=True)
        with stopped.heard():
            end = follow(plan, node, stopped, lambda line: print(line, flush=True), joined=True)
    if outcome := _outcome(end, plan, path):
        print(f"bm3il: {outcome.text}", file=sys.stderr)
        return outcome.code
    print("left")
    return FINISHED


def _outcome(end: Followed, plan: Plan, path: Path) -> Outcome | None:
    """What went wrong, if something has. Actors give up a run that is not heard about when their supervisor does."""
    if end.outcome and end.outcome.code != DEADLINE:
        return end.outcome
    if not end.lost and not end.outcome:
        return None
    seconds = f"{plan.config.learner.deadline_seconds:.0f} s"
    if end.heard:
        return end.outcome or Outcome(DEADLINE, f"the run of {plan.control} was not heard for {seconds}")
    return Outcome(
        DEADLINE,
        f"nobody answered at {plan.control} within {seconds}: {path} may be of an earlier start of the run, or this "
        "machine cannot reach it",
    )


def _address_towards(endpoint: str) -> str:
    """The address of this machine from which it reaches an endpoint."""
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or not parts.hostname:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((parts.hostname, parts.port or 1))
        return str(probe.getsockname()[0])
