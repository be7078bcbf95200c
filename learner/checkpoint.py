"""Checkpoints: one consistent set of arrays of the learner and the reward server, whole or not there at all.

    checkpoints/00000025/learner.safetensors  rewards.safetensors  checkpoint.json

`checkpoint.json` is written last and holds the SHA-256 of the other files; the folder gets its name by a rename after
everything is on the disk. A folder that fails a check is skipped with a warning, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bm3il.protocol.errors import InputError
from bm3il.protocol.packing import packed, unpacked

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
ARRAY_FILES = ("learner", "rewards")
START = f"{0:08d}"
PACKED_COLUMNS = (".own", ".uint8", ".int16", ".masks")
"""What agents saw and might do: much of it stays as it was from step to step. Parameters would only cost time."""


Packing = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


@dataclass(frozen=True)
class Checkpoint:
    """iteration: how many are done. config: the run's config.yaml. facts: plain counters for the run record."""

    iteration: int
    config: str
    facts: dict[str, Any]
    learner: dict[str, np.ndarray]
    rewards: dict[str, np.ndarray]


class CheckpointFolder:
    """The checkpoints of one run; keeps the newest `kept`, and the one marked best: until one is, that of the start."""

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder, self._kept = folder, kept

    def write(self, checkpoint: Checkpoint) -> None:
        """Write atomically, then remove what is too old.

        Raises OSError (with the path) if the disk is full or not writable; earlier checkpoints stay valid.
        """
        final = self._folder / f"{checkpoint.iteration:08d}"
        temporary = self._folder / f".{final.name}.tmp"
        # It may be left of a process that was killed while it wrote.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            digests, packings = {}, {}
            for name in ARRAY_FILES:
                arrays, packings[name] = _packed(getattr(checkpoint, name))
                content = save(arrays)
                digests[name] = hashlib.sha256(content).hexdigest()
                _write(temporary / f"{name}.safetensors", content)
            header = {
                "version": FORMAT_VERSION,
                "iteration": checkpoint.iteration,
                "config": checkpoint.config,
                "facts": checkpoint.facts,
                "sha256": digests,
                "packed": packings,
            }
            _write(temporary / "checkpoint.json", json.dumps(header, indent=1).encode())
            _sync_folder(temporary)  # the files are on the disk, their names in this folder may not be yet
            # An iteration may be written twice: by its interval and by a stop right after it, or again after a rewind.
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            # A rename is on the disk only when the folder is.
            _sync_folder(self._folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune()

    def mark_best(self, iteration: int) -> bool:
        """Keep the checkpoint of this iteration, whose policy had the highest evaluation return so far.

        Returns whether there is such a checkpoint.
        """
        if not (self._folder / f"{iteration:08d}").is_dir():
            return False
        temporary = self._folder / ".best.tmp"
        _write(temporary, f"{iteration:08d}\n".encode())
        temporary.rename(self._folder / "best")
        return True

    def best_iteration(self) -> int:
        """Of the checkpoint that is marked best; until one is, 0."""
        try:
            return int((self._folder / "best").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that passes all checks, or None if there is none at all.

        Raises InputError if there are checkpoints and none of them can be used.
        """
        names = self._names()
        for name in reversed(names):
            try:
                return read_checkpoint(self._folder / name)
            except InputError as error:
                log.warning("skipping a checkpoint: %s", error)
        if names:
            raise InputError(f"no checkpoint in {self._folder} can be used; start the run anew")
        return None

    def first(self) -> Checkpoint | None:
        """The one of the start, before any iteration; None if it is not kept any more, or fails a check."""
        with suppress(InputError):
            return read_checkpoint(self._folder / START)
        return None

    def newest_header(self) -> dict[str, Any] | None:
        """The `checkpoint.json` of the newest checkpoint that has a readable one; None without any."""
        for name in reversed(self._names()):
            with suppress(OSError, ValueError):
                header = json.loads((self._folder / name / "checkpoint.json").read_bytes())
                if isinstance(header, dict) and {"config", "facts"} <= set(header):
                    return header
        return None

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        # Eight digits, so that names are in the order of iterations; what is being written begins with a dot.
        return sorted(path.name for path in self._folder.iterdir() if path.name.isdigit() and path.is_dir())

    def _prune(self) -> None:
        best = self._folder / "best"
        # As long as none is marked, the start is not evaluated yet; a resume hands it out again.
        keep = best.read_text(encoding="utf-8").strip() if best.exists() else START
        for name in self._names()[: -self._kept]:
            if name != keep:
                shutil.rmtree(self._folder / name)


def configuration_differences(checkpoint: str, run: str) -> str:
    """The first settings, in words, in which the texts of two configurations differ; empty if none that matters does.

    A budget of steps may be another. A setting that only one of them knows is one of another release, whose default
    is what was done before there was the setting.
    """
    theirs, ours = (dict(_settings(yaml.safe_load(text))) for text in (checkpoint, run))
    changed = [key for key, value in theirs.items() if key in ours and ours[key] != value and key != "steps"]
    return "; ".join(f"{key}: {theirs[key]} then, {ours[key]} now" for key in changed[:3])


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _settings(item, f"{path}.{key}" if path else str(key))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check one checkpoint. Raises InputError, naming the file and what is wrong with it."""
    try:
        header = json.loads((folder / "checkpoint.json").read_bytes())
        if header["version"] != FORMAT_VERSION:
            raise InputError(f"{folder}: written in format {header['version']}, this release reads {FORMAT_VERSION}")
        arrays = {}
        for name in ARRAY_FILES:
            content = (folder / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(content).hexdigest() != header["sha256"][name]:
                raise InputError(f"{folder / name}.safetensors is truncated or corrupt (its SHA-256 differs)")
            arrays[name] = _unpacked(load(content), header["packed"][name])
        return Checkpoint(int(header["iteration"]), str(header["config"]), dict(header["facts"]), **arrays)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        # It is a ValueError, too, and names the file already.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} is not a usable checkpoint: {error}") from error


def _packed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Packing]]:
    """The arrays, some of them packed, and the dtypes and shapes of these."""
    stored = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    packings: dict[str, Packing] = {}
    for name, array in stored.items():
        if name.endswith(PACKED_COLUMNS) and (small := packed(array)) is not None:
            stored[name], packings[name] = small, (str(array.dtype), array.shape)
    return stored, packings


def _unpacked(stored: dict[str, np.ndarray], packings: Mapping[str, Packing]) -> dict[str, np.ndarray]:
    """The inverse of `_packed`. Raises InputError, TypeError or ValueError for what it would not have written."""
    found = {name: unpacked(name, stored[name], dtype, tuple(shape)) for name, (dtype, shape) in packings.items()}
    return stored | found


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
