"""What discriminators see: all that their agents observe and do, or parts of it by name. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

ALL, PURPOSE, ACTION = "all", "purpose", "action"


@dataclass(frozen=True)
class Seen:
    """What the discriminators of a type see.

    runs: of consecutive columns of its observation, (first, end) each, in their order.
    action: whether the own action, too.
    """

    runs: tuple[tuple[int, int], ...]
    action: bool

    @property
    def width(self) -> int:
        """How many columns of the observation are seen."""
        return sum(end - first for first, end in self.runs)


def columns_seen(spec: EnvironmentSpec, sees: Sequence[str]) -> list[Seen]:
    """What `RewardSettings.sees` means for each type of an environment.

    Raises InputError for a name that means nothing to any type, and if a type would see nothing.
    """
    parts = {part.name for agent_type in spec.types for part in agent_type.parts}
    names = [name for name in sees if name not in (ALL, PURPOSE, ACTION)]
    if names and not parts:
        raise InputError(
            f"--reward.sees {names[0]}: '{spec.name}' does not name the parts of what its agents observe; "
            f"only '{ALL}' and '{ACTION}' can be seen there until its spec names `parts`"
        )
    for name in names:
        if not any(_columns(agent_type, name) for agent_type in spec.types):
            prefixes = {part[:dot] for part in parts for dot, letter in enumerate(part) if letter == "."}
            raise unknown_name("part for --reward.sees", name, {*parts, *prefixes, ALL, PURPOSE, ACTION})
    if PURPOSE in sees and not any(agent_type.purpose for agent_type in spec.types):
        raise InputError(
            f"--reward.sees {PURPOSE}: '{spec.name}' does not say which parts show what its agents are after; "
            f"name parts instead (it has {', '.join(sorted(parts)) or 'none'}), or `purpose` in its spec"
        )
    return [_seen_by(agent_type, sees) for agent_type in spec.types]


def check_imagined(spec: EnvironmentSpec, imagined: float) -> None:
    """Raise InputError if rows shall be imagined of an environment that does not name the parts of its observations."""
    unnamed = [agent_type.name for agent_type in spec.types if not agent_type.parts]
    if imagined and unnamed:
        raise InputError(
            f"--reward.imagined {imagined:g} puts parts of observations together anew, and '{spec.name}' names none "
            f"for '{unnamed[0]}': leave it out, or name them (`parts` of the type)"
        )


def _seen_by(agent_type: TypeSpec, sees: Sequence[str]) -> Seen:
    if ALL in sees:
        return Seen(((0, agent_type.observation_dim),), action=True)
    names = {name for word in sees for name in (agent_type.purpose if word == PURPOSE else (word,))}
    columns = {column for name in names for column in _columns(agent_type, name)}
    if not columns and ACTION not in sees:
        raise InputError(
            f"--reward.sees {' '.join(sees)}: the discriminators of '{agent_type.name}' would see nothing; "
            f"add '{ACTION}' or one of its parts: {', '.join(part.name for part in agent_type.parts) or 'none'}"
        )
    firsts = sorted(column for column in columns if column - 1 not in columns)
    ends = sorted(column + 1 for column in columns if column + 1 not in columns)
    return Seen(tuple(zip(firsts, ends, strict=True)), ACTION in sees)


def _columns(agent_type: TypeSpec, name: str) -> tuple[int, ...]:
    """The columns of the part, none if the type has no such part."""
    try:
        return agent_type.columns([name])
    except InputError:
        return ()
