"""Who acts in an environment: the types of agents, how many of each, and the widths of what they see and do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, Protocol, TypeVar, get_args

from bm3il.protocol.errors import InputError, unknown_name

ParameterSharing = Literal["agent", "type"]
"""Whether each agent has a network of its own (the paper), or the agents of a type share one."""


class _Sliceable(Protocol):
    def __getitem__(self, place: Any, /) -> Any: ...


Array = TypeVar("Array", bound=_Sliceable)
"""An array of numpy, or a tensor."""

ArrayTable = dict[str, tuple[str, tuple[int, ...]]]
"""Name → (dtype, shape): what a message, a file or a memory holds."""

PartKind = Literal["own", "uint8", "int16", "code", "shared", "constant"]
OWN_MASK, FREE = "own", "free"
"""What a type's `mask` may be, besides the name of one of its codes."""

MAX_AGENTS = MAX_WIDTH = 1_000_000
"""A spec comes in files and messages, and arrays of its sizes are made."""
MAX_STEPS = 10_000_000
"""Of an episode: far more than anybody plays, and few enough to be counted in."""
MAX_VALUE = 3.4e38
"""float32 holds it."""
MAX_EXPANDED = 1 << 28
"""Numbers that the constants of all agents, or the masks of a table, may take up in memory."""


@dataclass(frozen=True)
class Part:
    """A named stretch of an observation, `width` numbers wide. A dot makes a part of a part: `place.road`.

    kind: what of it is kept and sent (`protocol.observations`).
        `own`: the numbers, of every agent.
        `uint8`, `int16`: the same of integers that these hold, in a quarter and a half of the bytes.
        `code`: one small integer of every agent, seen one-hot. Neighbours of kind `code` whose names are equal up to
            the dot are one code over all their columns; all of these are 0 where the code is their number, "none".
        `shared`: the numbers, once for all agents of an environment.
        `constant`: nothing; all agents of the type always see `values`.
    masked: of a shared part, that each agent sees 0 where its action mask forbids the action of the same number. Such
        parts are neighbours, and together as wide as there are actions.
    """

    name: str
    width: int
    kind: PartKind = "own"
    masked: bool = False
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise InputError(f"part {self.name} must be at least 1 wide, got {self.width!r}")
        if self.kind not in get_args(PartKind):
            raise unknown_name(f"kind of the part {self.name}", str(self.kind), get_args(PartKind))
        if self.masked and self.kind != "shared":
            raise InputError(f"part {self.name}: only shared parts can be masked, this one is '{self.kind}'")
        if len(self.values) != (self.width if self.kind == "constant" else 0):
            raise InputError(f"part {self.name}: expected values for a constant, one per column, got {self.values}")
        if not all(abs(value) <= MAX_VALUE for value in self.values):  # NaN is not either
            raise InputError(f"part {self.name}: expected finite values, got {self.values[:5]}")

    @property
    def shape(self) -> tuple[object, ...]:
        """What it has in common with the part of other types whose agents share arrays."""
        return self.name, self.width, self.kind, self.masked


@dataclass(frozen=True)
class Code:
    """A small integer of every agent: 0..size−1, seen one-hot from column `first` on, or `size` for none of these."""

    name: str
    first: int
    size: int


@dataclass(frozen=True)
class TypeSpec:
    """One type m of agents.

    `count` is X_m; `observation_dim` O_m; `action_dim` A_m, the number of discrete actions, or the width of the
    action vector (in [-1, 1]) if `discrete` is false.
    parts: what an observation is made of, in its order and all of it; empty where nobody has said.
    purpose: names of the parts that show what these agents are after, and not how they get there.
    mask: where their action masks come from: `own` ones come with every observation; to the `free` all is always
        allowed; else the name of one of their codes, which `EnvironmentSpec.tables` says the allowed actions of.
    """

    name: str
    count: int
    observation_dim: int
    action_dim: int
    discrete: bool = True
    parts: tuple[Part, ...] = ()
    purpose: tuple[str, ...] = ()
    mask: str = OWN_MASK

    def __post_init__(self) -> None:
        limits = {"count": MAX_AGENTS, "observation_dim": MAX_WIDTH, "action_dim": MAX_WIDTH}
        for field, limit in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= limit:
                raise InputError(f"type '{self.name}': {field} must be an integer in 1..{limit}, got {value!r}")
        width = sum(part.width for part in self.parts)
        if self.parts and width != self.observation_dim:
            raise InputError(f"type '{self.name}': its parts are {width} wide, its observation {self.observation_dim}")
        self.columns(self.purpose)
        masked = [
            sum(part.width for part in parts)
            for is_masked, parts in groupby(self.parts, lambda p: p.masked)
            if is_masked
        ]
        if masked and masked != [self.action_dim]:
            raise InputError(
                f"type '{self.name}': its masked parts must be neighbours, together as wide as there are actions "
                f"({self.action_dim}), found {masked}"
            )
        if self.parts and all(part.kind == "constant" for part in self.parts):
            raise InputError(f"type '{self.name}': all that it observes is constant")
        if self.mask not in (OWN_MASK, FREE):
            self.code(self.mask)

    @property
    def codes(self) -> tuple[Code, ...]:
        """The codes of an agent, in the order of its observation."""
        found, first = [], 0
        for (kind, name), parts in groupby(self.parts, lambda part: (part.kind, part.name.partition(".")[0])):
            width = sum(part.width for part in parts)
            if kind == "code":
                found.append(Code(name, first, width))
            first += width
        return tuple(found)

    def code(self, name: str) -> int:
        """The number of the code of this name. Raises InputError, naming the nearest, if there is none."""
        names = [code.name for code in self.codes]
        if name not in names:
            raise unknown_name(f"code of '{self.name}'", name, (*names, OWN_MASK, FREE))
        return names.index(name)

    def columns(self, names: Sequence[str]) -> tuple[int, ...]:
        """The columns of an observation that the parts of these names take, in the order of the observation.

        A name also means what begins with it and a dot: `place` is `place.road` and `place.facility`.
        Raises InputError, naming the nearest, for a part that there is not.
        """
        known = [part.name for part in self.parts]
        for name in names:
            if not any(_is_part(part, name) for part in known):
                raise unknown_name(f"part of what '{self.name}' observes", name, known)
        chosen: list[int] = []
        first = 0
        for part in self.parts:
            if any(_is_part(part.name, name) for name in names):
                chosen += range(first, first + part.width)
            first += part.width
        return tuple(chosen)


@dataclass(frozen=True)
class EnvironmentSpec:
    """The agents of an environment, grouped by type; `episode_length` is the most joint steps of an episode.

    Agents are numbered type by type: agent `offsets[m] + x` is the x-th agent of type m.
    view: what observations and actions mean, in words, where environments of equal widths could be mistaken for each
        other; demonstrations fit only an environment of the same view.
    changes: name of the world of which this one is a change (a road is closed, moves go wrong); empty if it is none.
        Demonstrations, policies and rewards of the one fit the other.
    tables: the allowed actions of each value of a code, by the name of the code, for the types whose masks it gives.
    """

    name: str
    types: tuple[TypeSpec, ...]
    episode_length: int
    view: str = ""
    changes: str = ""
    tables: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.types:
            raise InputError(f"environment '{self.name}' has no agent types")
        names = [agent_type.name for agent_type in self.types]
        if len(set(names)) != len(names):
            raise InputError(f"environment '{self.name}' has two types of one name: {', '.join(names)}")
        if type(self.episode_length) is not int or not 1 <= self.episode_length <= MAX_STEPS:
            raise InputError(
                f"environment '{self.name}': episode_length must be an integer in 1..{MAX_STEPS}, the most steps of an "
                f"episode, got {self.episode_length!r}"
            )
        for agent_type in self.types:
            if agent_type.mask not in (OWN_MASK, FREE):
                self._check_table(agent_type)
        tables, used = [name for name, _ in self.tables], {t.mask for t in self.types}
        if len(set(tables)) != len(tables) or not used.issuperset(tables):
            raise InputError(
                f"environment '{self.name}': expected one table for each code that gives masks, got {tables}"
            )
        constants = sum(t.count * len(part.values) for t in self.types for part in t.parts)
        if constants > MAX_EXPANDED:
            raise InputError(
                f"environment '{self.name}': its agents have {constants} constants, at most {MAX_EXPANDED}"
            )

    def _check_table(self, agent_type: TypeSpec) -> None:
        table = dict(self.tables).get(agent_type.mask)
        code = agent_type.codes[agent_type.code(agent_type.mask)]
        if table is None or len(table) != code.size:
            found = "none" if table is None else f"one of {len(table)}"
            raise InputError(f"environment '{self.name}': expected a table of {code.size} '{code.name}', found {found}")
        actions = range(agent_type.action_dim)
        if (code.size + 1) * len(actions) > MAX_EXPANDED:
            raise InputError(
                f"environment '{self.name}': table '{code.name}' is too large: {code.size} × {len(actions)}"
            )
        for value, allowed in enumerate(table):
            if not allowed or any(type(action) is not int or action not in actions for action in allowed):
                raise InputError(
                    f"environment '{self.name}': table '{code.name}' must allow some of {actions} with each value, "
                    f"found {list(allowed)[:5]} with {value}"
                )

    @property
    def num_types(self) -> int:
        """M."""
        return len(self.types)

    @property
    def num_agents(self) -> int:
        """N = Σ_m X_m."""
        return sum(agent_type.count for agent_type in self.types)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of the first agent of each type."""
        return tuple(sum(t.count for t in self.types[:m]) for m in range(self.num_types))

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the types whose agents see and do alike things, in the order of their first appearance.

        The agents of a block, type by type, share arrays on the wire and stacked networks (`protocol.layout`).
        """
        shapes: dict[tuple[object, ...], list[int]] = {}
        for m, t in enumerate(self.types):
            parts = tuple(part.shape for part in t.parts)
            alike = (t.observation_dim, t.action_dim, t.discrete, parts, t.purpose, t.mask)
            shapes.setdefault(alike, []).append(m)
        return tuple(tuple(types) for types in shapes.values())

    def plain(self) -> EnvironmentSpec:
        """Itself, saying nothing of what observations are made of: all is own, masks too."""
        types = (
            replace(t, mask=OWN_MASK, parts=tuple(Part(part.name, part.width) for part in t.parts)) for t in self.types
        )
        return replace(self, types=tuple(types), tables=())

    def agents(self, m: int) -> slice:
        """Those of type m, along an axis of all agents."""
        return slice(self.offsets[m], self.offsets[m] + self.types[m].count)

    def by_type(self, arrays: Sequence[Array], axis: int) -> list[Array]:
        """Arrays of blocks → of types, in the order of the types: views along the axis of the agents."""
        parts: dict[int, Array] = {}
        for types, array in zip(self.blocks, arrays, strict=True):
            first = 0
            for m in types:
                agents = slice(first, first + self.types[m].count)
                parts[m] = array[(slice(None),) * axis + (agents,)]
                first = agents.stop
        return [parts[m] for m in range(self.num_types)]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for headers of files and messages."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> EnvironmentSpec:
        """The inverse of `to_json`, for untrusted input.

        Raises InputError if a key is missing, of the wrong kind or out of its limits.
        """
        try:
            types = tuple(_type_from_json(t) for t in value["types"])
            view, changes = str(value.get("view", "")), str(value.get("changes", ""))
            tables = tuple((str(name), tuple(map(tuple, table))) for name, table in value.get("tables", ()))
            return cls(str(value["name"]), types, value["episode_length"], view, changes, tables)
        except InputError:
            # A ValueError, too, which says already what is wrong.
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InputError(f"not an environment spec: {error!r}") from error

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Found once: it is looked up by at every step, and there may be hundreds of types.
        return hash((self.name, self.types, self.episode_length, self.view, self.changes, self.tables))

    def difference(self, other: EnvironmentSpec, counts: bool = True) -> str | None:
        """The first thing in which the agents of `other` do not fit this environment, or None.

        Names of the environments are not compared: what counts is that the arrays mean the same.
        counts: whether there must be as many agents of each type.
        """
        if self.view != other.view:
            meant, found = (f"'{view}'" if view else "nothing in particular" for view in (self.view, other.view))
            return f"expected observations that mean {meant}, found {found}"
        if self.num_types != other.num_types:
            return f"expected {self.num_types} agent types, found {other.num_types}"
        for mine, theirs in zip(self.types, other.types, strict=True):
            for field in ("name", *(("count",) if counts else ()), "observation_dim", "action_dim", "discrete"):
                expected, found = getattr(mine, field), getattr(theirs, field)
                if expected != found:
                    return f"type '{mine.name}': expected {field} {expected!r}, found {found!r}"
            # Of equal widths, columns could change places and nobody would see it. Who names no parts is believed.
            for wanted, part in zip(mine.parts, theirs.parts, strict=False):
                if (wanted.name, wanted.width) != (part.name, part.width):
                    expected, found = (f"'{p.name}' ({p.width} wide)" for p in (wanted, part))
                    return f"type '{mine.name}': expected {expected} in what it observes, found {found} in its place"
        return None


def _is_part(part: str, name: str) -> bool:
    return part == name or part.startswith(name + ".")


def _type_from_json(value: Any) -> TypeSpec:
    return TypeSpec(
        str(value["name"]),
        value["count"],
        value["observation_dim"],
        value["action_dim"],
        bool(value.get("discrete", True)),
        tuple(_part_from_json(part) for part in value.get("parts", ())),
        tuple(str(name) for name in value.get("purpose", ())),
        str(value.get("mask", OWN_MASK)),
    )


def _part_from_json(value: Any) -> Part:
    values = tuple(float(number) for number in value.get("values", ()))
    return Part(str(value["name"]), value["width"], value.get("kind", "own"), bool(value.get("masked", False)), values)
