"""The file of a study: which runs it is of, and in which worlds what they learned is judged.

    name: tower                                       # default: the file's
    settings: {preset: rover_tower_4, steps: 20000}   # of all runs, as `bm3il train` has them
    grid:                                             # every combination; or a list of grids, one after the other
      algorithm: [bc, bm3il]
      learner.batch_size: [256, 512]
    seeds: [1, 2, 3]
    worlds: [slip=0.1, "rover_tower?pairs=2&slip=0.2"]
    episodes: 200                                     # fresh ones, in each of the worlds
    results: results/tower.json                       # beside this file: rows of finished runs, see `rows`
    core_seconds: 60                                  # that a run takes, for the estimate

A world is an environment, or options alone that change each run's own, or `own`, the run's own one: in all of them, the
expert beside it has planned there. Runs are of mode serial unless settings say something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from bm3il.launch.config import Config, configured, flattened
from bm3il.launch.files import remembered
from bm3il.launch.run import check
from bm3il.launch.run_folder import is_plain, slug
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.yaml_text import parse_yaml

KEYS = ("name", "settings", "grid", "seeds", "worlds", "episodes", "results", "core_seconds")
OWN = {"seed": "seeds", "run": "name", "runs_folder": "--runs-folder"}
"""Settings that a study has in place of its runs, and how."""
EPISODES = 200
OWN_WORLD = "own"
LONGEST_NAME = 120
Settings = dict[str, Any]
"""By dotted key."""


@dataclass(frozen=True)
class Trial:
    """One run: its folder's name, what distinguishes it, and its whole configuration.

    settings: what the grid says of it.
    """

    name: str
    settings: Settings
    seed: int
    config: Config
    spec: EnvironmentSpec


@dataclass(frozen=True)
class Study:
    """What the file says, in its order.

    grids: of each setting the values that it takes.   results: the file that keeps rows of finished runs.
    core_seconds: that a run takes, about.   source: the file, for errors.
    """

    name: str
    settings: Settings
    grids: tuple[dict[str, list[Any]], ...]
    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    episodes: int
    results: Path | None
    core_seconds: int | None
    source: str

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises InputError for what is no such file, unknown keys (the nearest is named), values of a wrong kind."""
        source = str(path)
        try:
            values = parse_yaml(path.read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the study {source}: {error}") from error
        try:
            return cls._of(values, path, source)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def _of(cls, values: Any, path: Path, source: str) -> Study:
        for key in _mapping("the file", values):
            if key not in KEYS:
                raise unknown_name("key", str(key), KEYS)
        name, episodes = values.get("name", path.stem), values.get("episodes", EPISODES)
        if not isinstance(name, str) or not is_plain(name) or len(name) > LONGEST_NAME:
            raise InputError(f"name must be a plain folder name, got {name!r}")
        if not _is_whole(episodes) or episodes < 1:
            raise InputError(f"episodes must be a whole number, at least 1, got {episodes!r}")
        settings = {"mode": "serial"} | flattened(_mapping("settings", values.get("settings", {})))
        grid = values.get("grid", {})
        grids = [_grid(part) for part in (grid if isinstance(grid, list) else [grid])]
        if not grids:
            raise InputError("grid has no values; leave it out for a single setting")
        for key in (key for part in (settings, *grids) for key in part):
            if key in OWN:
                raise InputError(f"'{key}' is the study's own: say it by {OWN[key]}")
        seeds, worlds = _listed("seeds", values.get("seeds", [0])), _listed("worlds", values.get("worlds", []))
        if not seeds or not all(_is_whole(seed) and seed >= 0 for seed in seeds):
            raise InputError(f"seeds must be a list of whole numbers from 0 on, got {seeds!r}")
        if not all(isinstance(world, str) and world for world in worlds):
            raise InputError(f"worlds must be a list of environments or of their options, got {worlds!r}")
        results, core_seconds = values.get("results"), values.get("core_seconds")
        if results is not None and not (isinstance(results, str) and results.endswith(".json")):
            raise InputError(f"results must be the path of a .json file, from the study's own folder, got {results!r}")
        if core_seconds is not None and not (_is_whole(core_seconds) and core_seconds > 0):
            raise InputError(f"core_seconds must be a whole number, at least 1, got {core_seconds!r}")
        once = tuple(dict.fromkeys(seeds)), tuple(dict.fromkeys(worlds))
        kept = path.parent / results if results else None
        return cls(name, settings, tuple(grids), *once, episodes, kept, core_seconds, source)

    def trials(self, folder: Path) -> list[Trial]:
        """All runs, the first seed of all settings first. Their folders lie in `folder`.

        Raises InputError for what cannot be trained, or judged in one of the worlds.
        """
        points = [dict(zip(grid, values, strict=True)) for grid in self.grids for values in product(*grid.values())]
        points = [point for number, point in enumerate(points) if point not in points[:number]]
        # Once for all seeds: a check makes the environment and reads the demonstrations.
        checked = [self._checked(point) for point in points]
        trials = []
        for seed in self.seeds:
            for point, (config, spec) in zip(points, checked, strict=True):
                name = slug([*_short(point), f"seed={seed}"], LONGEST_NAME)
                own = replace(config, seed=seed, run=name, runs_folder=str(folder))
                trials.append(Trial(name, point, seed, own, spec))
        names = [trial.name for trial in trials]
        if alike := [name for name in names if names.count(name) > 1]:
            raise InputError(
                f"{self.source}: two runs would have the folder {alike[0]}: their settings differ too little"
            )
        return trials

    def _checked(self, point: Settings) -> tuple[Config, EnvironmentSpec]:
        what = f"{self.source}: {', '.join(_words(point))}" if point else self.source
        try:
            config, spec = check(remembered(configured(self.settings | point, "settings")))
            for world in self.worlds:
                there = make_environment(in_world(config.environment, world), 1).spec
                if difference := spec.difference(there, counts=config.tells_agents_apart):
                    raise InputError(f"its policy does not fit the world '{world}': {difference}")
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        return config, spec

    def differences(self, before: Study) -> list[str]:
        """Keys in which it is another study than before, and not only one of more values."""
        keys = {**before.settings, **self.settings}
        changed = [key for key in keys if before.settings.get(key, ...) != self.settings.get(key, ...)]
        nothing: dict[str, list[Any]] = {}
        for old, new in zip_longest(before.grids, self.grids[: len(before.grids)], fillvalue=nothing):
            changed += [key for key in {**old, **new} if key not in old or not _holds(new.get(key, []), old[key])]
        for key in ("seeds", "worlds"):
            changed += [] if _holds(getattr(self, key), getattr(before, key)) else [key]
        return [*changed, "episodes"] if self.episodes != before.episodes else changed


def in_world(environment: str, world: str) -> str:
    """The environment in which a run of `environment` is judged: the world, or, if it is options alone, the run's own
    with these in place of its own of the same names, or, if it is `own`, the run's."""
    if world == OWN_WORLD:
        return environment
    if "=" not in world.partition("?")[0]:
        return world
    path, _, own = environment.partition("?")
    options = {part.partition("=")[0]: part for part in (*own.split("&"), *world.split("&")) if part}
    return f"{path}?{'&'.join(options.values())}"


def _holds(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return all(value in now for value in before)


def _mapping(what: str, values: Any) -> Mapping[Any, Any]:
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must hold keys and values, got {values!r}")
    return values


def _listed(what: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise InputError(f"{what} must be a list, got {values!r}")
    return values


def _grid(values: Any) -> dict[str, list[Any]]:
    grid = flattened(_mapping("grid", values))
    for key, of_key in grid.items():
        if not _listed(f"grid: {key}", of_key):
            raise InputError(f"grid: {key} has no values")
    return grid


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _words(settings: Settings) -> list[str]:
    return [f"{key}={text_of(value)}" for key, value in settings.items()]


def _short(settings: Settings) -> list[str]:
    """For the name of a run: `bm3il`, `batch_size=256`."""
    keys = {key: key.rpartition(".")[2] for key in settings}
    return [value if isinstance(value, str) else f"{keys[key]}={text_of(value)}" for key, value in settings.items()]


def text_of(value: Any) -> str:
    """A setting's value in words: `64,64`."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(text_of, value)) if isinstance(value, (list, tuple)) else str(value)
