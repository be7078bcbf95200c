"""`bm3il submit`: a run as a batch job of Slurm, which comes back after a preemption and after its time limit."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bm3il.launch import run, run_folder
from bm3il.launch.config import Config, parse_config
from bm3il.launch.nodes.backends import BATCH_JOB
from bm3il.launch.processes.supervisor import NOTICE
from bm3il.launch.surroundings import module_command
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

NOTICE_SECONDS, INACCURACY_SECONDS = 120, 60
"""How long before its time limit the job is told: Slurm is coarse, and up to a minute early or late."""

SCRIPT = """\
#!/bin/bash
# Written by `bm3il submit`. It begins the run, or goes on with it from its newest checkpoint.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
#SBATCH --signal=B:USR1@{notice}
#SBATCH --no-kill
{extra}
cd {cwd}
export {notice_variable}={sure} # of the time limit; a partition with a shorter grace time needs less
export {batch_job}=$SLURM_JOB_ID # with it the nodes can bring the job back if the first is lost
over=
# Slurm tells that the time is nearly over (USR1) or that the job has to go (TERM): checkpoint and end.
trap 'told=1 over=1; kill -TERM "$run"' USR1
trap 'told=1; kill -TERM "$run"' TERM
if [ -e {folder}/config.yaml ]; then
    {program} resume {folder} &
else
    {program} train {options} &
fi
run=$!
told=1
while [ -n "$told" ]; do # a signal ends the wait, not the run
    told=
    wait "$run"
    code=$?
done
# Interrupted (143: before it listened). When it makes room, Slurm tells the nodes some seconds before it tells this
# script, and a job that ends by itself then would not come back: stay until Slurm ends it.
if [ "$code" = 130 ] || [ "$code" = 143 ]; then
    [ -z "$over" ] || scontrol requeue "$SLURM_JOB_ID"
    sleep 600
fi
exit "$code"
"""


def submit(args: Sequence[str], time: str, options: Sequence[str], dry_run: bool) -> int:
    """Write the batch script beside the run's folder and submit it; with `dry_run` only print it.

    args: of `bm3il train`.   time: Slurm's limit, `HH:MM:SS`.   options: more lines for sbatch, `partition=gpu`.
    Raises InputError for what `bm3il train` would refuse, and without Slurm.
    """
    config = run_folder.named(run.check(parse_config(list(args)))[0])
    text = script(config, args, time, options)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise InputError("there is no sbatch here: submit from a machine of the cluster, or use --dry-run")
    folder = Path(config.runs_folder).resolve()
    path = folder / f"{config.run}.sbatch"
    if path.exists() or (folder / config.run).exists():
        raise InputError(f"{folder / config.run} was submitted or run before; take another --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}") from error
    write_atomically(path, text)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        # Otherwise the next try would be refused, as if the run had been submitted.
        path.unlink()
        raise InputError(f"sbatch refuses the job: {done.stderr.strip()}")
    print(f"job {done.stdout.strip()}: {path}\nlog: {_log(config)}\nrun: {folder / config.run}")
    return 0


def script(config: Config, args: Sequence[str], time: str, options: Sequence[str]) -> str:
    """The batch script of a run with a name. Raises InputError for what no line of it can hold."""
    for text in (time, *options, str(_log(config))):
        if not text.isprintable():
            raise InputError(f"a batch script cannot hold {text!r}: it has letters that cannot be printed")
    if "\\" in str(_log(config)):  # to Slurm it means: take what follows % as it is
        raise InputError(f"Slurm cannot write to {_log(config)}, which has a backslash; take another --runs-folder")
    # The name is fixed now: when the job comes back, the script looks for this folder.
    given = [*args] if "--run" in args else [*args, "--run", config.run]
    return SCRIPT.format(
        name=_quoted(f"bm3il-{config.run}"),
        nodes=config.nodes,
        time=time,
        log=_quoted(str(_log(config)).replace("%", "%%")),
        notice=NOTICE_SECONDS,
        notice_variable=NOTICE,
        sure=NOTICE_SECONDS - INACCURACY_SECONDS,
        extra="".join(f"#SBATCH --{option}\n" for option in options),
        batch_job=BATCH_JOB,
        cwd=shlex.quote(str(Path.cwd())),
        folder=shlex.quote(str(Path(config.runs_folder).resolve() / config.run)),
        program=shlex.join(module_command("bm3il.launch.cli")),
        options=shlex.join(given),
    )


def _quoted(text: str) -> str:
    """For a line of options, as Slurm reads these: a backslash counts inside of quotes, too."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _log(config: Config) -> Path:
    return Path(config.runs_folder).resolve() / f"{config.run}.slurm.log"
