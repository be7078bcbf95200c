"""Arrays that compress well, as they are stored in a file: one-hot observations and masks shrink a hundredfold."""

from __future__ import annotations

import lzma
import math

import numpy as np

from protocol.errors import InputError

PACKED = ".xz"
PACKED_FROM_BYTES, PACKED_RATIO = 1 << 20, 4
"""Arrays of this size are packed if that makes them so many times smaller: one that is not is read without copying."""
MAX_UNPACKED_BYTES = 1 << 34
XZ_MEMORY_BYTES = 1 << 26


def packed(array: np.ndarray) -> np.ndarray | None:
    """The array's bytes in xz, or None if that is not worth it."""
    if array.nbytes < PACKED_FROM_BYTES:
        return None
    small = lzma.compress(np.ascontiguousarray(array).tobytes(), preset=1)
    return np.frombuffer(small, np.uint8) if len(small) * PACKED_RATIO <= array.nbytes else None


def unpacked(name: str, small: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `packed`, for untrusted bytes; never more memory than the shape needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > MAX_UNPACKED_BYTES:
        raise InputError(f"tensor '{name}': {size} bytes when unpacked, more than the {MAX_UNPACKED_BYTES} allowed")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
    try:
        data = decompressor.decompress(small.tobytes(), max_length=size)
    except lzma.LZMAError as error:
        raise InputError(f"tensor '{name}': expected xz: {error}") from error
    if len(data) != size:
        raise InputError(f"tensor '{name}': expected {size} bytes when unpacked, found {len(data)}")
    if dtype is bool and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise InputError(f"tensor '{name}': expected bytes of 0 and 1")
    return np.frombuffer(bytearray(data), dtype).reshape(shape)
