"""A run from its configuration to its result: on this node, on several, or in this one process."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bm3il.launch import run_folder
from bm3il.launch.config import Config
from bm3il.launch.events import EventLog
from bm3il.launch.files import check_files, load_demonstrations, remembered
from bm3il.launch.locks import locked
from bm3il.launch.memory import Needs, available_memory, needs
from bm3il.launch.nodes import ranks
from bm3il.launch.nodes.backends import check_hosts
from bm3il.launch.nodes.join import ticket
from bm3il.launch.outcome import CRASHED, FINISHED, INTERRUPTED, Outcome, attempt
from bm3il.launch.processes.director import direct
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.progress import Progress
from bm3il.launch.result import Start, conclude, read_result
from bm3il.launch.surroundings import lasting_output, private_folder
from bm3il.launch.topology import LOOPBACK, Node, Plan, ipc_addresses, listeners, make_job, processes_of
from bm3il.learner.algorithms import algorithm
from bm3il.learner.checkpoint import CheckpointFolder, configuration_differences
from bm3il.protocol.demonstrations import Demonstrations, resolve, shipped_demonstrations
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints
from bm3il.protocol.likeness import unlike
from bm3il.protocol.messages import Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.sees import check_imagined, columns_seen

log = logging.getLogger(__name__)

SERIAL_SHOW_SECONDS = 0.5
CLONE_WEIGHT = 0.3
"""Of imitation that starts from the clone, in the world that was demonstrated: docs/tuning.md has figures."""
HINT_SECONDS = 5.0
"""For which a run waits, at most, to learn whether its recordings look like its environment."""


def train(config: Config) -> int:
    """Start a new run; returns the exit code. Raises InputError before anything is started; nothing is left then."""
    config, spec = check(remembered(config), print)
    _check_devices(config)
    config, needed = run_folder.named(config), needs(config, spec)
    _check_room(config, needed)
    needed.check_disk(Path(config.runs_folder))
    folder = run_folder.create(config)
    try:
        return _run(config, spec, folder, needed)
    except (InputError, KeyboardInterrupt):  # Ctrl-C before the run listens to it
        run_folder.discard(folder)
        raise


def resume(folder: Path, flags: Config | None = None, steps: int | None = None) -> int:
    """Go on with a run from its newest checkpoint; returns the exit code. Of one that is complete it says how it ended.

    flags: what the command line asks for; refused with the differences if it is not what the run was started with.
    steps: another budget, for instance of a run that is finished; schedules go on as those of a run of so many steps.
    Raises InputError before anything is started; the run is as it was then.
    """
    started = run_folder.open_existing(folder)
    folder = folder.resolve()
    check_files(started)
    if flags is not None and started not in (flags, remembered(flags)):
        how = f"; `bm3il resume {folder} --steps {flags.steps}` gives it another budget"
        only_steps = replace(flags, steps=started.steps) == started
        raise InputError(
            f"{folder} was started with another configuration: {differences(started, flags)}{how if only_steps else ''}"
        )
    asked = started if steps is None else replace(started, steps=steps)
    config, spec = check(asked)
    checkpoint = CheckpointFolder(folder / "checkpoints", 1).newest_header()
    if checkpoint is not None:
        # It holds what was forced when the run began, which may be less than what is written down today.
        config = asked
        if changed := configuration_differences(str(checkpoint["config"]), config.to_yaml()):
            raise InputError(f"the configuration of {folder} was changed since its newest checkpoint: {changed}")
    if steps is not None:
        _check_budget(folder, config, 0 if checkpoint is None else int(checkpoint["facts"]["env_steps"]))
    if _is_complete(folder, config):
        return _say_how_it_ended(folder, config)
    _check_devices(config)
    needed = needs(config, spec)
    _check_room(config, needed)
    return _run(config, spec, folder, needed, started)


def _is_complete(folder: Path, config: Config) -> bool:
    """Whether nothing is left to do: neither steps of a larger budget, nor the evaluation of the final policy."""
    result = read_result(folder)
    finished = result.get("status") == "finished" and result.get("steps") == config.steps
    return finished and result.get("return_mean") is not None


def _say_how_it_ended(folder: Path, config: Config) -> int:
    progress = Progress()
    progress.summary(folder, read_result(folder))
    longer = f"; `bm3il resume {shlex.quote(str(folder))} --steps N` prolongs it"
    progress.note(f"the run has finished{'' if algorithm(config.algorithm).clones else longer}")
    return FINISHED


def _check_budget(folder: Path, config: Config, played: int) -> None:
    """Raise InputError for a budget that leaves nothing to be played."""
    if algorithm(config.algorithm).clones:
        raise InputError(
            f"{folder} is of '{config.algorithm}', which plays no steps: begin a new run with more iterations"
        )
    if config.steps <= played:
        raise InputError(f"--steps must be above the {played} that {folder} has played, got {config.steps}")


def check(config: Config, hint: Callable[[str], None] = lambda _: None) -> tuple[Config, EnvironmentSpec]:
    """The configuration as it will run, and its environment's description.

    hint: is told in what the demonstrations do not look like the environment.

    Raises InputError for what cannot work, before anything starts.
    """
    config = config.checked()
    if config.mode == "serial" and config.nodes > 1:
        raise InputError("--mode serial runs in one process: leave out --nodes")
    check_hosts(config)
    check_files(config)
    environment = make_environment(config.environment, 1)
    spec = environment.spec
    if not all(kind.discrete for kind in spec.types):
        # From the state alone, one pass gives the values of all actions: continuous ones cannot be listed.
        config = replace(config, learner=replace(config.learner, query="state_action"))
    config = _near_the_clone(config, spec)
    if config.reward.source == "learned":
        columns_seen(spec, config.reward.sees)
        check_imagined(spec, config.reward.imagined)
    if config.demonstrations:
        resolve(config.demonstrations, spec.changes or config.environment, config.demonstration_episodes)
        recorded = load_demonstrations(config)
        recorded.check_against(spec)
        if config.tells_agents_apart and (difference := spec.difference(recorded.spec)):
            raise InputError(
                f"these demonstrations are of another number of agents, and each agent has parameters of its own: "
                f"{difference}; take --parameter-sharing type without --actor.agent-identity, or as many agents, as in "
                f"'{spec.changes}'"
            )
        if config.demonstrations not in shipped_demonstrations():
            _compare_starts(recorded, environment, hint)
    return config, spec


def _near_the_clone(config: Config, spec: EnvironmentSpec) -> Config:
    """With the weight that holds policies near the clone, if none was named."""
    learner = config.learner
    if learner.clipped.clone_weight is not None:
        return config
    # Not in a changed world, where the clone is what is wrong (docs/tuning.md).
    held = algorithm(config.algorithm).imitates and learner.start == "cloned" and not spec.changes
    clipped = replace(learner.clipped, clone_weight=CLONE_WEIGHT if held else 0.0)
    return replace(config, learner=replace(learner, clipped=clipped))


def _compare_starts(recorded: Demonstrations, environment: Environment, hint: Callable[[str], None]) -> None:
    """Tell what is seldom meant. If the environment raises, or hangs, that is for the actor who plays it to say."""

    def compare() -> None:
        try:
            for text in unlike(recorded, environment, steps=False):
                hint(f"hint: {text}")
        except Exception:
            log.debug("the recordings could not be compared with the environment", exc_info=True)

    comparison = threading.Thread(target=compare, name="likeness", daemon=True)
    # In a thread, which can be left behind: an environment that hangs would keep the run from starting.
    comparison.start()
    comparison.join(HINT_SECONDS)


def _check_devices(config: Config) -> None:
    """Raise InputError for a GPU that is not here, where the roles that want it are to run here too."""
    from bm3il.protocol.device import choose_device

    if config.nodes == 1:
        choose_device(config.learner.device)
        choose_device(config.reward.device)


def _check_room(config: Config, needed: Needs) -> None:
    """Raise InputError if this machine has not the memory that the run takes, where all of it is to run here."""
    if config.nodes == 1:
        needed.check_memory(available_memory())


def _run(config: Config, spec: EnvironmentSpec, folder: Path, needed: Needs, started: Config | None = None) -> int:
    """started: the configuration that a resumed run has had until now."""
    progress, stopped, start = Progress(), StopRequests(), Start(secrets.token_hex(8), time.time())
    with (
        locked(folder),
        run_folder.rewritten(folder, started or config, config),  # by nobody who does not hold the folder
        run_folder.announced(folder),
        stopped.heard(),
        lasting_output(),
    ):
        progress.note(needed.line())
        if algorithm(config.algorithm).clones:
            progress.note(
                f"'{config.algorithm}' plays no steps, so --steps has no effect: it learns for "
                f"{config.cloning.iterations} iterations (--cloning.iterations)"
            )
        # Read before the training writes there: the result of a finished run stays if nothing new is played.
        before = read_result(folder)
        try:
            if config.mode == "serial":
                outcome = _run_serial(config, spec, folder, start.run_id, progress, stopped)
            elif config.nodes > 1:
                outcome = ranks.run_nodes(config, spec, folder, start.run_id, stopped)
            else:
                outcome = _run_node(config, spec, folder, start.run_id, progress, stopped)
        finally:
            progress.close()
        if outcome.text:
            print(f"bm3il: {outcome.text}", file=sys.stderr)
        result = conclude(folder, config, outcome, start, before)
        progress.summary(folder, result)
    return outcome.code


def _run_node(
    config: Config, spec: EnvironmentSpec, folder: Path, run_id: str, progress: Progress, stopped: StopRequests
) -> Outcome:
    processes, here = processes_of(config), Node(socket.gethostname())
    with private_folder(files=len(listeners(processes))) as sockets:
        addresses = ipc_addresses(sockets, processes)
        description = json.dumps(spec.to_json())
        plan = Plan(run_id, str(folder), config.to_yaml(), description, (here,), processes, addresses)
        progress.plan(plan)
        with ticket(plan):
            return direct(plan, progress, stopped)


def _run_serial(
    config: Config, spec: EnvironmentSpec, folder: Path, run_id: str, progress: Progress, stopped: StopRequests
) -> Outcome:
    from bm3il.learner.process import run_serial

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sender, host = Sender(run_id, "learner-0"), config.metrics_address or LOOPBACK
    telemetry = Telemetry("learner", 0, sender, host=host, token=config.metrics_token(), port=config.metrics_port)
    job = make_job(config, spec, run_id, folder, Endpoints("", "", "", ""))
    ended, events = threading.Event(), EventLog(folder, "learner-0", progress.note)
    events.start(config, resumed=(folder / "checkpoints").exists())

    def watch() -> None:
        asked = 0
        while not ended.wait(SERIAL_SHOW_SECONDS):
            progress.show(telemetry.status())
            events.take(telemetry.events())
            for by in stopped.by[asked:]:
                asked += 1
                events.add("stop", f"{by} asks for the end")
            if stopped.count:
                telemetry.stop.set()
            if stopped.count > 1:
                # `sys.exit` would end this thread alone, and the other may be in a long step of a simulator.
                os._exit(INTERRUPTED)

    def work() -> str:
        return run_serial(job, config.settings, config.to_yaml(), telemetry)

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        outcome = attempt(work)
    except Exception:  # whatever it was, the run folder shall tell it
        outcome = Outcome(CRASHED, traceback.format_exc())
    finally:
        ended.set()
        telemetry.close()
    watcher.join()
    events.take(telemetry.events())
    events.end(outcome)
    return outcome


def iterations(config: Config, spec: EnvironmentSpec) -> int:
    """How many a run will take, if no episode ends early: of its training, or of cloning if it does nothing else."""
    from bm3il.learner.imitation import iterations_for

    if algorithm(config.algorithm).clones:
        return config.cloning.iterations
    return iterations_for(config.actor, make_job(config, spec, "", Path(), Endpoints("", "", "", "")))


def differences(started: Config, asked: Config) -> str:
    """The first settings in which the two differ, in words."""
    lines = zip(started.to_yaml().splitlines(), asked.to_yaml().splitlines(), strict=False)
    changes = [f"{old.strip()} then, {new.strip()} now" for old, new in lines if old != new]
    return "; ".join(changes[:3])
