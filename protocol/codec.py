"""Messages on the wire.

One message is one ZeroMQ multipart message: frame 0 is the msgpack header

    {"v": protocol version, "kind": str, "run": str, "sender": str, "incarnation": str, "seq": int, "settled": int,
     "body": {field: value}, "arrays": [[name, dtype, [shape]], ...]}

and one raw, C-contiguous, little-endian frame follows per array. `seq` numbers the requests of a client from 1; an
answer has the number of its request. All requests of its sender below `settled` have their answers, or are given up.

Nothing is ever unpickled. `decode` checks header and array table against limits, and the receiver's schema, before it
looks at a frame; arrays are views of the frames.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any, get_type_hints

import msgpack
import numpy as np

from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.messages import BODIES, Arrays, Message, Schema, Sender
from bm3il.protocol.specs import ArrayTable

PROTOCOL_VERSION = 9
MAX_HEADER_BYTES, MAX_ARRAYS, MAX_RANK, MAX_TEXT = 1 << 20, 4096, 8, 8192
"""Of a header, from whomever it is: far above what a run of hundreds of types sends, and parsed within milliseconds."""
MAX_MESSAGE_BYTES = 1 << 31
"""Of all arrays, where the receiver knows no lower limit; most do, from the shapes that they expect."""
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int64", "int32", "int16", "uint8", "bool")}

INCARNATION = re.compile("[0-9a-f]{24}")
_FIELDS = {kind: {f.name: get_type_hints(body)[f.name] for f in fields(body)} for kind, body in BODIES.items()}


def encode(
    sender: Sender, sequence: int, body: Any, arrays: Mapping[str, np.ndarray] | None = None, settled: int = 0
) -> list[Any]:
    """The frames of a message: header bytes, then one buffer per array (not copied if C-contiguous)."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    header = {
        "v": PROTOCOL_VERSION,
        "kind": body.kind,
        "run": sender.run,
        "sender": sender.name,
        "incarnation": sender.incarnation,
        "seq": sequence,
        "settled": settled,
        "body": asdict(body),
        "arrays": [[name, _name(array.dtype), list(array.shape)] for name, array in contiguous.items()],
    }
    return [msgpack.packb(header), *(_buffer(array) for array in contiguous.values())]


def decode(frames: Sequence[Any], run: str, schema: Schema) -> Message:
    """Check and read a message of the run `run`.

    frames: bytes-like. `schema` gives the arrays that must come with the body.
    Raises ProtocolError, whose `cause` is one of `header`, `version`, `foreign`, `kind`, `body`, `array_table`,
    `frame`.
    """
    header = _header(frames)
    if header["run"] != run:
        raise ProtocolError("foreign", f"message of run '{header['run'][:64]}' came to run '{run}'")
    body = _body(header["kind"], header["body"])
    expected = schema(body)
    if expected is None:
        raise ProtocolError("kind", f"messages of kind '{header['kind']}' are not accepted here")
    arrays = _arrays(header["arrays"], frames[1:], expected)
    sender = Sender(run, header["sender"], header["incarnation"])
    return Message(sender, header["seq"], body, arrays, header["settled"])


def table_bytes(table: ArrayTable) -> int:
    """Of all arrays of a table."""
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in table.values())


def frame_limit(*tables: ArrayTable) -> int:
    """Bytes of a frame beyond which a socket that takes headers and these arrays cuts its peer off.

    Twice the largest honest one: who is configured a little differently shall be told so, and not cut off for ever.
    """
    sizes = [table_bytes({"": entry}) for table in tables for entry in table.values()]
    largest = max(MAX_HEADER_BYTES, *sizes, 0)
    return max(largest, min(2 * largest, MAX_MESSAGE_BYTES))


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which numpy makes anew each time


def _buffer(array: np.ndarray) -> memoryview | bytes:
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _header(frames: Sequence[Any]) -> dict[str, Any]:
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError("header", f"expected a header of 1..{MAX_HEADER_BYTES} bytes")
    try:
        header = msgpack.unpackb(
            frames[0], max_str_len=MAX_TEXT, max_array_len=MAX_ARRAYS, max_map_len=MAX_ARRAYS, max_ext_len=0
        )
    except Exception as error:  # msgpack raises ValueError, its own exceptions, and UnicodeDecodeError alike
        raise ProtocolError("header", f"the header is not msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ProtocolError("header", f"expected a map, got {type(header).__name__}")
    # Before all other fields, which may be different ones in another version: its sender shall hear of the version.
    if header.get("v") != PROTOCOL_VERSION:
        raise ProtocolError(
            "version",
            f"this side speaks protocol version {PROTOCOL_VERSION}, the sender {header.get('v')!r}: "
            "install the same release of bm3il on every node",
        )
    expected = {"kind": str, "run": str, "sender": str, "incarnation": str, "seq": int, "settled": int}
    expected |= {"body": dict, "arrays": list}
    for key, kind in expected.items():
        if type(header.get(key)) is not kind:
            raise ProtocolError("header", f"header field '{key}' must be {kind.__name__}")
    if not INCARNATION.fullmatch(header["incarnation"]):
        raise ProtocolError("header", "header field 'incarnation' must be 24 hexadecimal digits")
    return header


def _body(kind: str, values: dict[str, Any]) -> Any:
    if kind not in BODIES:
        raise ProtocolError("kind", f"unknown kind '{kind[:64]}'")
    hints = _FIELDS[kind]
    if values.keys() != hints.keys():
        raise ProtocolError("body", f"'{kind}' has the fields {sorted(hints)}, got {sorted(map(str, values))}")
    for name, value in values.items():
        if not _is(value, hints[name]):
            raise ProtocolError("body", f"field '{name}' of '{kind}' must be {hints[name]}, got {type(value).__name__}")
    return BODIES[kind](**values)


def _is(value: Any, hint: Any) -> bool:
    if hint == dict[str, float]:
        return isinstance(value, dict) and all(type(k) is str and type(v) in (int, float) for k, v in value.items())
    # Not isinstance, to which True is an integer.
    return type(value) in ((int, float) if hint is float else (hint,))


def _arrays(table: list[Any], frames: Sequence[Any], expected: ArrayTable) -> Arrays:
    if len(table) != len(frames):
        raise ProtocolError("frame", f"{len(table)} arrays announced, {len(frames)} frames came")
    arrays: Arrays = {}
    for entry, frame in zip(table, frames, strict=True):
        match entry:
            case [str(name), str(dtype), list(shape)] if (
                len(shape) <= MAX_RANK and dtype in DTYPES and all(type(n) is int for n in shape)
            ):
                pass
            case _:
                raise ProtocolError("array_table", "an entry of the array table is not [name, dtype, shape]")
        if name in arrays or name not in expected:
            raise ProtocolError("array_table", f"array '{name[:64]}' is not expected, or came twice")
        if (dtype, tuple(shape)) != expected[name]:
            raise ProtocolError(
                "array_table", f"array '{name}': expected {expected[name]}, found {(dtype, tuple(shape))}"
            )
        size = DTYPES[dtype].itemsize * math.prod(shape)
        if len(frame) != size:
            raise ProtocolError("frame", f"array '{name}' needs {size} bytes, its frame has {len(frame)}")
        arrays[name] = _view(frame, dtype, shape)
    if len(arrays) != len(expected):
        raise ProtocolError("array_table", f"array '{min(set(expected) - set(arrays))}' is missing")
    return arrays


def _view(frame: Any, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype == "bool":
        raw = np.frombuffer(frame, np.uint8)
        if raw.size and raw.max() > 1:
            raise ProtocolError("frame", "a boolean array holds bytes other than 0 and 1")
        return raw.view(np.bool_).reshape(shape)
    return np.frombuffer(frame, DTYPES[dtype]).reshape(shape)
