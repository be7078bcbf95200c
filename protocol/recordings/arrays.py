"""An npz of plain arrays: recordings from whoever has numpy.

For each type `TYPE` of the environment, a row being one joint step, episodes one after the other:

    TYPE.observations   [rows, X_m, O_m]
    TYPE.actions        [rows, X_m] integers, or [rows, X_m, A_m] in −1..1
    TYPE.action_masks   [rows, X_m, A_m] true where an action is allowed; may be left out
    TYPE.active         [rows, X_m] true where the agent takes part; may be left out if all always do
    episode_lengths     [episodes] rows of each
    returns             [episodes, N] true returns of all agents, type by type; may be left out
    groups              [episodes] which of them are not independent (of one start, say); may be left out
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.recordings.recording import Recording
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

MAX_UNPACKED_BYTES = MAX_ROWS = 1 << 34
NO_ARCHIVE = (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, ValueError)
"""What files raise that are no npz, of a version that nobody knows, or damaged; InputError is a ValueError."""


def read_arrays(path: str | Path, spec: EnvironmentSpec) -> Demonstrations:
    """Demonstrations of an environment of this spec.

    Raises InputError if the file is not such an npz, or holds what cannot be meant, with the place.
    """
    with opened(path, "arrays of each type", MAX_UNPACKED_BYTES) as file:
        lengths = _lengths(file)
        rows, episodes = int(lengths.sum()), len(lengths)
        wanted = {f"{t.name}.{name}": shape for t in spec.types for name, shape in _shapes(t, rows).items()}
        wanted |= {"episode_lengths": (episodes,), "returns": (episodes, spec.num_agents), "groups": (episodes,)}
        for name in file:
            if name not in wanted:
                raise unknown_name("array", name, wanted)
        arrays = {name: field(file, name, wanted[name]) for name in wanted if name in file}
        for t in spec.types:
            for name in ("observations", "actions"):
                if f"{t.name}.{name}" not in arrays:
                    raise InputError(f"the array '{t.name}.{name}' is missing")
        recording = _recording(spec, arrays, lengths)
        if (groups := arrays.get("groups")) is not None and groups.dtype.kind not in "iu":
            raise InputError(f"groups: expected integers, found {groups.dtype}")
        origin = f"imported from {Path(path).name}"
        return recording.demonstrations(spec, origin, None if groups is None else groups.astype(np.int64))


@contextmanager
def opened(path: str | Path, what: str, max_unpacked_bytes: int) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz, each read when it is asked for; without pickles.

    Errors within are told with the file. Raises InputError for what is no npz, and for one that unpacks to more bytes.
    """
    try:
        # A small archive can unpack to any size, so the sizes it states are checked before anything is unpacked.
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        if unpacked_bytes > max_unpacked_bytes:
            raise InputError(f"it unpacks to {unpacked_bytes} bytes, more than the {max_unpacked_bytes} allowed")
        with np.load(path, allow_pickle=False) as file:
            yield file
    except NO_ARCHIVE as error:
        raise InputError(f"{path}: expected an npz of {what}: {error}") from error


def field(file: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array of numbers of this shape, if one is given. Raises InputError."""
    if name not in file:
        raise InputError(f"the field '{name}' is missing")
    try:
        array = file[name]
    except Exception as error:  # zipfile, zlib, tokenize and numpy have a dozen kinds for a damaged member
        reason = str(error).partition("\n")[0]  # numpy goes on with how to load it without care
        raise InputError(f"{name} cannot be read: {reason}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: expected an array")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected numbers, found {array.dtype}")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name}: expected {list(shape)}, found {list(array.shape)}")
    return array


def _lengths(file: Mapping[str, np.ndarray]) -> np.ndarray:
    lengths = field(file, "episode_lengths", None)
    first = lengths.ravel()[:5].tolist()
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or lengths.min() < 1:
        raise InputError(f"episode_lengths: expected [episodes] integers from 1 on, found {lengths.dtype} {first}")
    if lengths.sum(dtype=np.float64) > MAX_ROWS:  # a sum of integers could overflow, to the number of rows there are
        raise InputError(f"episode_lengths: expected at most {MAX_ROWS} rows in all, found {first}")
    return lengths.astype(np.int64)


def _shapes(t: TypeSpec, rows: int) -> dict[str, tuple[int, ...]]:
    agents = rows, t.count
    return {
        "observations": (*agents, t.observation_dim),
        "actions": agents if t.discrete else (*agents, t.action_dim),
        "action_masks": (*agents, t.action_dim),
        "active": agents,
    }


def _recording(spec: EnvironmentSpec, arrays: Mapping[str, np.ndarray], lengths: np.ndarray) -> Recording:
    ends = np.cumsum(lengths)

    def place(m: int, row: int, agent: int) -> str:
        episode = int(np.searchsorted(ends, row, side="right"))
        step = row - int(ends[episode] - lengths[episode])
        return f"row {row} (step {step} of episode {episode}), {spec.types[m].name}_{agent}"

    active, actions, masks = [], [], []
    for m, t in enumerate(spec.types):
        chosen, allowed = arrays[f"{t.name}.actions"], arrays.get(f"{t.name}.action_masks")
        everywhere = np.ones((int(lengths.sum()), t.count), bool)
        there = _flags(f"{t.name}.active", arrays.get(f"{t.name}.active", everywhere), everywhere, partial(place, m))
        active.append(there)
        if t.discrete and chosen.dtype.kind not in "iu":
            raise InputError(f"{t.name}.actions: expected integers, found {chosen.dtype}")
        actions.append(chosen)
        name = f"{t.name}.action_masks"
        masks.append(None if allowed is None else _flags(name, allowed, there[..., None], partial(place, m)))

    with np.errstate(over="ignore"):  # what overflows is found to be infinite
        observations = [arrays[f"{t.name}.observations"].astype(np.float32) for t in spec.types]
    return Recording(
        observations=observations,
        actions=actions,
        active=active,
        action_masks=masks,
        episode_lengths=lengths,
        returns=arrays.get("returns", np.full((len(lengths), spec.num_agents), np.nan)),
        place=place,
    )


def _flags(name: str, given: np.ndarray, there: np.ndarray, place: Callable[[int, int], str]) -> np.ndarray:
    """An array as bool. Raises InputError for what is neither 0 nor 1 where `there` is true: a −1, say, may mean
    either."""
    if (wrong := there & (given != 0) & (given != 1)).any():  # NaN is neither
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise InputError(f"{place(at[0], at[1])}: expected 0 or 1 (false or true) in '{name}', got {given[at]}")
    return given.astype(bool)
