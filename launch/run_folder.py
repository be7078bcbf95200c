"""The folder of a run: made before anything starts, or not at all; one launcher at a time."""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from bm3il.launch.config import Config
from bm3il.launch.outcome import CRASHED, FINISHED, INTERRUPTED, Outcome
from bm3il.launch.provenance import provenance
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_whole

log = logging.getLogger(__name__)

CONFIG, STUDY, STUDY_FILE = "config.yaml", "study.json", "study.yaml"
"""What makes a folder that of a run, and of a study; beside the latter lies the study's file."""
TAIL_BYTES = 1 << 20
"""Of a log, in which its last line lies."""
MAX_SLUG = 80
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""How the system says, of a folder that shall be renamed, that something of the new name is there."""
LOCK_TRIES, LOCK_PAUSE_SECONDS = 5, 0.02
"""Who only looks whether a run is running holds its lock for some microseconds."""
SECOND = len("2026-11-27T14:57:41")
ANNOUNCED, ENDED_WELL = ".targets", ("finished", "interrupted")
MIN_FREE_BYTES = 64 << 20
"""Room for two checkpoints of the Berlin preset: with less, the first iterations would be lost work."""
BEGUN = {
    *(CONFIG, ".lock", "result.json", "logs", "targets.json", "processes.json", "events.jsonl", "baseline.json"),
    *("checkpoints", "tensorboard", "curve.csv", "curve.png", "log.jsonl", "join.json", "run.log", "report.html"),
}
"""All that a run may leave that ended at its start."""


class RunExistsError(InputError):
    """There is a run of this name."""


@dataclass(frozen=True)
class Start:
    """One start of a run, which may be one of several: a resume is another. time: seconds since the epoch."""

    run_id: str
    time: float


def named(config: Config) -> Config:
    """Itself with a name for the run: preset, algorithm, seed and time if the user gave none."""
    if not config.run:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(config.preset).stem}-{config.algorithm}-seed{config.seed}-{stamp}"
        names = chain([name], (f"{name}-{number}" for number in count(2)))  # several may start in one second
        return replace(config, run=next(name for name in names if not Path(config.runs_folder, name).exists()))
    if not is_plain(config.run):
        raise InputError(f"--run must be a plain folder name, got {config.run!r}; --runs-folder says where it lies")
    return config


def is_plain(name: str) -> bool:
    """Whether a folder of this name is no hidden one, and lies where it is made."""
    return bool(name) and not name.startswith(".") and "/" not in name and name.isprintable()


def slug(options: Sequence[str], most: int = MAX_SLUG) -> str:
    """Options as the name of a folder: `closed-22-23`; of more than so many letters, the first and a hash."""
    text = "_".join(re.sub("[^A-Za-z0-9._]+", "-", option) for option in options).strip("-.")
    if len(text) > most:
        text = f"{text[:most]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def create(config: Config) -> Path:
    """Make the folder with its `config.yaml`; anew if the run before ended at its start.

    Raises InputError if it exists, cannot be written or has no space; nothing is left behind then.
    """
    folder = Path(config.runs_folder, config.run)
    taken = RunExistsError(f"{folder} exists; take another --run, or `bm3il resume {folder}` to go on with it")
    discard(folder)
    if os.path.lexists(folder):
        raise taken
    # Under another name until it is whole: who is killed here leaves no folder that is in the way and is no run.
    fresh = folder.with_name(f".new-{secrets.token_hex(8)}")
    try:
        fresh.mkdir(parents=True)
        check_space(folder.parent)
        write_atomically(fresh / CONFIG, config.to_yaml())
        fresh.rename(folder)
    except OSError as error:
        if error.errno in TAKEN and fresh.exists():
            raise taken from error
        raise InputError(f"cannot create {folder}: {error.strerror}; take another --runs-folder") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder.resolve()


def discard(folder: Path) -> None:
    """Remove a run that ended before it did anything worth keeping: it logged no iteration. Any other stays."""
    if not (folder / CONFIG).is_file():
        return
    with contextlib.suppress(OSError, InputError), locked(folder):
        if _barren(folder):
            shutil.rmtree(folder)
            (folder.parent / ANNOUNCED / f"{folder.name}.json").unlink(missing_ok=True)
            (folder.parent / ANNOUNCED).rmdir()  # if it was the first run


def _barren(folder: Path) -> bool:
    log, checkpoints = folder / "log.jsonl", folder / "checkpoints"
    if {path.name for path in folder.iterdir()} - BEGUN or (log.exists() and log.stat().st_size):
        return False
    return not any(int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit())


@contextlib.contextmanager
def announced(folder: Path) -> Iterator[None]:
    """Link to the run's `targets.json` from a folder that holds those of all runs: Prometheus takes a wildcard in the
    name of a file only. Without it the run goes on.

    A run that ended as it should is no longer looked for; of one that did not, somebody shall hear that it is silent.
    """
    link = folder.parent / ANNOUNCED / f"{folder.name}.json"
    with contextlib.suppress(OSError):
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", folder.name, "targets.json"))
    yield
    if read_result(folder).get("status") in ENDED_WELL:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)


def read_config(folder: Path) -> Config:
    """The configuration of a run that exists. Raises InputError if it is none, with what may have been meant."""
    if not folder.exists():
        raise missing(folder)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = f"; name one of the runs in it (`bm3il list {folder}`)" if folders_with(folder, (CONFIG,)) else ""
        raise InputError(f"{folder} is not the folder of a run: it has no {CONFIG}{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} is not the folder of a run: its {CONFIG} cannot be read: {error}") from error
    return Config.from_yaml(text, str(folder / CONFIG))


def missing(folder: Path) -> InputError:
    """The error for a folder of a run or a study that is not there. It names the nearest beside it, or in `runs`: who
    gives a name alone means the latter."""
    places = [place for place in (folder.parent, folder.parent / Config.runs_folder) if place.is_dir()]
    around = [path for place in places for path in folders_with(place, (CONFIG, STUDY))]
    near = difflib.get_close_matches(folder.name, [path.name for path in around], n=1)
    meant = next((f"; did you mean {path}?" for path in reversed(around) if path.name in near), "")
    return InputError(f"there is no folder {folder}{meant}")


def folders_with(folder: Path, marks: Collection[str]) -> list[Path]:
    """Those inside a folder that hold one of these files."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return [path for path in inside if any((path / mark).exists() for mark in marks)]


def open_existing(folder: Path) -> Config:
    """The configuration of a run that exists. Raises InputError if it is none, or cannot be written."""
    config = read_config(folder)
    check_space(folder)
    return config


@contextmanager
def rewritten(folder: Path, before: Config, after: Config) -> Iterator[None]:
    """The run's `config.yaml` with another budget of steps, if it is another; the one before is kept beside it.

    What is refused meanwhile, by an InputError, has changed nothing.
    """
    if before.steps == after.steps:
        yield
        return
    kept = folder / f"config-{before.steps}-steps.yaml"
    # First the copy: a process that is killed in between leaves the run with its old budget.
    write_atomically(kept, before.to_yaml())
    write_atomically(folder / CONFIG, after.to_yaml())
    try:
        yield
    except InputError:
        kept.rename(folder / CONFIG)
        raise


def check_space(folder: Path) -> None:
    """Raise InputError unless the folder is writable and its disk has room."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} is not writable")
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < MIN_FREE_BYTES:
        raise InputError(
            f"the disk of {folder} has {free_bytes >> 20} MiB free, at least {MIN_FREE_BYTES >> 20} MiB are needed"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run for this launcher. Raises InputError if another one holds it."""
    with (folder / ".lock").open("wb") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise InputError(f"{folder} is being run by another process") from error
        yield


def lock(file: IO[bytes], tries: int = LOCK_TRIES) -> None:
    """Raises BlockingIOError if somebody holds it for longer than so many tries, by default than a look takes
    (`is_running`)."""
    for left in reversed(range(tries)):
        try:
            # The kernel gives it back however its holder ends: a killed run can be resumed, and is shown as killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(LOCK_PAUSE_SECONDS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder of runs exists, and nobody else writes into it. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; take another --runs-folder") from error
    with locked(folder):
        yield


def is_running(folder: Path) -> bool:
    """Whether a launcher holds the run. It only looks: also into a folder in which one may not write."""
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an exclusive one wants, on NFS, a file to be written
    except BlockingIOError:
        return True
    except OSError:  # nobody has held it yet
        return False
    return False


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json`; of a run that failed and could not write it, what its last event tells; else {}."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _failure(folder)
    return result if isinstance(result, dict) else {}


def present_result(folder: Path, config: Config) -> dict[str, Any]:
    """`read_result` of the run as it stands, else {}: it may be running again, or have been killed since it ended."""
    if is_running(folder):
        return {}
    result = read_result(folder)
    if result.get("status") == "finished":  # it stays whatever came later, unless it shall play more steps
        return result if result.get("steps", config.steps) == config.steps else _failure(folder)
    lines = _lines(folder / "events.jsonl")
    starts = [line for line in lines if line.get("event") == "start"] or lines[:1]
    # To the second, as results tell it.
    began = [str(line.get("time", ""))[:SECOND] for line in starts[-1:]]
    return _failure(folder) if [str(result.get("ended", ""))[:SECOND]] < began else result


def _failure(folder: Path) -> dict[str, Any]:
    """How a run has failed by its last event; {} if that is another one."""
    last: dict[str, Any] = next(reversed(_lines(folder / "events.jsonl")), {})
    if last.get("event") != "end" or last.get("status") != "failed":
        return {}
    far, outcome = reached(folder), Outcome(CRASHED, str(last.get("text", "")).removeprefix("failed: "))
    return far | _ending(folder, outcome, far.get("iterations", 0)) | {"exit_code": last.get("exit_code", CRASHED)}


def concluded(folder: Path, run_id: str) -> dict[str, Any]:
    """`result.json` if this start of the run has written it to its end, else {}."""
    result = read_result(folder)
    return result if "exit_code" in result and result.get("run_id") == run_id else {}


def conclude(
    folder: Path, config: Config, outcome: Outcome, start: Start, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write `result.json`: what the learner of this start told in it, if it had the time to, and how the run ended.

    before: what it held at the start. A finished run's result stays if nothing was played since.   Returns the result
    of this start, also if the disk does not take it.
    """
    facts: dict[str, Any] = {
        "environment": config.environment,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "mode": config.mode,
        "nodes": config.nodes,
        "actors": config.actors,
        "steps": config.steps,
    }
    told, far = read_result(folder), reached(folder)
    if told.get("run_id") != start.run_id:
        told = {}
    if outcome.code != FINISHED:  # it tells the return of its last evaluation, as one does whose learner was killed
        told = {key: value for key, value in told.items() if value is not None or key not in far}
    # In this order: what the learner itself told counts more than what its log and its curve end with.
    result = facts | far | told
    result |= {"run_id": start.run_id, "started": _utc(start.time), "ended": _utc(time.time()), **provenance()}
    for key in ("error", "resume"):  # of a first node that has concluded before
        result.pop(key, None)
    result |= _ending(folder, outcome, result.get("iterations", 0))
    stays = (
        before is not None
        and before.get("status") == "finished" != result["status"]
        and result.get("iterations", 0) <= before.get("iterations", 0)
    )
    try:
        write_atomically(folder / "result.json", json.dumps(before if stays else result, indent=1) + "\n")
    except InputError as error:
        log.warning("%s; its events tell how the run ended", error)
        if not stays:  # what is there is of an earlier start
            with contextlib.suppress(OSError):
                (folder / "result.json").unlink(missing_ok=True)
    return result


def _ending(folder: Path, outcome: Outcome, iterations: int) -> dict[str, Any]:
    """How a run ended that had come so far, and the command that goes on."""
    told: dict[str, Any] = {"status": outcome.status, "exit_code": outcome.code}
    if outcome.code != FINISHED and outcome.text:
        told["error"] = outcome.text
    if outcome.code == INTERRUPTED or (outcome.code != FINISHED and iterations):
        told["resume"] = f"bm3il resume {shlex.quote(str(folder))}"
    return told


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def reached(folder: Path) -> dict[str, Any]:
    """How far a run had come whose learner could not say so any more: what its log and its curve end with."""
    found: dict[str, Any] = {}
    with contextlib.suppress(LookupError):
        last = last_logged(folder)
        found = {"iterations": last["iteration"], **{name: last[name] for name in ("env_steps", "wall_seconds")}}
    with contextlib.suppress(LookupError, ValueError, TypeError):
        row = curve(folder)[-1]
        found |= {name: float(row[name]) for name in ("return_mean", "return_stderr", "normalized_return") if row[name]}
    return found


def last_logged(folder: Path) -> dict[str, Any]:
    """The figures of the last iteration in `log.jsonl` whose line was written whole, or {}."""
    return next(reversed(logged(folder)), {})


def logged(folder: Path) -> list[dict[str, Any]]:
    """The figures of the last iterations in `log.jsonl` whose lines were written whole, oldest first."""
    return _lines(folder / "log.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The last JSON objects in a file of one a line, oldest first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            texts = file.read().rpartition(b"\n")[0].splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError):  # the first may have been cut
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows of `curve.csv`, or [] if it cannot be read."""
    try:
        with (folder / "curve.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def write_atomically(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises InputError naming the file and the cause."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
