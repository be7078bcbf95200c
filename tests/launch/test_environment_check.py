"""`bm3il check-environment` finds descriptions that do not fit what is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.launch import environment_check
from bm3il.launch.environment_check import check_environment
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError

Change = Callable[[TimeStep], TimeStep]


class Told(RoverTower):
    """Rover Tower whose time steps are told otherwise."""

    def __init__(self, num_envs: int, change: Change) -> None:
        super().__init__(num_envs, pairs=2)
        self._change = change

    def reset(self, seed: int, starts: object = None) -> TimeStep:
        return self._change(super().reset(seed))

    def step(self, actions: object) -> TimeStep:
        return self._change(super().step(actions))  # type: ignore[arg-type]


def with_column(b: int, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(step: TimeStep) -> TimeStep:
        columns = [dict(block) for block in step.columns or []]
        columns[b][name] = change(columns[b][name])
        return replace(step, columns=columns)

    return changed


def without(name: str) -> Change:
    def changed(step: TimeStep) -> TimeStep:
        columns = [{key: c for key, c in block.items() if key != name} for block in step.columns or []]
        return replace(step, columns=columns, observations=list(step.observations))

    return changed


def dense_too(step: TimeStep) -> TimeStep:
    return replace(step, observations=list(step.observations), action_masks=list(step.action_masks))


def shown_otherwise(step: TimeStep) -> TimeStep:
    step = dense_too(step)
    step.observations[1][0, 0, -1] += 1
    return step


def masked_otherwise(step: TimeStep) -> TimeStep:
    masks = [mask.copy() for mask in step.action_masks]
    masks[0][0, 0, 1] = False
    return replace(step, action_masks=masks)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], int]:
    def run(change: Change) -> int:
        monkeypatch.setattr(environment_check, "make_environment", lambda name, envs: Told(envs, change))
        return check_environment("told")

    return run


def test_one_that_shows_what_it_describes_passes(check: Callable[[Change], int]) -> None:
    assert check(lambda step: step) == check(dense_too) == 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (shown_otherwise, "observations of type 'tower' are what its spec makes of the columns"),
        (masked_otherwise, "action masks of type 'rover' are what its spec makes of the columns"),
        (with_column(0, "codes", lambda codes: codes + np.uint8(9)), "codes in their range"),
        (with_column(1, "own", lambda own: np.full_like(own, np.nan)), "finite numbers"),
        (with_column(1, "own", lambda own: own.astype(np.float64)), "column 'own' of agents like 'tower' are float32"),
        (with_column(0, "codes", lambda codes: codes[..., :1]), "column 'codes' of agents like 'rover' are uint8"),
        (without("codes"), "the columns of agents like 'rover' are"),
        (lambda step: replace(step, columns=None, observations=list(step.observations)), "must hold `columns`"),
    ],
)
def test_one_that_does_not_is_told_so(check: Callable[[Change], int], change: Change, found: str) -> None:
    with pytest.raises(InputError, match=found):
        check(change)
