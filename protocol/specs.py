"""Who acts in an environment: the types of agents, how many of each, and the widths of what they see and do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from protocol.errors import InputError

ParameterSharing = Literal["agent", "type"]
"""Whether each agent has a network of its own (the paper), or the agents of a type share one."""

MAX_AGENTS = 1_000_000
MAX_WIDTH = 1_000_000


@dataclass(frozen=True)
class TypeSpec:
    """One type m of agents.

    `count` is X_m; `observation_dim` O_m; `action_dim` A_m, the number of discrete actions, or the width of the
    action vector (in [-1, 1]) if `discrete` is false.
    """

    name: str
    count: int
    observation_dim: int
    action_dim: int
    discrete: bool = True

    def __post_init__(self) -> None:
        limits = {"count": MAX_AGENTS, "observation_dim": MAX_WIDTH, "action_dim": MAX_WIDTH}
        for field, limit in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= limit:
                raise InputError(f"type '{self.name}': {field} must be an integer in 1..{limit}, got {value!r}")


@dataclass(frozen=True)
class EnvironmentSpec:
    """The agents of an environment, grouped by type; `episode_length` is the most joint steps of an episode.

    Agents are numbered type by type: agent `offsets[m] + x` is the x-th agent of type m.
    view: what observations and actions mean, in words, where environments of equal widths could be mistaken for each
        other; demonstrations fit only an environment of the same view.
    """

    name: str
    types: tuple[TypeSpec, ...]
    episode_length: int
    view: str = ""

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
        """Numbers of the types whose agents see and do alike wide things, in the order of their first appearance.

        The agents of a block, type by type, share arrays on the wire and stacked networks (`protocol.layout`).
        """
        shapes: dict[tuple[int, int, bool], list[int]] = {}
        for m, t in enumerate(self.types):
            shapes.setdefault((t.observation_dim, t.action_dim, t.discrete), []).append(m)
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
            types = tuple(
                TypeSpec(
                    str(t["name"]), t["count"], t["observation_dim"], t["action_dim"], bool(t.get("discrete", True))
                )
                for t in value["types"]
            )
            return cls(str(value["name"]), types, value["episode_length"], str(value.get("view", "")))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not an environment spec: {error!r}") from error

    def difference(self, other: EnvironmentSpec) -> str | None:
        """The first thing in which the agents of `other` do not fit this environment, or None.

        Names of the environments are not compared: what counts is that the arrays mean the same.
        """
        if self.view != other.view:
            return f"expected '{self.view}', found '{other.view}'"
        if self.num_types != other.num_types:
            return f"expected {self.num_types} agent types, found {other.num_types}"
        for mine, theirs in zip(self.types, other.types, strict=True):
            for field in ("name", "count", "observation_dim", "action_dim", "discrete"):
                expected, found = getattr(mine, field), getattr(theirs, field)
                if expected != found:
                    return f"type '{mine.name}': expected {field} {expected!r}, found {found!r}"
        return None
