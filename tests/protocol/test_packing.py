"""Packed arrays, from a file that may hold anything."""

from __future__ import annotations

import numpy as np
import pytest

from bm3il.protocol.errors import InputError
from bm3il.protocol.packing import packed, unpacked

ARRAY = np.zeros((1024, 1024), np.uint8)


def test_what_was_packed_comes_back_and_of_another_size_is_refused() -> None:
    small = packed(ARRAY)
    assert small is not None
    np.testing.assert_array_equal(unpacked("x", small, "uint8", ARRAY.shape), ARRAY)
    with pytest.raises(InputError, match="expected 1000 bytes when unpacked, found more"):
        unpacked("x", small, "uint8", (1000,))
    with pytest.raises(InputError, match="expected 1049600 bytes when unpacked, found 1048576"):
        unpacked("x", small, "uint8", (1025, 1024))
