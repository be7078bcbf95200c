"""The file of demonstrations: one safetensors file, untrusted until it is checked, and mapped where it is not packed.

Metadata of the file: `format` and `version`, and `header`, JSON with the environment's spec, the origin in words, the
counts of episodes and rows, and the mean return with its standard error (true return per agent and episode).

Tensors of version 2, for the block number b of the spec; a row is one joint step, episodes follow without a gap:

- `b.own`, `b.uint8`, `b.int16`, `b.codes`, `b.shared`, `b.masks`: the columns of `protocol.observations` that there
  are, [rows] in front, seen before the action; masks that are all true are left out.
- `b.actions` [rows, N_b] integers, or [rows, N_b, A_b] float32 if continuous.
- `b.active` [rows, N_b] bool; left out if all are true.
- `NAME.xz` [bytes] uint8 in place of a tensor NAME that xz makes much smaller: the bytes of the array.
- `episode_lengths` [episodes] int64, `returns` [episodes, N] float32 (NaN where unknown), `groups` [episodes] int64.
- `starts.<name>` [episodes, …]: start states, as `Environment.reset` takes them.

Version 1, which is still read, knew nothing of columns: for the type number m of the spec `m.observations`
[rows, X_m, O_m] float32, `m.action_masks` [rows, X_m, A_m] and `m.active` [rows, X_m] bool, and `m.actions`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.packing import MAX_UNPACKED_BYTES, PACKED, Tensors, packed
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec

FORMAT, VERSION, VERSIONS = "bm3il-demonstrations", "2", ("1", "2")
START_NAME = re.compile(r"starts\.[a-z][a-z0-9_]{0,63}")
INTEGERS = ("I8", "U8", "I16", "I32", "I64")
NUMBERS = (*INTEGERS, "F32", "F64", "BOOL")
PER_EPISODE = ("episode_lengths", "returns", "groups")


@dataclass(frozen=True)
class Contents:
    """What a file holds, named as in `Demonstrations`; counts: episodes and rows, as its header says."""

    spec: EnvironmentSpec
    origin: str
    arrays: dict[str, np.ndarray]
    episode_lengths: np.ndarray
    returns: np.ndarray
    groups: np.ndarray
    starts: dict[str, np.ndarray]
    counts: dict[str, Any]


def write(path: str | Path, contents: Contents, figures: Mapping[str, Any]) -> None:
    """Write the file under a temporary name, then rename it: nobody ever sees a part of it.

    figures: for people, into the header. Raises InputError if the folder is not writable or full; nothing is left
    behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    header = {"spec": contents.spec.to_json(), "origin": contents.origin, **contents.counts, **figures}
    metadata = {"format": FORMAT, "version": VERSION, "header": json.dumps(header, sort_keys=True)}
    try:
        with open(temporary, "wb") as file:
            file.writelines(_in_order(serialise(_tensors(contents), metadata)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write the demonstrations {path}: {error}") from error


def read(path: str | Path) -> Contents:
    """Map a file into memory. It must not change while it is in use; values are not checked here.

    Raises InputError, naming the file and what is wrong, for tensors that are not as described above.
    """
    try:
        # By torch, whose tensors stay mapped to the file; as numpy's arrays they would be copied into memory.
        with safe_open(path, framework="pt") as file:
            return _contents(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _foreign(path, error) from error


def _foreign(path: str | Path, error: Exception) -> InputError:
    how = "a table, or arrays, `bm3il demonstrations import` makes into one"
    return InputError(f"{path}: expected a safetensors file of demonstrations: {error}; {how}")


def count_rows(path: str | Path) -> tuple[int, int]:
    """Episodes and rows of a file, without looking at any of these. Raises InputError as `read` does."""
    try:
        with safe_open(path, framework="pt") as file:
            lengths = Tensors(file).read("episode_lengths", "I64")
    except (OSError, SafetensorError, ValueError) as error:
        raise _foreign(path, error) from error
    return len(lengths), int(lengths.sum())


def _in_order(serialised: bytes) -> tuple[bytes, memoryview]:
    """The head of a safetensors file with its metadata by name, and the rest.

    The library writes metadata in an order that changes from call to call. Runs know recordings by the hash of their
    file, so the same recording must be the same bytes. (The head: its size as 8 bytes, then JSON, padded with spaces.)
    """
    end = 8 + int.from_bytes(serialised[:8], "little")
    head = json.loads(serialised[8:end])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight, so that they can be mapped
    return len(text).to_bytes(8, "little") + text, memoryview(serialised)[end:]


def _tensors(contents: Contents) -> dict[str, np.ndarray]:
    tensors = {name: getattr(contents, name) for name in PER_EPISODE}
    tensors |= {f"starts.{name}": array for name, array in contents.starts.items()}
    for name, array in contents.arrays.items():
        if name.endswith((".masks", ".active")) and array.all():
            continue
        compressed = None if name.endswith((".actions", ".active")) else packed(array)
        tensors[name if compressed is None else name + PACKED] = array if compressed is None else compressed
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _contents(file: Any) -> Contents:
    version, header = _header(file.metadata() or {})
    spec = EnvironmentSpec.from_json(header.get("spec"))
    tensors = Tensors(file)
    starts = sorted(name for name in tensors.names if START_NAME.fullmatch(name))
    found = [name.removesuffix(PACKED) for name in tensors.names - set(starts)]
    lengths = tensors.read("episode_lengths", "I64") if "episode_lengths" in tensors.names else np.zeros(0, np.int64)
    # Clipped: nobody has checked them yet, and a negative sum, or one that wraps around, is no shape.
    rows = int(lengths.clip(0, MAX_UNPACKED_BYTES).sum())
    arrays = _columns(tensors, found, spec, rows) if version == VERSION else _columns_1(tensors, found, spec, rows)
    return Contents(
        spec=spec,
        origin=str(header.get("origin", "")),
        arrays=arrays,
        episode_lengths=lengths,
        returns=tensors.read("returns", "F32"),
        groups=tensors.read("groups", "I64"),
        starts={name.removeprefix("starts."): tensors.read(name, *NUMBERS) for name in starts},
        counts={key: header.get(key) for key in ("episodes", "rows")},
    )


def _columns(tensors: Tensors, found: Sequence[str], spec: EnvironmentSpec, rows: int) -> dict[str, np.ndarray]:
    tables: list[ArrayTable] = [form.table_of(rows) for form in forms(spec)]
    expected = {f"{b}.{name}": entry for b, table in enumerate(tables) for name, entry in table.items()}
    expected |= {f"{b}.active": ("bool", (rows, form.agents)) for b, form in enumerate(forms(spec))}
    actions = {f"{b}.actions" for b in range(len(tables))}
    optional = {name for name in expected if name.endswith((".masks", ".active"))}
    _check_names(found, {*PER_EPISODE, *(set(expected) - optional), *actions}, optional)
    return {name: tensors.unpack(name, dtype, shape) for name, (dtype, shape) in expected.items()} | {
        name: tensors.read(name, *(INTEGERS if _discrete(spec, name) else ("F32",))) for name in actions
    }


def _columns_1(tensors: Tensors, found: Sequence[str], spec: EnvironmentSpec, rows: int) -> dict[str, np.ndarray]:
    names = {"own": "observations", "actions": "actions", "masks": "action_masks", "active": "active"}
    types = range(spec.num_types)
    required = {f"{m}.{names[name]}" for m in types for name in ("own", "actions")}
    _check_names(
        found, {*PER_EPISODE, *required}, {f"{m}.{names[name]}" for m in types for name in ("masks", "active")}
    )
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for m, t in enumerate(spec.types):
        shapes = {"own": (t.observation_dim,), "masks": (t.action_dim,), "active": ()}
        for name, width in shapes.items():
            shape, dtype = (rows, t.count, *width), "float32" if name == "own" else "bool"
            columns[name].append(tensors.unpack(f"{m}.{names[name]}", dtype, shape))
        columns["actions"].append(tensors.read(f"{m}.actions", *(INTEGERS if t.discrete else ("F32",))))
    arrays: dict[str, np.ndarray] = {}
    for b, block in enumerate(spec.blocks):
        for name, per_type in columns.items():
            parts = [per_type[m] for m in block]
            arrays[f"{b}.{name}"] = _side_by_side(f"{names[name]} of '{spec.types[block[0]].name}'", parts)
    return arrays


def _side_by_side(what: str, parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    if any(part.ndim < 2 or len(part) != len(parts[0]) for part in parts):
        raise InputError(f"{what} and types like it: expected [rows, agents, …], found {[p.shape for p in parts]}")
    return np.concatenate(parts, axis=1)


def _discrete(spec: EnvironmentSpec, name: str) -> bool:
    return spec.types[spec.blocks[int(name.partition(".")[0])][0]].discrete


def _header(metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"expected format '{FORMAT}', found {metadata.get('format')!r}; convert it with "
            "`bm3il demonstrations import`"
        )
    version = metadata.get("version", "")
    if version not in VERSIONS:
        raise InputError(f"expected version {' or '.join(VERSIONS)} of the format, found {version!r}")
    try:
        header = json.loads(metadata.get("header", ""))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"expected a header of names and values, found {type(header).__name__}")
    return version, header


def _check_names(found: Sequence[str], required: set[str], optional: set[str]) -> None:
    names = set(found)
    if missing := sorted(required - names):
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    if extra := sorted(names - required - optional):
        raise InputError(f"unexpected tensors: {', '.join(extra[:5])}")
    if len(names) < len(found):
        raise InputError("a tensor is there twice, packed and unpacked")
