"""What the columns of a recorded table are called, unless a mapping file says otherwise."""

from __future__ import annotations

from bm3il.protocol.specs import Part, TypeSpec

EPISODE, STEP, AGENT, TYPE, NUMBER, ACTION = "episode", "step", "agent", "type", "number", "action"
ACTIVE, MASK, REWARD, RETURN, OBSERVATION = "active", "mask", "reward", "return", "observation"
RESERVED = (EPISODE, STEP, AGENT, TYPE, NUMBER, ACTION, ACTIVE, MASK, REWARD, RETURN)


def part_name(name: str) -> str:
    """What a part, or a code, is called in a table."""
    return f"{OBSERVATION}.{name}" if name.partition(".")[0] in RESERVED else name


def part_columns(part: Part) -> list[str]:
    """The columns of a part: its name, or its name and numbers from 0; those of a code always have numbers."""
    name = part_name(part.name)
    if part.width == 1 and part.kind != "code":
        return [name]
    return [f"{name}.{i}" for i in range(part.width)]


def observation_columns(kind: TypeSpec) -> list[str]:
    """Name of each of the O_m numbers of an observation: by its parts, or `observation.0`, `observation.1`, …"""
    if not kind.parts:
        return plain_columns(kind)
    return [column for part in kind.parts for column in part_columns(part)]


def plain_columns(kind: TypeSpec) -> list[str]:
    """`observation.0`, `observation.1`, …: names that every observation may have, whatever its parts."""
    return [f"{OBSERVATION}.{i}" for i in range(kind.observation_dim)]


def action_columns(kind: TypeSpec) -> list[str]:
    """`action`, or `action.0`, `action.1`, … if an action is several numbers."""
    if kind.discrete or kind.action_dim == 1:
        return [ACTION]
    return [f"{ACTION}.{i}" for i in range(kind.action_dim)]


def mask_columns(kind: TypeSpec) -> list[str]:
    """`mask.0`, `mask.1`, …"""
    return [f"{MASK}.{i}" for i in range(kind.action_dim)]
