"""`bm3il demonstrations`: record, import, inspect."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from bm3il.actors.experts import recording
from bm3il.actors.experts.importers import DAY, import_day, import_rover_tower
from bm3il.actors.experts.scripted import expert_for
from bm3il.actors.simulator import Simulator
from bm3il.launch.inspection import print_types
from bm3il.launch.learned.trained import load_trained
from bm3il.launch.surroundings import screen
from bm3il.protocol.adapters.sumo import Sumo
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.likeness import unlike
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.recordings.arrays import MAX_UNPACKED_BYTES, opened, read_arrays
from bm3il.protocol.recordings.long_table import read_table
from bm3il.protocol.recordings.minari import is_minari, read_minari
from bm3il.protocol.recordings.table import SUFFIXES
from bm3il.protocol.registry import copies_at_once, make_environment

ENVIRONMENTS_AT_ONCE = 100
ROUTES = (".xml", ".xml.gz")
"""How files of SUMO end."""


def _copies_for(environment: str, episodes: int) -> int:
    return copies_at_once(environment, max(1, min(episodes, ENVIRONMENTS_AT_ONCE)))


def record(environment: str, episodes: int, seed: int, output: Path) -> int:
    """Let the scripted expert of an environment play, and save what it did. Raises InputError."""
    # First, as everywhere below: playing may take long, and its result would be lost.
    _refuse_existing(output)
    played = make_environment(environment, _copies_for(environment, episodes))
    origin = f"scripted expert of {environment}, seed {seed}"
    return _save(recording.record(played, expert_for(played.spec), episodes, seed, origin), output)


def record_run(run: Path, best: bool, greedy: bool, episodes: int, seed: int, output: Path) -> int:
    """Let the policy of a run play in the run's environment, and save what it did. Raises InputError."""
    _refuse_existing(output)
    trained = load_trained(run, best)
    name = trained.config.environment
    played = make_environment(name, _copies_for(name, episodes))
    how = f"{trained.config.algorithm}, iteration {trained.checkpoint.iteration}, {'greedy' if greedy else 'drawn'}"
    origin = f"policy of run {run.name} ({how}) in {name}, seed {seed}"
    return _save(recording.record(played, trained.policy, episodes, seed, origin, greedy), output)


def import_files(files: Sequence[str], environment: str, mapping: Path | None, output: Path) -> int:
    """Convert what somebody else recorded: a table, an npz, a data set of Minari (docs/recordings.md), or files of
    SUMO's routes, an episode each (docs/sumo.md).

    environment: in which it was recorded; it may be left out for an npz of the paper authors' Rover Tower experts.
    Raises InputError.
    """
    _refuse_existing(output)
    file, *others = files
    path = Path(file)
    if mapping is not None and path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--mapping names the columns of a table ({', '.join(SUFFIXES)}), and {file} is none")
    if others and not all(name.endswith(ROUTES) for name in files):
        raise InputError(f"expected one file, or routes of SUMO ({', '.join(ROUTES)}), got {', '.join(files)}")
    if not environment:
        if path.suffix != ".npz":
            raise InputError(f"{file}: name the environment it was recorded in with --environment")
        return _save(import_rover_tower(path), output)
    notes: list[str] = []
    if file.endswith(ROUTES):
        demonstrations, notes = _import_routes([Path(name) for name in files], environment)
    elif is_minari(file):
        demonstrations = read_minari(file, make_environment(environment, 1).spec)
    elif path.suffix.lower() in SUFFIXES:
        demonstrations, notes = read_table(path, make_environment(environment, 1), mapping)
    elif path.suffix == ".npz":
        demonstrations, notes = _import_npz(path, environment)
    else:
        known = ", ".join((*SUFFIXES, ".npz", ROUTES[0]))
        raise InputError(f"{file}: expected a file that ends with {known}, or a data set of Minari, as minari:ID")
    for note in [*notes, *hints(demonstrations, environment)]:
        print(note)
    return _save(demonstrations, output)


def hints(demonstrations: Demonstrations, environment: str) -> list[str]:
    """How they differ from what the environment shows; nothing where it cannot be played, which is not our business."""
    with suppress(SimulatorError), closing(Simulator(environment, 1)) as played:
        return [f"hint: {text}" for text in unlike(demonstrations, played, steps=True)]
    return []


def _import_npz(path: Path, environment: str) -> tuple[Demonstrations, list[str]]:
    """Of arrays of each type, or of a day in the town of the environment."""
    with opened(path, "recordings", MAX_UNPACKED_BYTES) as file:
        is_day = DAY in file
    if is_day:
        return import_day(path, environment)
    return read_arrays(path, make_environment(environment, 1).spec), []


def _import_routes(files: Sequence[Path], environment: str) -> tuple[Demonstrations, list[str]]:
    """Of vehicles that take recorded ways through a network of SUMO's once more."""
    network = unperturbed(make_environment(environment, 1))
    if not isinstance(network, Sumo):
        raise InputError(f"{files[0]}: routes are driven in a network of SUMO, sumo:town.net.xml, got '{environment}'")
    again = network.drives_again(files)
    origin = f"driven again from {files[0].name}" + (f" to {files[-1].name}" if len(files) > 1 else "")
    demonstrations = recording.record(again, again, len(files), 0, origin)
    notes = [f"turns that are no action (a turn around, say), left out: {again.left_out}"] if again.left_out else []
    return demonstrations, notes


def clean(file: Path, output: Path) -> int:
    """Copy a file, with agents inactive where they do what their masks forbid. Raises InputError."""
    _refuse_existing(output)
    demonstrations = Demonstrations.load(file, ignore_forbidden=True)
    left_out = sum(int((~active).sum()) for active in demonstrations.active)
    print(f"{left_out} actions are of inactive agents now")
    return _save(demonstrations, output)


def inspect(name: str) -> int:
    """Print what a file holds. Raises InputError if it is not a valid one."""
    path = resolve(name)
    demonstrations = Demonstrations.load(path)
    _print(demonstrations, path)
    print_types(demonstrations)
    return 0


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise InputError(f"{output} exists; remove it, or take another --output")


def _save(demonstrations: Demonstrations, output: Path) -> int:
    try:
        demonstrations.save(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    _print(demonstrations, output)
    return 0


def _print(demonstrations: Demonstrations, path: Path) -> None:
    console = screen()
    lengths = demonstrations.episode_lengths
    rows = [
        ("file", str(path)),
        ("environment", demonstrations.spec.name),
        ("origin", demonstrations.origin),
        ("episodes", f"{demonstrations.num_episodes}, from {len(np.unique(demonstrations.groups))} independent starts"),
        ("joint steps", f"{demonstrations.num_rows} ({lengths.min()}–{lengths.max()} an episode)"),
        ("return", _return(demonstrations)),
        ("start states", ", ".join(demonstrations.starts) or "not recorded"),
    ]
    for name, value in rows:
        console.print(f"{name:<14}{value}", markup=False, soft_wrap=True)
    table = Table("type", "agents", "observation width", "actions", "return")
    for m, t in enumerate(demonstrations.spec.types):
        actions = f"{t.action_dim} discrete" if t.discrete else f"{t.action_dim} continuous"
        returns = demonstrations.returns[:, demonstrations.spec.agents(m)]
        known = returns[np.isfinite(returns).all(axis=1)]
        mean = f"{known.mean(dtype=np.float64):.1f}" if known.size else "unknown"
        table.add_row(Text(t.name), str(t.count), str(t.observation_dim), actions, mean)
    console.print(table)


def _return(demonstrations: Demonstrations) -> str:
    if demonstrations.return_mean is None:
        return "unknown"
    stderr = demonstrations.return_stderr
    error = "" if stderr is None else f" ± {stderr:.1f}"
    return f"{demonstrations.return_mean:.1f}{error} per agent and episode (standard error over starts)"
