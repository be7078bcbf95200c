"""One process of a run: `launch.processes.worker ROLE INDEX`, with the plan on its standard input.

The exit codes are those of `launch.outcome`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from dataclasses import replace

from bm3il.launch.outcome import INPUT_ERROR, attempt
from bm3il.launch.surroundings import settle
from bm3il.launch.topology import Plan
from bm3il.protocol.errors import InputError
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.version import version

log = logging.getLogger(__name__)


def main(role: str, index: int) -> int:
    """Run one process until it is done or told to stop; returns its exit code."""
    settle()
    # A crash in C code then leaves a stack in the log, which the supervisor shows as the last traceback.
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    plan = Plan.from_json(sys.stdin.read())
    process = next(p for p in plan.processes if (p.role, p.index) == (role, index))
    try:
        telemetry = plan.telemetry(role, index, process.node)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        return INPUT_ERROR
    signal.signal(signal.SIGTERM, lambda *_: telemetry.stop.set())
    telemetry.start_heartbeat(plan.control)
    log.info("bm3il %s, %s-%d, process %d", version(), role, index, os.getpid())
    try:
        outcome = attempt(lambda: run_role(role, index, plan, telemetry))
    finally:
        telemetry.close()
    if not outcome.text:
        log.info("ends")
    with contextlib.suppress(OSError):  # on a full disk the log takes no more; the exit code still tells
        os.write(sys.stderr.fileno(), f"{outcome.text}\n".encode() if outcome.text else b"")
    return outcome.code


def run_role(role: str, index: int, plan: Plan, telemetry: Telemetry) -> str | None:
    """Do what the role does; the imports are here so that no process loads what only others need.

    Returns the status of the learner.
    """
    from bm3il.launch.files import check_files, check_scenario

    job, config = plan.job(index), plan.config
    if role == "actor":  # its node need not have the demonstrations
        check_scenario(config)
    else:
        check_files(config)
    match role:
        case "actor":
            from bm3il.actors.process import run_actor

            run_actor(job, config.actor, index, telemetry)
        case "evaluator":
            from bm3il.actors.process import run_evaluator

            run_evaluator(job, config.actor, config.evaluation, telemetry)
        case "reward-server":
            from bm3il.reward_server.process import run_reward_server

            # Who asks waits as long for the update before as for the answer.
            patience = max(config.reward.deadline_seconds, 2 * config.learner.deadline_seconds)
            run_reward_server(job, replace(config.reward, deadline_seconds=patience), telemetry)
        case "learner":
            from bm3il.learner.process import run_learner

            return run_learner(job, config.settings, plan.config_yaml, telemetry)
        case _:
            raise ValueError(f"no such role: {role}")
    return None


if __name__ == "__main__":
    # Not sys.exit: it turns the code into 120 if the log cannot be flushed.
    os._exit(main(sys.argv[1], int(sys.argv[2])))
