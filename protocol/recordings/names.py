"""What somebody else's table calls things: the mapping file, in YAML.

columns:                                      # ours: the table's
  episode: day
  agent: vehicle
  action: turn
  position: [x, y]                            # `position.0` and `position.1`
  observation: {taxi: [x, y, v], bus: [x, y]} # of each type its own
types: {cab: taxi}                            # the table's: ours
agents: {B-XY 12: taxi_0}
actions: {wait: 0, left: 1, right: 2}         # or of each type: {taxi: {wait: 0}, bus: {stay: 0}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.recordings.columns import (
    ACTION,
    ACTIVE,
    AGENT,
    EPISODE,
    MASK,
    NUMBER,
    OBSERVATION,
    RETURN,
    REWARD,
    STEP,
    TYPE,
    action_columns,
    mask_columns,
    observation_columns,
    part_columns,
    part_name,
    plain_columns,
)
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.yaml_text import parse_yaml

SECTIONS = ("columns", "types", "agents", "actions")
KEYS = (EPISODE, STEP, AGENT, TYPE, NUMBER)
"""Columns that say whose row it is: they are the same for all types."""


@dataclass(frozen=True)
class Names:
    """Of a table, where they are not ours.

    columns: (type, our name) → the table's.   agents: the table's name → type number and number of the agent.
    types: the table's name → type number.   actions: type number → word → action.
    """

    columns: Mapping[tuple[str, str], str]
    types: Mapping[str, int]
    agents: Mapping[str, tuple[int, int]]
    actions: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, spec: EnvironmentSpec) -> Names:
        """Of a mapping file; None: all is called as we call it.

        Raises InputError, naming the file, for what is no mapping, and for names that the environment does not have.
        """
        sections = {} if path is None else _sections(path)
        try:
            types = {t.name: m for m, t in enumerate(spec.types)}
            words = {theirs: _known("type", ours, types) for theirs, ours in _texts("types", sections)}
            types |= words
            agents = {f"{name}_{x}": (m, x) for name, m in types.items() for x in range(spec.types[m].count)}
            agents |= {name: (m, 0) for name, m in types.items() if spec.types[m].count == 1}
            agents |= {theirs: _known("agent", ours, agents) for theirs, ours in _texts("agents", sections)}
            return cls(_columns(sections, spec), types, agents, _actions(sections, spec))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def column(self, name: str, kind: TypeSpec | None = None) -> str:
        """What the table calls this column of ours, in the rows of agents of this type."""
        return self.columns.get((kind.name if kind else "", name), name)


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        # Everything stays text: a word may be `no`, and an agent 12.
        found = parse_yaml(path.read_text(encoding="utf-8"), str(path), words=True) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a mapping file in YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise InputError(f"{path}: expected sections of names and values, of {', '.join(SECTIONS)}")
    for name in found:
        if name not in SECTIONS:
            raise InputError(f"{path}: {unknown_name('section', name, SECTIONS)}")
    return found


def _known(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise unknown_name(what, name, known)
    return known[name]


def _texts(section: str, sections: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    entries = list(sections.get(section, {}).items())
    if wrong := [theirs for theirs, ours in entries if not isinstance(ours, str)]:
        raise InputError(f"{section}: expected a name for '{wrong[0]}'")
    return entries


def _actions(sections: Mapping[str, Mapping[str, Any]], spec: EnvironmentSpec) -> dict[int, dict[str, int]]:
    given = sections.get("actions", {})
    numbers = {t.name: m for m, t in enumerate(spec.types)}
    if any(isinstance(value, dict) for value in given.values()):
        of_types = {_known("type", name, numbers): words for name, words in given.items()}
    else:
        of_types = {m: given for m, t in enumerate(spec.types) if t.discrete} if given else {}
    found: dict[int, dict[str, int]] = {}
    for m, words in of_types.items():
        for word, number in words.items() if isinstance(words, dict) else [(str(words), None)]:
            last = spec.types[m].action_dim - 1
            if not (isinstance(number, str) and number.isdecimal() and int(number) <= last):
                raise InputError(f"actions: expected 0..{last} for '{word}' of '{spec.types[m].name}', got {number}")
            found.setdefault(m, {})[word] = int(number)
    return found


def _columns(sections: Mapping[str, Mapping[str, Any]], spec: EnvironmentSpec) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    kinds = {t.name: t for t in spec.types}
    for ours, theirs in sections.get("columns", {}).items():
        if ours in KEYS:
            if not isinstance(theirs, str):
                raise InputError(f"columns: expected one column for '{ours}', got {theirs}")
            found["", ours] = theirs
            continue
        known = {*KEYS, *(name for t in spec.types for name in (*_single(t), *_several(t)))}
        if ours not in known:
            raise unknown_name("column", ours, known)
        for kind, given in (theirs if isinstance(theirs, dict) else dict.fromkeys(kinds, theirs)).items():
            t = _known("type", kind, kinds)
            single = isinstance(given, str) and ours in _single(t)
            names = [ours] if single else _several(t).get(ours, [])
            columns = [given] if isinstance(given, str) else given
            if not names and not isinstance(theirs, dict):
                continue  # agents of other types see that
            if len(names) != len(columns):
                raise InputError(f"columns: '{ours}' of '{kind}' has {len(names)}, got {', '.join(map(str, columns))}")
            found |= {(kind, name): column for name, column in zip(names, columns, strict=True)}
    return found


def _single(kind: TypeSpec) -> set[str]:
    """What one column may be named for."""
    columns = *observation_columns(kind), *plain_columns(kind), *action_columns(kind), *mask_columns(kind)
    return {*columns, *(part_name(code.name) for code in kind.codes), ACTIVE, REWARD, RETURN}


def _several(kind: TypeSpec) -> dict[str, list[str]]:
    """What a list of columns may be named for → ours."""
    found = {part_name(part.name): part_columns(part) for part in kind.parts}
    return found | {OBSERVATION: plain_columns(kind), ACTION: action_columns(kind), MASK: mask_columns(kind)}
