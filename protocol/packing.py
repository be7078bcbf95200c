"""Arrays that compress well, as they are stored in a file: masks, and what stays as it was, shrink a hundredfold."""

from __future__ import annotations

import lzma
import math
from typing import Any

import numpy as np

from bm3il.protocol.errors import InputError

PACKED = ".xz"
PACKED_FROM_BYTES, PACKED_RATIO = 1 << 20, 4
"""Arrays of this size are packed if that makes them so many times smaller: one that is not is read without copying."""
MAX_UNPACKED_BYTES, XZ_MEMORY_BYTES = 1 << 34, 1 << 26
"""A file of a few bytes can ask for any amount of either: above what is written here, and below what ends a machine."""
IN_FILE = {"float32": "F32", "bool": "BOOL", "uint8": "U8", "int16": "I16", "int32": "I32"}
"""What safetensors calls the dtypes of columns."""


def packed(array: np.ndarray) -> np.ndarray | None:
    """The array's bytes in xz, or None if that is not worth it."""
    if array.nbytes < PACKED_FROM_BYTES:
        return None
    small = lzma.compress(np.ascontiguousarray(array).tobytes(), preset=1)
    return np.frombuffer(small, np.uint8) if len(small) * PACKED_RATIO <= array.nbytes else None


def unpacked(name: str, small: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `packed`, for untrusted bytes; never more memory than the shape needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MAX_UNPACKED_BYTES:
        raise InputError(f"tensor '{name}': {size} bytes when unpacked, more than the {MAX_UNPACKED_BYTES} allowed")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
    try:
        data = decompressor.decompress(small.tobytes(), max_length=size)
    except lzma.LZMAError as error:
        raise InputError(f"tensor '{name}': expected xz: {error}") from error
    if not decompressor.eof and len(data) == size:
        raise InputError(f"tensor '{name}': expected {size} bytes when unpacked, found more")
    if len(data) != size:
        raise InputError(f"tensor '{name}': expected {size} bytes when unpacked, found {len(data)}")
    if dtype == "bool" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise InputError(f"tensor '{name}': expected bytes of 0 and 1")
    # A bytearray: of bytes the array would be read-only, and torch would want a copy of it.
    return np.frombuffer(bytearray(data), dtype).reshape(shape)


class Tensors:
    """The tensors of an open safetensors file, untrusted: dtypes are checked, packed ones are unpacked."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names = set(file.keys())

    def read(self, name: str, *dtypes: str) -> np.ndarray:
        """A tensor as it lies in the file. Raises InputError for another dtype."""
        found = self._file.get_slice(name).get_dtype()
        if found not in dtypes:
            raise InputError(f"tensor '{name}': expected {' or '.join(dtypes)}, found {found}")
        return self._file.get_tensor(name).numpy()

    def unpack(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor that may be packed, or, if it is bool, left out where all of it is true. Raises InputError.

        Only a packed one is held to the shape here.
        """
        if name + PACKED in self.names:
            return unpacked(name, self.read(name + PACKED, "U8"), dtype, shape)
        if name not in self.names and dtype == "bool":
            # No memory until it is copied: the width may be a lie, which only the comparison with an environment shows.
            return np.broadcast_to(np.ones((), bool), shape)
        return self.read(name, IN_FILE[dtype])
