"""What a few runs say of a method: figures that one lucky seed does not carry, with intervals.

They are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021).
Scores come in strata, the tasks on which methods are compared: an array [runs, …] of each, as many runs as there are.
The library that goes with the paper, rliable, brings pandas, seaborn and statsmodels, and cannot be imported beside
today's pandas; a test holds its numbers against these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
# Fewer for a curve, whose draws are of all its points: [repetitions, runs, points] numbers in memory.
REPETITIONS, CURVE_REPETITIONS = 10_000, 1_000
SEED = 0
"""Of the bootstrap: the same runs have the same intervals."""

Strata = Sequence[np.ndarray]


def interquartile_mean(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean of what is left without the lowest and the highest quarter along an axis; of n scores each quarter is
    n/4 rounded down."""
    ordered = np.sort(scores, axis=axis)
    count = ordered.shape[axis]
    inner: np.ndarray = np.take(ordered, np.arange(count // 4, count - count // 4), axis=axis).mean(axis=axis)
    return inner


def resampled(strata: Strata, repetitions: int, random: np.random.Generator) -> list[np.ndarray]:
    """Of each stratum as many runs as it has, drawn with replacement, so many times: [repetitions, runs, …] each."""
    return [scores[random.integers(len(scores), size=(repetitions, len(scores)))] for scores in strata]


def interquartile_mean_interval(strata: Strata, repetitions: int = REPETITIONS) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the stratified percentile bootstrap's interval of the interquartile mean over all runs of all strata
    [runs, …]; the form of … each. NaN where no stratum has two runs, since nothing is known of how they differ."""
    if max(map(len, strata)) < 2:
        unknown = np.full(strata[0].shape[1:], np.nan)
        return unknown, unknown
    drawn = np.concatenate(resampled(strata, repetitions, np.random.default_rng(SEED)), axis=1)
    return _ends(interquartile_mean(drawn, axis=1))


def mean_of_tasks(strata: Strata) -> float:
    """The mean of the tasks' interquartile means: where tasks are unlike, the interquartile mean of all runs would cut
    off whole tasks as its outliers."""
    return float(np.mean([interquartile_mean(scores) for scores in strata]))


def mean_of_tasks_interval(strata: Strata, repetitions: int = REPETITIONS) -> tuple[float, float]:
    """Both ends of its interval, by the same bootstrap; NaN where no stratum has two runs."""
    if max(map(len, strata)) < 2:
        return float("nan"), float("nan")
    drawn = resampled(strata, repetitions, np.random.default_rng(SEED))
    low, high = _ends(np.mean([interquartile_mean(scores, axis=1) for scores in drawn], axis=0))
    return float(low), float(high)


def improvement(ours: Strata, theirs: Strata) -> float:
    """The probability that a run of ours is better than one of theirs on the same task, mean over tasks; of equal ones
    half (Mann-Whitney's U, divided by the number of pairs). Both have the same strata, [runs] each."""
    return float(_improvement(ours, theirs))


def improvement_interval(ours: Strata, theirs: Strata, repetitions: int = REPETITIONS) -> tuple[float, float]:
    """Both ends of its bootstrapped interval; NaN where no stratum has two runs on either side."""
    if max(map(len, (*ours, *theirs))) < 2:
        return float("nan"), float("nan")
    # One generator for both sides: with the same numbers for each, runs of the same position would go in pairs.
    random = np.random.default_rng(SEED)
    low, high = _ends(_improvement(*(resampled(side, repetitions, random) for side in (ours, theirs))))
    return float(low), float(high)


def _improvement(ours: Strata, theirs: Strata) -> np.ndarray:
    """Over the last axis of each stratum."""
    of_strata = [
        ((x[..., :, None] > y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :])).mean(axis=(-2, -1))
        for x, y in zip(ours, theirs, strict=True)
    ]
    probability: np.ndarray = np.mean(of_strata, axis=0)
    return probability


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def area_under(steps: np.ndarray, scores: np.ndarray) -> float:
    """The mean height of a curve [points] between its first step and its last; NaN if it has no two steps."""
    if len(steps) < 2 or steps[-1] == steps[0]:
        return float("nan")
    heights = (scores[1:] + scores[:-1]) / 2
    return float((heights * np.diff(steps)).sum() / (steps[-1] - steps[0]))


def first_at(steps: np.ndarray, scores: np.ndarray, level: float) -> float:
    """The first step at which a curve [points] was at a level or above; NaN if it never was."""
    reached = np.flatnonzero(scores >= level)
    return float(steps[reached[0]]) if len(reached) else float("nan")


def on_common_steps(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [P] that all of the curves (steps, scores) cover, and their scores there [curves, P]: in between, lines."""
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    return steps, np.stack([np.interp(steps, *curve) for curve in curves])
