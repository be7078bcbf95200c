"""Do recordings look like the world in which they are to be imitated?

Where both show something, ranges are compared. Nothing is refused for that, since people go where chance does not. But
a unit, or an order, that is another one on one side alone makes a policy worse than chance, and nothing else tells.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.recordings.columns import observation_columns
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

STARTS, ROWS, SECONDS = 16, 2000, 2.0
"""Most resets that are looked at, most rows of the recordings, and for how long is played, but for the first reset."""
FAR, SMALL = 10.0, 2.0
"""By which factor the largest numbers differ where that is told; not of two small ones: loads and shares, which a crowd
makes, are rare among random actions."""
ROUNDED = 1e-3
LISTED = 4
SEED = 11


@dataclass(frozen=True)
class _Ranges:
    """Per type the lowest and the highest of each number that active agents observe: [O_m]."""

    low: list[np.ndarray]
    high: list[np.ndarray]

    @classmethod
    def of(cls, seen: Sequence[Sequence[np.ndarray]], active: Sequence[Sequence[np.ndarray]]) -> _Ranges:
        """Of time steps; in each, per type [..., X_m, O_m] and [..., X_m]."""
        low, high = [], []
        for m in range(len(seen[0])):
            there = [each[m][who[m]] for each, who in zip(seen, active, strict=True)]
            rows = np.concatenate([r.reshape(-1, r.shape[-1]) for r in there])
            low.append(rows.min(axis=0, initial=np.inf))
            high.append(rows.max(axis=0, initial=-np.inf))
        return cls(low, high)


def unlike(recorded: Demonstrations, environment: Environment, steps: bool) -> list[str]:
    """What the recordings hold and this environment of one copy does not show, or the other way round, in words.

    Looks at starts, and if `steps` also at an episode of random actions, for 2 seconds and at least one reset.
    """
    spec, until = environment.spec, time.monotonic() + SECONDS
    shown = list(_starts(environment, until))
    firsts = np.cumsum(recorded.episode_lengths) - recorded.episode_lengths
    hints = _once(_other_starts(recorded, firsts, _Ranges.of(*_seen(shown)), spec))
    if steps:
        shown += _episode(environment, until)
        some = np.random.default_rng(SEED).permutation(recorded.num_rows)[:ROWS]
        hints += _once(_other_sizes(recorded, some, _Ranges.of(*_seen(shown)), spec))
        hints += _once(_other_masks(recorded, some, shown, spec))
    return hints


def _once(of_types: Iterator[str]) -> list[str]:
    """What is so of many types is told of the first."""
    found = list(of_types)
    return [f"{found[0]} ({len(found) - 1} more types are like it)" if len(found) > 1 else found[0]] if found else []


def _starts(environment: Environment, until: float) -> Iterator[TimeStep]:
    for seed in range(STARTS):
        yield _kept(environment.reset(seed))
        if time.monotonic() > until:
            break


def _episode(environment: Environment, until: float) -> Iterator[TimeStep]:
    random, now = np.random.default_rng(SEED), environment.reset(SEED)
    while not (now.terminated | now.truncated).all() and time.monotonic() < until:
        actions = [
            (random.random(mask.shape) * mask).argmax(axis=-1)
            if t.discrete
            else random.uniform(-1, 1, mask.shape).astype(np.float32)
            for t, mask in zip(environment.spec.types, now.action_masks, strict=True)
        ]
        now = environment.step(actions)
        yield _kept(now)


def _kept(now: TimeStep) -> TimeStep:
    seen, masks, active = ([a.copy() for a in arrays] for arrays in (now.observations, now.action_masks, now.active))
    return replace(now, observations=seen, action_masks=masks, active=active, columns=None)


def _seen(shown: Sequence[TimeStep]) -> tuple[list[Sequence[np.ndarray]], list[Sequence[np.ndarray]]]:
    return [now.observations for now in shown], [now.active for now in shown]


def _other_starts(recorded: Demonstrations, firsts: np.ndarray, there: _Ranges, spec: EnvironmentSpec) -> Iterator[str]:
    """Numbers that are apart by more than each of them varies."""
    here = _Ranges.of([recorded.observed(firsts)], [[a[firsts] for a in recorded.active]])
    for m, t in enumerate(spec.types):
        gap = np.maximum(here.low[m] - there.high[m], there.low[m] - here.high[m])
        width = np.maximum(here.high[m] - here.low[m], there.high[m] - there.low[m])
        size = np.maximum(np.abs(here.low[m]), np.abs(there.low[m]))
        if (apart := np.flatnonzero(np.isfinite(size) & (gap > width) & (gap > ROUNDED * size))).size:
            yield _in_words(
                f"for '{t.name}' the recordings begin with other numbers than the environment", t, apart, here, there, m
            )


def _other_sizes(recorded: Demonstrations, rows: np.ndarray, there: _Ranges, spec: EnvironmentSpec) -> Iterator[str]:
    """Numbers of another order of magnitude."""
    here = _Ranges.of([recorded.observed(rows)], [[a[rows] for a in recorded.active]])
    for m, t in enumerate(spec.types):
        a, b = (np.maximum(np.abs(r.low[m]), np.abs(r.high[m])) for r in (here, there))
        known = np.isfinite(a + b) & (a > 0) & (b > 0)
        if (far := np.flatnonzero(known & (np.maximum(a, b) > SMALL) & ((a > FAR * b) | (b > FAR * a)))).size:
            yield _in_words(
                f"'{t.name}' observes in the recordings numbers of another size than in the environment",
                t,
                far,
                here,
                there,
                m,
            )


def _other_masks(
    recorded: Demonstrations, rows: np.ndarray, shown: Sequence[TimeStep], spec: EnvironmentSpec
) -> Iterator[str]:
    """Recordings without masks, of a world that has some."""
    allowed = recorded.allowed(rows)
    for m, t in enumerate(spec.types):
        forbids = any((~now.action_masks[m] & now.active[m][..., None]).any() for now in shown)
        if forbids and allowed[m][recorded.active[m][rows]].all():
            yield (
                f"masks of '{t.name}' were not written down, and '{spec.name}' forbids some actions: a clone then must "
                "learn what is forbidden, too. Columns mask.0, mask.1, … tell it"
            )


def _in_words(what: str, t: TypeSpec, columns: np.ndarray, here: _Ranges, there: _Ranges, m: int) -> str:
    names = observation_columns(t)
    told = [
        f"{names[o]} {_span(here.low[m][o], here.high[m][o])} (there {_span(there.low[m][o], there.high[m][o])})"
        for o in columns[:LISTED]
    ]
    more = f" and {len(columns) - LISTED} others" if len(columns) > LISTED else ""
    return f"{what}: {', '.join(told)}{more}. Has one side another unit, or another order of its columns?"


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
