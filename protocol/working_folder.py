"""The working folder as the last place where modules are looked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def look_there_last() -> None:
    """Environments that lie in the working folder are found, and hide nothing that is installed, with `pip install -e`
    or without. Nothing changes where Python looks there anyway, as in a notebook."""
    with suppress(OSError):  # the working folder was deleted
        folder = os.getcwd()
        if {"", folder} & set(sys.path[:-1]) or sys.path[-1:] == [""]:
            return
        if folder not in sys.path:
            sys.path.append(folder)
        if not any(isinstance(finder, _Editable) for finder in sys.meta_path):
            sys.meta_path.insert(sys.meta_path.index(PathFinder), _Editable(folder))


class _Editable:
    """Finds what `pip install -e` links to, where the working folder has a module of the same name: pip's finders are
    asked after the whole of `sys.path`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or PathFinder.find_spec(name, [self._folder]) is None:
            return None
        if PathFinder.find_spec(name, [place for place in sys.path if place != self._folder]) is not None:
            return None
        later = sys.meta_path[sys.meta_path.index(PathFinder) + 1 :]
        specs = (finder.find_spec(name, None, target) for finder in later)
        return next((spec for spec in specs if spec is not None), None)
