"""What adapters have in common: arguments of somebody else's environment, the types of its agents, and its errors."""

from __future__ import annotations

import json
import re
from typing import Any

from bm3il.protocol.errors import InputError


def value_of(text: str) -> Any:
    """What JSON makes of it; text without quotes is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def arguments_of(text: str) -> dict[str, Any]:
    """`NAME:VALUE,…` → the value of each name. Raises InputError for a part without a colon."""
    options = {}
    for part in filter(None, text.split(",")):
        name, colon, value = part.partition(":")
        if not colon:
            raise InputError(f"arguments: expected NAME:VALUE, got '{part}'")
        options[name] = value_of(value)
    return options


def agents_by_type(names: list[Any], types: str) -> dict[str, list[Any]]:
    """Type → its agents, in the order of the environment or of the table `agent_0+agent_1,adversary_0`.

    Without a table agents whose names differ by a trailing number are of one type; they may be named by numbers.
    Raises InputError for a table that does not name each agent once.
    """
    if not types:
        groups: dict[str, list[Any]] = {}
        for name in names:
            groups.setdefault(re.sub(r"[_ ]?\d+$", "", str(name)) or "agent", []).append(name)
        return groups
    called = {str(name): name for name in names}
    table = [part.split("+") for part in types.split(",")]
    listed = [name for group in table for name in group]
    if sorted(listed) != sorted(called):
        raise InputError(f"types must name each agent once ({', '.join(called)}), got {', '.join(listed)}")
    kinds = [f"type{m}" if len(group) > 1 else group[0] for m, group in enumerate(table)]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise InputError(
            f"types: the agent '{twice[0]}' is called like a type of several agents; list it at another place"
        )
    return {kind: [called[name] for name in group] for kind, group in zip(kinds, table, strict=True)}


def one_line(error: BaseException) -> str:
    """What somebody else's code has raised, to be told in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
