"""The folder of a run: made before anything starts, or not at all; one launcher at a time."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from bm3il.launch.config import Config
from bm3il.launch.locks import locked
from bm3il.launch.result import read_result
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

log = logging.getLogger(__name__)

CONFIG, STUDY, STUDY_FILE = "config.yaml", "study.json", "study.yaml"
"""What makes a folder that of a run, and of a study; beside the latter lies the study's file."""
MAX_SLUG = 80
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""How the system says, of a folder that shall be renamed, that something of the new name is there."""
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
