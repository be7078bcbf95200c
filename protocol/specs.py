"""Who acts in an environment: the types of agents, how many of each, and the widths of what they see and do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from protocol.errors import InputError, unknown_name

ParameterSharing = Literal["agent", "type"]
"""Whether each agent has a network of its own (the paper), or the agents of a type share one."""

MAX_AGENTS = 1_000_000
MAX_WIDTH = 1_000_000


@dataclass(frozen=True)
class Part:
    """A named stretch of an observation, `width` numbers wide. A dot makes a part of a part: `place.road`."""

    name: str
    width: int


@dataclass(frozen=True)
class TypeSpec:
    """One type m of agents.

    `count` is X_m; `observation_dim` O_m; `action_dim` A_m, the number of discrete actions, or the width of the
    action vector (in [-1, 1]) if `discrete` is false.
    parts: what an observation is made of, in its order and all of it; empty where nobody has said.
    purpose: names of the parts that show what these agents are after, and not how they get there.
    """

    name: str
    count: int
    observation_dim: int
    action_dim: int
    discrete: bool = True
    parts: tuple[Part, ...] = ()
    purpose: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {"count": MAX_AGENTS, "observation_dim": MAX_WIDTH, "action_dim": MAX_WIDTH}
        for field, limit in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= limit:
                raise InputError(f"type '{self.name}': {field} must be an integer in 1..{limit}, got {value!r}")
        for part in self.parts:
            if type(part.width) is not int or part.width < 1:
                raise InputError(f"type '{self.name}': part {part.name} must be at least 1 wide, got {part.width!r}")
        width = sum(part.width for part in self.parts)
        if self.parts and width != self.observation_dim:
            raise InputError(f"type '{self.name}': its parts are {width} wide, its observation {self.observation_dim}")
        self.columns(self.purpose)

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
    """

    name: str
    types: tuple[TypeSpec, ...]
    episode_length: int
    view: str = ""
    changes: str = ""

    def __post_init__(self) -> None:
        if not self.types:
            raise InputError(f"environment '{self.name}' has no agent types")
        names = [agent_type.name for agent_type in self.types]
        if len(set(names)) != len(names):
            raise InputError(f"environment '{self.name}' has two types of one name: {', '.join(names)}")
        if type(self.episode_length) is not int or self.episode_length < 1:
            raise InputError(f"environment '{self.name}': episode_length must be a positive integer")

    @property
    def num_types(self) -> int:
        """M."""
        return len(self.types)

    @property
    def num_agents(self) -> int:
        """N = Σ_m X_m."""
        return sum(agent_type.count for agent_type in self.types)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The number of the first agent of each type."""
        return tuple(sum(t.count for t in self.types[:m]) for m in range(self.num_types))

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the types whose agents see and do alike things, in the order of their first appearance.

        The agents of a block, type by type, share arrays on the wire and stacked networks (`protocol.layout`).
        """
        shapes: dict[tuple[object, ...], list[int]] = {}
        for m, t in enumerate(self.types):
            alike = (t.observation_dim, t.action_dim, t.discrete, t.parts, t.purpose)
            shapes.setdefault(alike, []).append(m)
        return tuple(tuple(types) for types in shapes.values())

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
            return cls(str(value["name"]), types, value["episode_length"], view, changes)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not an environment spec: {error!r}") from error

    def difference(self, other: EnvironmentSpec, counts: bool = True) -> str | None:
        """The first thing in which the agents of `other` do not fit this environment, or None.

        Names of the environments are not compared: what counts is that the arrays mean the same.
        counts: whether there must be as many agents of each type.
        """
        if self.view != other.view:
            return f"expected '{self.view}', found '{other.view}'"
        if self.num_types != other.num_types:
            return f"expected {self.num_types} agent types, found {other.num_types}"
        for mine, theirs in zip(self.types, other.types, strict=True):
            for field in ("name", *(("count",) if counts else ()), "observation_dim", "action_dim", "discrete"):
                expected, found = getattr(mine, field), getattr(theirs, field)
                if expected != found:
                    return f"type '{mine.name}': expected {field} {expected!r}, found {found!r}"
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
        tuple(Part(str(part["name"]), part["width"]) for part in value.get("parts", ())),
        tuple(str(name) for name in value.get("purpose", ())),
    )
