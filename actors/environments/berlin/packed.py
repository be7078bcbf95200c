"""Files as they are, or packed with gzip or zstd: their first bytes tell, and not their names."""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bm3il.protocol.errors import InputError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MAX_UNPACKED_BYTES = 1 << 31
"""Packed, as such files are, anything can be a few kilobytes."""


@contextmanager
def unpacked(path: Path, most_bytes: int = MAX_UNPACKED_BYTES) -> Iterator[BinaryIO]:
    """The bytes of a file. Raises InputError, naming it, at the start or at any read within the block: for a file that
    cannot be read, is damaged, unpacks to more than `most_bytes`, or needs a library that is missing."""
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        with path.open("rb") as file:
            source: Any = file
            start = file.peek(len(ZSTD))
            if start.startswith(GZIP):
                source = gzip.GzipFile(fileobj=file)
            elif start.startswith(ZSTD):
                zstd = _zstd(path)
                damage = (*damage, zstd.ZstdError)
                source = zstd.open(file, "rb")
            yield io.BufferedReader(_Limited(source, path, most_bytes))
    except damage as error:
        # Before OSError: gzip.BadGzipFile is one, and means a damaged file, not one that cannot be read.
        raise InputError(f"{path} is damaged and cannot be unpacked: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


class _Limited(io.RawIOBase):
    """A file that refuses to unpack to more than can be meant."""

    def __init__(self, file: Any, path: Path, most_bytes: int) -> None:
        self._file, self._path, self._most, self._bytes = file, path, most_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._bytes += len(data)
        if self._bytes > self._most:
            raise InputError(f"{self._path} unpacks to more than {self._most} bytes")
        buffer[: len(data)] = data
        return len(data)


def _zstd(path: Path) -> Any:
    """Python's own module (from 3.14 on), or the package; both have `open` and `ZstdError`."""
    for module in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise InputError(f"{path} is packed with zstd, which this Python does not read: pip install 'bm3il[zstd]'")
