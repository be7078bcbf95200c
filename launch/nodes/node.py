"""One rank of `launch.nodes.rendezvous`: the supervisor of one node."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from pathlib import Path

from bm3il.launch.nodes import backends, rendezvous
from bm3il.launch.nodes.join import ticket
from bm3il.launch.processes.director import direct, follow
from bm3il.launch.processes.lifeline import bind_to_parent
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.progress import Progress
from bm3il.launch.result import Start, conclude
from bm3il.launch.surroundings import lasting_output, private_folder, settle
from bm3il.launch.topology import Plan
from bm3il.protocol.errors import InputError


def main() -> int:
    """Meet the other nodes and run this one's part; the first node leads and writes down how the run ended."""
    settle()
    bind_to_parent(os.getppid())
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="")
    parser.add_argument("hosts", nargs="*")
    given = parser.parse_args()
    rendezvous.report("started", rendezvous.number_of(rendezvous.RANK))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    stopped = StopRequests()
    with stopped.heard(), lasting_output():
        try:
            with private_folder() as private:
                plan, node = rendezvous.meet(private, given.network, given.hosts)
                return _run(plan, node, stopped)
        except InputError as error:
            rendezvous.report("failed", str(error))
            return 2


def _run(plan: Plan, node: int, stopped: StopRequests) -> int:
    if node > 0:
        if follow(plan, node, stopped, lambda line: print(line, flush=True)).lost:
            backends.start_again()
        return 0
    threading.Thread(target=rendezvous.listen_for_stop, args=(stopped,), daemon=True).start()
    progress, start = Progress(), Start(plan.run_id, time.time())
    progress.plan(plan)
    with ticket(plan):
        outcome = direct(plan, progress, stopped)
    conclude(Path(plan.run_folder), plan.config, outcome, start)
    rendezvous.report("ended", outcome.code, outcome.text)  # a full disk may not have taken it
    return 0


if __name__ == "__main__":
    sys.exit(main())
