"""Spaces of gymnasium: what a spec says of agents that have them, and numbers side by side of what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import OWN_NUMBERS
from bm3il.protocol.specs import Part, PartKind

OBSERVATION, MASK = "observation", "action_mask"
"""Name of the one part of what is no dictionary; and of the entry that says what an agent may do now."""


def unmasked(space: Any) -> Any:
    """The space of observations without their action masks."""
    from gymnasium import spaces

    if not isinstance(space, spaces.Dict) or MASK not in space.spaces:
        return space
    rest = {name: entry for name, entry in space.spaces.items() if name != MASK}
    return rest[OBSERVATION] if list(rest) == [OBSERVATION] else spaces.Dict(list(rest.items()))


def parted(seen: Any) -> tuple[Any, Any]:
    """An observation as `unmasked` spaces hold it, and its action mask; None if it brings none."""
    if not isinstance(seen, dict) or MASK not in seen:
        return seen, None
    return (seen[OBSERVATION] if len(seen) == 2 and OBSERVATION in seen else seen), seen[MASK]


def widths(whose: str, seen: Any, acts: Any) -> tuple[int, int, bool]:
    """How many numbers agents of these spaces observe, how many actions they have or how wide one is, and whether these
    are discrete.

    Raises InputError, naming `whose`, for actions that are neither discrete nor in a bounded box, and for observations
    that are not always as wide.
    """
    from gymnasium import spaces

    if not getattr(seen, "is_np_flattenable", False):
        raise InputError(f"{whose}: observations must have a fixed number of numbers, got {_described(seen)}")
    observed = int(spaces.utils.flatdim(seen))
    if isinstance(acts, spaces.Discrete):
        return observed, int(acts.n), True
    if isinstance(acts, spaces.Box) and acts.is_bounded():
        return observed, int(np.prod(acts.shape)), False
    raise InputError(f"{whose}: actions must be discrete or a bounded box, got {_described(acts)}")


def parts_of(space: Any) -> tuple[Part, ...]:
    """What of an observation has a name, or is kept as integers; nothing if it is a box of real numbers, say.

    A dictionary's entries are named parts, those of one within it `outer.inner`, in the order in which `flatten` puts
    them side by side.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Dict):
        width, kind = spaces.utils.flatdim(space), _kind(space)
        return (Part(OBSERVATION, width, kind),) if width and kind != "own" else ()
    parts: list[Part] = []
    for name, entry in space.spaces.items():
        if isinstance(entry, spaces.Dict):
            parts += [Part(f"{name}.{part.name}", part.width, part.kind) for part in parts_of(entry)]
        elif width := spaces.utils.flatdim(entry):
            parts.append(Part(str(name), width, _kind(entry)))
    return tuple(parts)


def reader(whose: str, space: Any) -> Callable[[Any], np.ndarray]:
    """What puts the numbers of an observation side by side, [O] of any dtype, perhaps a view.

    It raises InputError, naming `whose`, for observations that are not as `space` says.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return _reader_of_entries(whose, space)
    width = int(spaces.utils.flatdim(space))
    is_box = isinstance(space, spaces.Box)

    def read(seen: Any) -> np.ndarray:
        try:
            numbers = np.asarray(seen if is_box else spaces.utils.flatten(space, seen))
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise InputError(f"{whose} observes {_shown(seen)}, which is not of its space {space}") from error
        if numbers.size != width or numbers.dtype.kind not in "biuf":
            found = f"an array of shape {numbers.shape}" if numbers.size != width else f"{_shown(seen)}"
            raise InputError(f"{whose} observes {found}, which is not of its space {space}")
        return numbers.reshape(-1)

    return read


def kept(whose: str, numbers: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in the dtype of the column of that kind.

    Raises InputError, naming `whose`, for integers that it does not hold.
    """
    found = numbers.astype(OWN_NUMBERS[kind], copy=False)
    if kind != "own" and not np.can_cast(numbers.dtype, found.dtype) and (wrong := numbers[found != numbers]).size:
        raise InputError(f"{whose} observes {wrong[0]}, which is none of the integers of its observation space")
    return found


def taker(acts: Sequence[Any]) -> Callable[[np.ndarray], list[Any]]:
    """What turns actions of the agents of a type, [E, X_m] integers or [E, X_m, A_m] in [-1, 1], into [E][X_m] members
    of their spaces, which are all discrete or all boxes."""
    from gymnasium import spaces

    if isinstance(acts[0], spaces.Discrete):
        starts = np.array([int(space.start) for space in acts])
        return lambda actions: (actions + starts).tolist()
    # In float64, since the difference of two bounds may be none of the numbers of a box of integers.
    low, high = (np.stack([np.asarray(getattr(s, end), float).reshape(-1) for s in acts]) for end in ("low", "high"))
    whole = [x for x, space in enumerate(acts) if space.dtype.kind in "iu"]

    def scaled(actions: np.ndarray) -> list[Any]:
        part = (np.minimum(np.maximum(actions, -1), 1) + 1) / 2
        numbers = np.minimum(low + part * (high - low), high)
        numbers[:, whole] = np.rint(numbers[:, whole])
        members = [numbers[:, x].astype(space.dtype).reshape(-1, *space.shape) for x, space in enumerate(acts)]
        return list(zip(*members, strict=True))

    return scaled


def _reader_of_entries(whose: str, space: Any) -> Callable[[Any], np.ndarray]:
    readers = {key: reader(f"{whose}, '{key}',", entry) for key, entry in space.spaces.items()}

    def read(seen: Any) -> np.ndarray:
        try:
            found = {key: seen[key] for key in readers}
        except (LookupError, TypeError) as error:
            names = ", ".join(map(str, readers))
            raise InputError(f"{whose} observes {_shown(seen)}, expected a dictionary of {names}") from error
        return np.concatenate([read(found[key]) for key, read in readers.items()])

    return read


def _kind(space: Any) -> PartKind:
    """The kind that keeps the numbers of a space in the fewest bytes."""
    from gymnasium.spaces.utils import flatten_space

    box: Any = flatten_space(space)
    if box.dtype is not None and box.dtype.kind in "biu":
        low, high = int(box.low.min(initial=0)), int(box.high.max(initial=0))
        kinds: tuple[PartKind, ...] = ("uint8", "int16")
        for kind in kinds:
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return kind
    return "own"


def _shown(seen: Any) -> str:
    return " ".join(repr(seen).split())[:80]


def _described(space: Any) -> str:
    """A space of another package prints like gymnasium's."""
    package = type(space).__module__.partition(".")[0]
    return f"{space}" + ("" if package == "gymnasium" else f" of '{package}', not of gymnasium")
