from __future__ import annotations

import gzip
import importlib
import sys
from pathlib import Path

import pytest

from bm3il.actors.environments.berlin.packed import unpacked
from bm3il.protocol.errors import InputError

TEXT = b"\n".join(b"line %d of a file that is packed" % number for number in range(5000))


def packed(text: bytes) -> bytes:
    return bytes(importlib.import_module("zstandard").ZstdCompressor().compress(text))


def torn(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(40) + content[middle + 40 :]


def read(path: Path, most_bytes: int = 1 << 20) -> bytes:
    with unpacked(path, most_bytes) as file:
        return file.read()


@pytest.mark.parametrize("name", ["a.xml", "a.xml.gz", "a.xml.zst"])
def test_first_bytes_tell_how_a_file_is_packed_and_not_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (TEXT, gzip.compress(TEXT), packed(TEXT), b""):
        path.write_bytes(content)
        assert read(path) == (TEXT if content else b"")


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    whole = gzip.compress(TEXT)
    for content in (whole[:3], whole[:-200], torn(whole), torn(packed(TEXT))):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.gz is damaged and cannot be unpacked: \S"):
            read(path)
    with pytest.raises(InputError, match=r"cannot read \S*nothing: No such file"):
        read(tmp_path / "nothing")


def test_what_unpacks_to_more_than_can_be_meant_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    for content in (gzip.compress(TEXT), packed(TEXT), TEXT):
        path.write_bytes(content)
        with pytest.raises(InputError, match="bomb unpacks to more than 1000 bytes"):
            read(path, 1000)


def test_without_a_reader_of_zstd_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xml.zst").write_bytes(packed(TEXT))
    for module in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"a\.xml\.zst is packed with zstd.*pip install 'bm3il\[zstd\]'"):
        read(tmp_path / "a.xml.zst")
