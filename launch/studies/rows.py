"""What a finished run of a study leaves that outlives its folder: a row of a small text file, which `results:` in the
study's file names, and which can be kept with it.

    {"version": 1,
     "common": {"algorithm": "bm3il", …},        what all rows have in common of their configurations
     "runs": [
    {"run": …, "settings": …, "config": …, "seed": …, …},                  a line each: see `Row`
    …
    ]}

A run that a row tells of is done. Row and run belong together by their whole configuration (`identity`), whatever the
commit: the row says by which it was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

from bm3il.launch.config import Config, flattened
from bm3il.launch.locks import lock
from bm3il.launch.result import curve_rows, read_result
from bm3il.launch.studies.file import Settings
from bm3il.launch.studies.trial import AS_TRAINED, all_evaluations, core_seconds
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

VERSION = 1
SIGNIFICANT_DIGITS = 6
CURVE = ("env_steps", "wall_seconds", "normalized_return", "return_mean")
ELSEWHERE = ("run", "runs_folder", "files", "hostfile", "network", "cloning.kept_in")
"""Settings that say where a run is, and not what it learns; those of metrics are left out, too."""


def identity(config: Config) -> Settings:
    """What makes a run this one and no other: all settings that have to do with what it learns, by dotted keys. A file
    is its name and the hash of its content, wherever it lies."""
    # Through JSON, so that tuples equal the lists in a file of rows. Without the files, whose paths would become
    # keys; their hashes come in below.
    values = flattened(json.loads(json.dumps(asdict(config) | {"files": None})))
    told = {key: value for key, value in values.items() if key not in ELSEWHERE and not key.startswith("metrics_")}
    told["preset"] = Path(config.preset).name
    for path, digest in config.files.items():
        for key in ("environment", "demonstrations"):
            told[key] = told[key].replace(path, f"{Path(path).name} {digest[:12]}")
    return told


@dataclass(frozen=True)
class Row:
    """A finished run.

    settings: what the study's grid says of it.   config: see `identity`.   episodes: those that it was judged by in the
    study's worlds; those of other studies tell their own.   core_seconds: processor time of its processes; None if it
    is not known.   evaluations: figures by world.   curve: of each of CURVE a value for every evaluation on the way,
    None where there is none.
    """

    run: str
    settings: Settings
    config: Settings
    seed: int
    commit: str
    episodes: int
    core_seconds: float | None
    wall_seconds: float | None
    evaluations: dict[str, dict[str, Any]]
    curve: dict[str, list[float | None]]

    @classmethod
    def of(cls, folder: Path, settings: Settings, config: Config, episodes: int) -> Row:
        """Of the folder of a run that has finished."""
        result, points = read_result(folder), curve_rows(folder)
        return cls(
            run=folder.name,
            settings=settings,
            config=identity(config),
            seed=config.seed,
            commit=str(result.get("commit") or result.get("version")),
            episodes=episodes,
            core_seconds=short(core_seconds(folder)),
            wall_seconds=short(result.get("wall_seconds")),
            evaluations={world: _shortened(told) for world, told in all_evaluations(folder).items()},
            curve={name: [short(point.get(name)) for point in points] for name in CURVE},
        )

    def is_of(self, wanted: Settings) -> bool:
        """Whether it is the run of this identity. What was no setting yet when it ran was as the default is now."""
        known = all(wanted.get(key, ...) == value for key, value in self.config.items())
        return known and all(value == DEFAULTS.get(key, ...) for key, value in wanted.items() if key not in self.config)

    def joined(self, before: Row) -> Row:
        """With the evaluations in other worlds that an earlier row has, if that is of the same policy."""
        if before.commit != self.commit or before.evaluations.get(AS_TRAINED) != self.evaluations.get(AS_TRAINED):
            return self
        return replace(self, evaluations=before.evaluations | self.evaluations)

    def has(self, worlds: Sequence[str], episodes: int) -> bool:
        """Whether the run was judged in these worlds by so many episodes."""
        return all(self.evaluations.get(world, {}).get("episodes") == episodes for world in worlds)


DEFAULTS = identity(Config())
WRITER_TRIES = 1500
"""Half a minute, in which another study has long written its rows."""


class Rows:
    """The rows of a file, which is written anew with each that comes."""

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self.path, self.rows = path, list(rows)

    @classmethod
    def read(cls, path: Path) -> Rows:
        """No rows if there is no such file yet. Raises InputError for one that holds no rows."""
        if not path.exists():
            return cls(path, [])
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["version"] != VERSION:
                raise InputError(f"{path} has version {told['version']!r}, and this release reads version {VERSION}")
            common = told["common"]
            return cls(path, [_row(run, common) for run in told["runs"]])
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{path} does not hold the results of a study: {what}; put it back as it was, or remove it to train "
                "its runs anew"
            ) from error

    def find(self, config: Config) -> Row | None:
        """The row of the run that a configuration describes."""
        return self.of(identity(config))

    def of(self, wanted: Settings) -> Row | None:
        """The row of the run of this identity."""
        return next((row for row in self.rows if row.is_of(wanted)), None)

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in, in place of those of the same runs, and write the file. Raises InputError if that fails."""
        path = self.path.resolve()  # a link stays one
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {path.parent}: {error.strerror}") from error
        with _locked(path):
            # Another study may have written since, or version control: what they brought stays.
            before = Rows.read(path).rows
            rows = [reduce(Row.joined, (old for old in before if old.is_of(new.config)), new) for new in rows]
            stay = [row for row in before if not any(row.is_of(new.config) for new in rows)]
            # The order of finishing differs from call to call; in this one, a file under version control changes
            # little.
            self.rows = sorted([*stay, *rows], key=lambda row: (row.run, row.seed))
            write_atomically(path, self.text())

    def text(self) -> str:
        """Of the file."""
        common, configs = shared([row.config for row in self.rows])
        own = [asdict(row) | {"config": config} for row, config in zip(self.rows, configs, strict=True)]
        lines = ",\n".join(json.dumps(row) for row in own)
        return f'{{"version": {VERSION},\n"common": {json.dumps(common, indent=1)},\n"runs": [\n{lines}\n]}}\n'


def shared(configs: Sequence[Settings]) -> tuple[Settings, list[Settings]]:
    """What all have in common, and the rest of each."""
    first = configs[0] if configs else {}
    common = {key: value for key, value in first.items() if all(told.get(key, ...) == value for told in configs)}
    return common, [{key: value for key, value in told.items() if key not in common} for told in configs]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the others wait. The lock is a file beside it, since the file itself is replaced.

    Raises InputError if that cannot be locked.
    """
    beside = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        try:
            lock(stack.enter_context(beside.open("wb")), WRITER_TRIES)
        except OSError as error:
            raise InputError(f"cannot lock {beside}: {error.strerror}") from error
        yield


def _row(told: Mapping[str, Any], common: Settings) -> Row:
    """Raises LookupError, TypeError or ValueError for what is none."""
    row = Row(**{key.name: told[key.name] for key in fields(Row)} | {"config": {**common, **told["config"]}})
    lengths = {len(row.curve[name]) for name in CURVE}
    if len(lengths) != 1 or not all(isinstance(figures, dict) for figures in row.evaluations.values()):
        raise ValueError(f"the run {row.run!r} has no whole curve, or no evaluations")
    return row


def _shortened(told: Mapping[str, Any]) -> dict[str, Any]:
    """Its numbers."""
    return {key: short(value) for key, value in told.items() if value is None or isinstance(value, (int, float))}


def short(value: Any) -> float | None:
    """A number of so many digits as are worth a line in a file."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else float(f"{number:.{SIGNIFICANT_DIGITS}g}")
