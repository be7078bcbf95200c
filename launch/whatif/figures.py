"""What is compared by `bm3il whatif`: returns and loads of roads, of one policy or of one per seed, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.evaluation import episodes_at_once
from bm3il.actors.rollout import Acts, rollout
from bm3il.launch.learned.evaluate import FRESH_SEED
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import EnvironmentSpec

RETURN_LEVEL = 0.95
LOAD_LEVEL = 0.9
RUSH_HOURS = 2.0
"""How long before and after the beginning and the end of working hours the roads are watched."""
DECIMALS = 5
OF_SEEDS = ("clone", "imitator")
"""Who is another with each seed."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What was seen of one policy, a row for each episode; or of one policy per seed, a row for each seed.

    returns: [rows, 1 + M] true return per agent and episode, of all agents, then of each type.
    loads: [rows, H, R] mean agents on each road in each hour of the day; None where there are no roads.
    """

    over: str
    returns: np.ndarray
    loads: np.ndarray | None

    @classmethod
    def of_seeds(cls, samples: Sequence[Sample]) -> Sample:
        """One row for each of the samples, its mean."""
        loads = [sample.loads.mean(axis=0) for sample in samples if sample.loads is not None]
        returns = np.stack([sample.returns.mean(axis=0) for sample in samples])
        return cls("seeds", returns, np.stack(loads) if loads else None)


class _Watched:
    """A policy; before it acts, the roads are looked at."""

    def __init__(self, policy: Acts, berlin: Berlin) -> None:
        self._policy, self._berlin = policy, berlin
        self.counts: list[np.ndarray] = []

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """As `Acts.act`."""
        self.counts.append(self._berlin.counts[:, : self._berlin.scenario.num_roads])
        return self._policy.act(now, generator, greedy)


def play(name: str, policy: Acts, episodes: int) -> Sample:
    """Fresh episodes in the environment of this name: those that `bm3il evaluate` plays, the same for every policy."""
    returns: list[np.ndarray] = []
    loads: list[np.ndarray] = []
    at_once = episodes_at_once(make_environment(name, 1).spec)
    for first in range(0, episodes, at_once):
        world = make_environment(name, min(at_once, episodes - first))
        berlin = unperturbed(world)
        seed = derive_seed(FRESH_SEED, "evaluation", first)
        if isinstance(berlin, Berlin):
            watched = _Watched(policy, berlin)
            played = rollout(world, watched, seed)
            loads.append(hourly(np.stack(watched.counts, axis=1), hours_of(berlin)))
        else:
            played = rollout(world, policy, seed)
        of_agents = played.returns().astype(np.float64)
        kinds = [of_agents[:, o : o + t.count] for o, t in zip(world.spec.offsets, world.spec.types, strict=True)]
        returns.append(np.stack([agents.mean(axis=1) for agents in (of_agents, *kinds)], axis=1))
    return Sample("episodes", np.concatenate(returns), np.concatenate(loads) if loads else None)


def hours_of(berlin: Berlin) -> np.ndarray:
    """[T] the hour of the day that each step begins in."""
    scenario = berlin.scenario
    return ((scenario.day_start_minute + scenario.step_minutes * np.arange(scenario.steps)) // 60).astype(int)


def hourly(counts: np.ndarray, hours: np.ndarray) -> np.ndarray:
    """Means [E, H, R] over the steps of each hour of `counts` [E, T, R]; hours [T] do not fall."""
    _, first, steps = np.unique(hours, return_index=True, return_counts=True)
    return np.add.reduceat(counts.astype(np.float64), first, axis=1) / steps[:, None]


def student_t(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the rows [rows, …], and half the width of its two-sided interval by Student's t; NaN for one row."""
    rows = len(values)
    mean = values.mean(axis=0)
    if rows < 2:
        return mean, np.full_like(mean, math.nan)
    return mean, student.ppf((1 + level) / 2, rows - 1) * values.std(axis=0, ddof=1) / math.sqrt(rows)


def figures_of(
    before_spec: EnvironmentSpec, after_spec: EnvironmentSpec, before: Mapping[str, Sample], after: Mapping[str, Sample]
) -> Figures:
    """The figures of returns, for `whatif.json`.

    before, after: who played in the world as demonstrated and in the changed one; `random`, `run`, `clone`, `imitator`,
    and the `expert` if there is one. The imitator is paired with the clone of its seed.
    """
    gain = Sample("seeds", after["imitator"].returns - after["clone"].returns, None)
    zero = float(after["random"].returns[:, 0].mean())
    range_ = float(after["expert"].returns[:, 0].mean()) - zero if "expert" in after else 0.0
    return {
        "unit": "true return per agent and episode",
        "level": RETURN_LEVEL,
        "before_returns": {name: _returns(sample, before_spec) for name, sample in before.items()},
        "returns": {name: _returns(sample, after_spec, zero, range_) for name, sample in after.items()},
        "imitator_minus_clone": _returns(gain, after_spec, 0.0, range_),
    }


def _returns(sample: Sample, spec: EnvironmentSpec, zero: float = 0.0, range_: float = 0.0) -> Figures:
    """`range_` is how far the expert is above what counts as `zero`; 0 where that is unknown."""
    mean, half = student_t(sample.returns, RETURN_LEVEL)
    of_all, *of_types = ({"mean": float(m), "interval": _ends(m, h)} for m, h in zip(mean, half, strict=True))
    return {
        **of_all,
        "over": f"{len(sample.returns)} {sample.over}",
        "normalized": (float(mean[0]) - zero) / range_ if range_ else None,
        "of_seeds": sample.returns[:, 0].tolist() if sample.over == "seeds" else None,
        "types": {kind.name: figures for kind, figures in zip(spec.types, of_types, strict=True)},
    }


def _ends(mean: float, half: float) -> list[float] | None:
    return None if math.isnan(half) else [float(mean - half), float(mean + half)]


def loads_of(berlin: Berlin, before: Mapping[str, Sample], after: Mapping[str, Sample]) -> Figures:
    """The figures of roads, for `whatif.json`: [H][R] by hour, [R] over the hours of the rush.

    Intervals are of the mean after the change: over seeds, so of what another seed of the same method would say, and
    over days where there is one policy only (the expert).
    """
    hours, scenario = np.unique(hours_of(berlin)), berlin.scenario
    edges = np.array([scenario.work_start_minute, scenario.work_end_minute]) / 60
    rush = (np.abs(hours[:, None] + 0.5 - edges) < RUSH_HOURS).any(axis=1)
    # If the day has no such hours, all of its hours are watched.
    rush = rush if rush.any() else ~rush
    return {
        "unit": "mean agents on the road",
        "vehicles_per_agent": scenario.vehicles_per_agent,
        "level": LOAD_LEVEL,
        "hours": hours.tolist(),
        "rush_hours": hours[rush].tolist(),
        "closed": list(berlin.changes.closed),
        "before": {
            name: {"hours": _listed(loads.mean(axis=0)), "rush": _listed(loads[:, rush].mean(axis=(0, 1)))}
            for name, loads in _watched(before)
        },
        "after": {
            name: {"hours": _interval(loads), "rush": _interval(loads[:, rush].mean(axis=1))}
            for name, loads in _watched(after)
        },
    }


def _watched(samples: Mapping[str, Sample]) -> list[tuple[str, np.ndarray]]:
    return [(name, sample.loads) for name, sample in samples.items() if sample.loads is not None]


def _interval(loads: np.ndarray) -> Figures:
    mean, half = student_t(loads, LOAD_LEVEL)
    known = not np.isnan(half).any()
    low, high = (_listed(end) if known else None for end in (mean - half, mean + half))
    return {"mean": _listed(mean), "low": low, "high": high}


def _listed(values: np.ndarray) -> list[Any]:
    listed: list[Any] = values.round(DECIMALS).tolist()
    return listed
