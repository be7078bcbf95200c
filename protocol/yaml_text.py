"""YAML that people wrote."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.reader import ReaderError

from bm3il.protocol.errors import InputError


def parse_yaml(text: str, source: str, words: bool = False) -> Any:
    """What a text in YAML says. source: the file, for errors.   words: everything stays text.

    Raises InputError, naming source, line and column, for what is no YAML.
    """
    try:
        return yaml.load(text, Loader=yaml.BaseLoader if words else yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not YAML: {_in_one_line(text, error)}") from error
    except RecursionError as error:
        raise InputError(f"{source}: nested too deeply") from error


def _in_one_line(text: str, error: yaml.YAMLError) -> str:
    """Without the lines that PyYAML copies from the text, and the ^ below them."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: {error.reason} (#x{error.character:02x})"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    told = f"{_place(error.problem_mark)}: {error.problem}"
    if error.context and error.context_mark:
        return f"{told}, {error.context} that begins in {_place(error.context_mark)}"
    return told


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
