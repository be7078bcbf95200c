"""Settings: the bounds of their numbers, which stand at the field (`batch_size: Count = 256`), and their flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Interval

from bm3il.protocol.errors import InputError

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Port = Annotated[int, Interval(ge=0, le=65_535)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "tf32", "bfloat16"]


def check_bounds(settings: Any, path: str = "") -> None:
    """Raise InputError, naming the flag, for the first number of a dataclass of settings that its bound forbids.

    path: of the settings in the configuration, `learner.`.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if is_dataclass(value):
            check_bounds(value, f"{path}{name}.")
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for bound in _bounds(hint):
            if not all(_holds(bound, number) for number in numbers):
                raise InputError(f"--{flag(path + name)} must be {_words(bound)}, got {value}")


def flag(option: str) -> str:
    """The name of an option on the command line, without its dashes."""
    return option.replace("_", "-")


def _bounds(hint: Any) -> Iterator[Ge | Gt | Interval]:
    """Those of a number, or of the numbers of a tuple."""
    for found in (hint, *get_args(hint)):
        yield from (bound for bound in getattr(found, "__metadata__", ()) if isinstance(bound, Ge | Gt | Interval))


def _holds(bound: Ge | Gt | Interval, number: Any) -> bool:
    """False for NaN, too."""
    if isinstance(bound, Ge):
        return bool(number >= bound.ge)
    if isinstance(bound, Gt):
        return bool(number > bound.gt)
    return bool(bound.ge <= number <= bound.le)


def _words(bound: Ge | Gt | Interval) -> str:
    if isinstance(bound, Ge):
        return f"at least {bound.ge}"
    if isinstance(bound, Gt):
        return f"above {bound.gt}"
    return f"within {bound.ge}..{bound.le}"
