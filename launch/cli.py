"""The command line, `bm3il`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from bm3il.launch.outcome import DISK_ERRORS, INPUT_ERROR, INTERRUPTED
from bm3il.launch.surroundings import settle, silence
from bm3il.protocol.errors import InputError, SimulatorError, unknown_name

COMMAND = "BM3IL_COMMAND"
"""The environment variable with the command line, for the record of a run."""


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, like all of ours, and which takes an option by its whole name only,
    as `bm3il train` does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.allow_abbrev = False
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Raises InputError, which names the nearest option for one that is unknown."""
        known = self._options()
        for arg in takewhile(lambda arg: arg != "--", args):
            name = arg.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise unknown_name("option", name, known)
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _options(self) -> set[str]:
        """The names of its options, and of those of the commands inside it."""
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        inside = [parser._options() for parsers in commands for parser in parsers.values()]
        return {name for name in self._option_string_actions if name.startswith("--")}.union(*inside)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from error


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code.

    Errors of input, simulators and full disks are one line, and 2. Ctrl-C is one line, and 130, where the command does
    not listen to it itself, as a run does.
    """
    settle()
    args = list(sys.argv[1:] if args is None else args)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except (InputError, SimulatorError) as error:
        return _say(str(error))
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `bm3il train --help | head`
        silence(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        if error.filename is None:
            silence(sys.stdout)
        return _say(f"cannot write {error.filename or 'the output'}: {error.strerror}")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        from bm3il.protocol.version import version

        print(f"bm3il {version()}")
        return 0
    if args[0] not in COMMANDS:
        raise unknown_name("command", args[0], COMMANDS)
    os.environ[COMMAND] = shlex.join(["bm3il", *args])
    return COMMANDS[args[0]](args[1:])


def _say(error: str, code: int = INPUT_ERROR) -> int:
    with suppress(OSError):  # nobody reads it
        print(f"bm3il: {error}", file=sys.stderr, flush=True)
    return code


def train(args: list[str]) -> int:
    """train a new run (--preset, --algorithm, …; --help lists all options)"""
    from bm3il.launch import run
    from bm3il.launch.config import parse_config
    from bm3il.launch.run_folder import open_existing

    if (folder := _take(args, "--resume")) is not None:
        started = open_existing(Path(folder))
        return run.resume(Path(folder), parse_config(args, started))
    return run.train(parse_config(args))


def submit(args: list[str]) -> int:
    """submit a new run to Slurm, as a job that resumes after a preemption"""
    parser = _parser("submit")
    parser.add_argument(
        "--time", default="24:00:00", help="time limit of the job; after it the run continues in a new start"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="a further option of sbatch, e.g. partition=gpu",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the batch script")
    parser.epilog = "All options of `bm3il train` can be used as well."
    options, train_options = parser.parse_known_args(args)
    from bm3il.launch.nodes import slurm

    return slurm.submit(train_options, options.time, options.sbatch, options.dry_run)


def join(args: list[str]) -> int:
    """add actors to an async run that is in progress"""
    parser = _parser("join")
    parser.add_argument("ticket", type=Path, help="the file join.json in the run's folder, or a copy of it (mode 600)")
    parser.add_argument("--actors", type=int, default=1, help="number of actors to add; default: 1")
    options = parser.parse_args(args)
    from bm3il.launch.nodes.join import join

    return join(options.ticket, options.actors)


def resume(args: list[str]) -> int:
    """continue a run from its newest checkpoint"""
    parser = _parser("resume")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--steps", type=int, help="a new budget of joint environment steps, e.g. to extend a finished run"
    )
    options = parser.parse_args(args)
    from bm3il.launch import run

    return run.resume(options.run, steps=options.steps)


def evaluate(args: list[str]) -> int:
    """measure the true returns of a run's policy, compared with a random policy and the expert"""
    parser = _parser("evaluate")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--episodes", type=int, default=2000, help="number of fresh episodes; default: 2000")
    parser.add_argument("--environment", default="", help="a changed world to play in, e.g. 'rover_tower?slip=0.05'")
    parser.add_argument("--paired", action="store_true", help="also play from the start states of the demonstrations")
    parser.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="also draw pictures into RUN/pictures (maps and loads beside the demonstrations': only for berlin)",
    )
    parser.add_argument("--hour", type=float, default=-1.0, help="hour of the map, e.g. 8.5; default: the busiest")
    options = parser.parse_args(args)
    from bm3il.launch.learned import evaluate

    shown = options.pictures, options.hour, options.environment
    return evaluate.main(options.run, options.episodes, options.paired, options.best, *shown)


def export(args: list[str]) -> int:
    """export the policy and the reward of a run as ONNX or TorchScript files"""
    parser = _parser("export")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
    parser.add_argument("--format", choices=["onnx", "torchscript"], default="onnx", help="default: onnx")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    options = parser.parse_args(args)
    from bm3il.launch.learned import export

    return export.main(options.run, options.best, options.format, options.output)


def play(args: list[str]) -> int:
    """play one episode with a run's policy, and draw it"""
    parser = _parser("play")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--best", action="store_true", help="the best checkpoint instead of the newest")
    begins = parser.add_mutually_exclusive_group()
    begins.add_argument("--seed", type=int, default=0, help="seed of a fresh start state; default: 0")
    begins.add_argument(
        "--episode", type=int, metavar="K", help="start from the start state of demonstration K (the first is 0)"
    )
    parser.add_argument("--environment", default="", help="a changed world to play in, e.g. 'rover_tower?slip=0.05'")
    parser.add_argument("--greedy", action="store_true", help="the most likely actions instead of sampled ones")
    parser.add_argument("--expert", action="store_true", help="also let the scripted expert play, for comparison")
    parser.add_argument("--random", action="store_true", help="also play random actions, for comparison")
    parser.add_argument(
        "--output", type=Path, help="FILE.gif: an animation; FILE.png: some moments; default: RUN/play.gif"
    )
    options = parser.parse_args(args)
    from bm3il.launch.learned import play

    start = play.Start(options.seed, options.episode)
    beside = [who for who in ("expert", "random") if getattr(options, who)]
    return play.main(options.run, options.best, start, options.environment, beside, options.greedy, options.output)


def whatif(args: list[str]) -> int:
    """predict what the people imitated by a run will do in a changed world"""
    from bm3il.launch.surroundings import cores

    parser = _parser("whatif")
    parser.add_argument("run", type=Path, help="the run's folder; a run of behaviour cloning (bc) is enough")
    parser.add_argument("--environment", required=True, help="the changed world, e.g. 'berlin?...&closed=22,23'")
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="K",
        help="number of imitation runs in the changed world, one per seed; intervals are over these runs; default: 5",
    )
    parser.add_argument("--steps", type=int, default=40_000, help="joint environment steps of each run; default: 40000")
    parser.add_argument(
        "--jobs", type=int, default=cores(), help="number of runs at the same time; default: one per core"
    )
    parser.add_argument(
        "--episodes", "--days", type=int, default=200, help="number of fresh episodes for each policy; default: 200"
    )
    options = parser.parse_args(args)
    from bm3il.launch.whatif import whatif

    size = options.seeds, options.steps, options.jobs, options.episodes
    return whatif.main(options.run, options.environment, *size)


def study(args: list[str]) -> int:
    """train and evaluate many runs from one file: a grid of settings, seeds and worlds"""
    parser = _parser("study")
    parser.add_argument("file", type=Path, help="a YAML file, see docs/studies.md")
    parser.add_argument(
        "--jobs",
        type=int,
        help="number of runs at the same time; default: number of cores divided by the threads of a run",
    )
    parser.add_argument(
        "--runs-folder",
        type=Path,
        default=Path("runs"),
        help="folder in which the study's folder is created; default: runs",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the table of runs")
    options = parser.parse_args(args)
    from bm3il.launch.studies import study

    return study.main(options.file, options.jobs, options.runs_folder, options.dry_run)


def compare(args: list[str]) -> int:
    """compare finished runs or studies: how their settings differ, how good they are"""
    parser = _parser("compare")
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="RUN_OR_STUDY", help="folders of runs or studies, or files of results"
    )
    parser.add_argument(
        "--by",
        default="",
        metavar="KEY",
        help="setting to compare, e.g. algorithm; the other settings that differ then make tasks",
    )
    parser.add_argument("--world", default="", help="compare only in this world, e.g. slip=0.1, or 'as trained'")
    parser.add_argument(
        "--baseline", default="", metavar="GROUP", help="group that others are compared with; default: the first"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for CSV and picture; default: the folder of the run or study; for several: comparison",
    )
    options = parser.parse_args(args)
    from bm3il.launch.studies import compare

    return compare.main(options.paths, options.by, options.world, options.baseline, options.output)


def status(args: list[str]) -> int:
    """show whether a run is active, how far it is, or how it ended"""
    parser = _parser("status")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")
    options = parser.parse_args(args)
    from bm3il.launch.status import print_status

    return print_status(options.run, options.json)


def list_runs(args: list[str]) -> int:
    """list the runs and studies in a folder: how far each is, or how it ended"""
    parser = _parser("list")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="the folder of runs; default: runs")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(args)
    from bm3il.launch.status import print_list

    return print_list(options.runs, options.json)


def report(args: list[str]) -> int:
    """write a report of a run or a study as one HTML page: curves, times, health, events"""
    parser = _parser("report")
    parser.add_argument("folder", type=Path, help="folder of a run (it may still be active) or of a study")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: report.html in that folder")
    options = parser.parse_args(args)
    from bm3il.launch.reports.report import main

    return main(options.folder, options.output)


def demonstrations(args: list[str]) -> int:
    """record, import, clean or inspect demonstrations"""
    parser = _parser("demonstrations")
    actions = parser.add_subparsers(dest="action", required=True)
    record = actions.add_parser("record", help="record the scripted expert of an environment, or the policy of a run")
    record.add_argument("environment", nargs="?", help="environment whose scripted expert plays")
    record.add_argument(
        "--run", type=Path, help="folder of a run; its policy plays in the environment it was trained in"
    )
    record.add_argument("--best", action="store_true", help="the run's best checkpoint instead of the newest")
    record.add_argument("--greedy", action="store_true", help="the most likely actions instead of sampled ones")
    record.add_argument("--episodes", type=int, default=100, help="number of episodes; default: 100")
    record.add_argument(
        "--seed", type=int, default=0, help="seed of the start states and of sampled actions; default: 0"
    )
    record.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    imports = actions.add_parser(
        "import", help="import a table, an npz file, a Minari data set or SUMO routes; see docs/recordings.md"
    )
    imports.add_argument(
        "file",
        nargs="+",
        help="a .csv, .tsv, .parquet or .npz file, or minari:ID; for SUMO routes one .xml file per episode",
    )
    imports.add_argument("--environment", default="", help="environment in which it was recorded")
    imports.add_argument(
        "--mapping", type=Path, help="YAML file with the table's names of columns, types, agents and actions"
    )
    imports.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    clean = actions.add_parser("clean", help="leave out actions that their masks forbid")
    clean.add_argument("file", type=Path, help="demonstrations, a .safetensors file")
    clean.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    inspect = actions.add_parser("inspect", help="show what a file contains")
    inspect.add_argument("file", help="a file, or the name of one that comes with bm3il")
    options = parser.parse_args(args)
    from bm3il.launch import demonstrations

    if options.action == "inspect":
        return demonstrations.inspect(options.file)
    if options.action == "import":
        return demonstrations.import_files(options.file, options.environment, options.mapping, options.output)
    if options.action == "clean":
        return demonstrations.clean(options.file, options.output)
    if (options.environment is None) == (options.run is None):
        raise InputError("name either an environment, whose scripted expert plays, or a run with --run")
    size = options.episodes, options.seed, options.output
    if options.run is not None:
        return demonstrations.record_run(options.run, options.best, options.greedy, *size)
    return demonstrations.record(options.environment, *size)


def check_environment(args: list[str]) -> int:
    """check that an environment keeps the contract, and measure its speed"""
    parser = _parser("check-environment")
    parser.add_argument("environment", help="its name, e.g. my_town or 'rover_tower?pairs=4'")
    parser.add_argument(
        "--demonstrations",
        default="",
        help="also check that these fit it: a file, or the name of one that comes with bm3il",
    )
    options = parser.parse_args(args)
    from bm3il.actors.settings import ActorSettings
    from bm3il.actors.simulator import ending_if_hung
    from bm3il.launch.environments.check import check_environment

    with ending_if_hung(ActorSettings().step_seconds):
        return check_environment(options.environment, options.demonstrations)


def new_environment(args: list[str]) -> int:
    """create a small working environment as a starting point for your own"""
    parser = _parser("new-environment")
    parser.add_argument("name", help="name of the environment and its package, e.g. my_town")
    parser.add_argument("--folder", type=Path, help="a new folder; default: NAME-environment")
    options = parser.parse_args(args)
    from bm3il.launch.environments.new import new_environment

    return new_environment(options.name, options.folder)


def calibrate(args: list[str]) -> int:
    """measure the return per day of random, naive and congestion-aware commuters"""
    parser = _parser("calibrate")
    parser.add_argument("environment", help="e.g. 'berlin?types=10&agents=50'")
    parser.add_argument("--days", type=int, default=200, help="number of days of each kind of commuter; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="seed of the days; default: 0")
    options = parser.parse_args(args)
    from bm3il.launch.environments.calibration import calibrate

    return calibrate(options.environment, options.days, options.seed)


def scenario(args: list[str]) -> int:
    """import a road network as a scenario, inspect one, draw its map"""
    parser = _parser("scenario")
    actions = parser.add_subparsers(dest="action", required=True)
    imports = actions.add_parser("import", help="import a folder of MATSim or TNTP files, or of a town's two tables")
    imports.add_argument("folder", type=Path, help="folder that holds the files")
    imports.add_argument("--output", type=Path, required=True, help="a .json file")
    imports.add_argument("--name", default="", help="name of the scenario; default: that of the folder")
    imports.add_argument("--roads", type=int, default=46, help="number of roads (even); 0: keep all links as they are")
    imports.add_argument(
        "--facilities", type=int, default=10, help="number of facilities, where people live and work; default: 10"
    )
    imports.add_argument(
        "--flow-scale",
        type=float,
        default=0.0,
        help="smaller values mean more congestion; 0: such that the median road holds 0.6 agents (town's tables: 1)",
    )
    imports.add_argument(
        "--minutes-per-unit",
        type=float,
        default=1.0,
        help="minutes per time unit of TNTP files, which do not state it: 0.0166667 for seconds, 60 for hours",
    )
    imports.add_argument(
        "--radius",
        type=float,
        default=0.0,
        help="keep only trips within this distance of the centre (MATSim: metres); 0: all trips",
    )
    imports.add_argument("--network", default="", help="the network file; default: found by its content")
    imports.add_argument(
        "--plans", "--trips", default="", help="the file with the trips; default: found by its content"
    )
    imports.add_argument(
        "--home", nargs="+", metavar="TYPE", help="activity types of MATSim plans that mean home; default: home h"
    )
    imports.add_argument("--work", nargs="+", metavar="TYPE", help="activity types that mean work; default: work w")
    inspect = actions.add_parser("inspect", help="show what a scenario contains")
    inspect.add_argument("scenario", help="a .json file, or the name of one that comes with bm3il")
    inspect.add_argument("--picture", type=Path, help="draw the map into this file")
    options = parser.parse_args(args)
    from bm3il.actors.environments.berlin.aggregation import Hours
    from bm3il.actors.environments.berlin.matsim import HOME, WORK
    from bm3il.launch.environments import scenario

    if options.action == "inspect":
        return scenario.inspect(options.scenario, options.picture)
    types = options.home or HOME, options.work or WORK
    reading = scenario.Reading(options.network, options.plans, options.minutes_per_unit, *types, options.radius)
    size, hours = (options.roads, options.facilities), Hours(flow_scale=options.flow_scale)
    return scenario.import_folder(options.folder, options.output, options.name, *size, reading, hours)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "submit": submit,
    "join": join,
    "resume": resume,
    "evaluate": evaluate,
    "whatif": whatif,
    "export": export,
    "play": play,
    "study": study,
    "compare": compare,
    "status": status,
    "list": list_runs,
    "report": report,
    "demonstrations": demonstrations,
    "check-environment": check_environment,
    "new-environment": new_environment,
    "scenario": scenario,
    "calibrate": calibrate,
}


def _parser(command: str) -> _Parser:
    return _Parser(prog=f"bm3il {command}", description=COMMANDS[command].__doc__)


def _usage() -> str:
    lines = [f"  {name:<18} {command.__doc__}" for name, command in COMMANDS.items()]
    more = "bm3il COMMAND --help shows the options of a command, bm3il --version the version."
    return "\n".join(["usage: bm3il COMMAND [OPTIONS]", "", *lines, "", more])


def _take(args: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from args and return the value."""
    for position, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            del args[position]
            if equals:
                return value
            if position < len(args):
                return args.pop(position)
            raise InputError(f"{flag} needs the folder of a run")
    return None


if __name__ == "__main__":
    sys.exit(main())
