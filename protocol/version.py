"""Which release this is."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """As it was installed; `unknown` where it runs from a folder that was not."""
    try:
        return metadata.version("bm3il")
    except metadata.PackageNotFoundError:
        return "unknown"
