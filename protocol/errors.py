"""Errors that are addressed to a person."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The text is one line: what was expected, what came, what to do.

    The command line prints it without a traceback and exits with 2.
    """


class ProtocolError(ValueError):
    """A message that came over the wire cannot be accepted.

    `cause` is the label under which the drop is counted (`bm3il_<role>_dropped_messages_total{cause}`).
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class NumericalError(ArithmeticError):
    """A loss, a reward or a parameter is no longer finite. The text names the term and the iteration."""


class DeadlineError(RuntimeError):
    """One of our own waits took longer than it may; the text says for whom and how long.

    Not a TimeoutError, which may come from anybody's code: a simulator's is no reason to end a run.
    """


class SimulatorError(RuntimeError):
    """An environment failed: it raised, or showed what no environment may. The text names it, and the cause.

    Whoever played it is started again; a run whose environment fails again and again ends with this text.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a mistyped name: it lists the nearest known names, or all of them when none is near."""
    return InputError(f"unknown {kind} '{name}'; {nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name: the nearest known ones, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
