"""What is told of recordings that do not look like the world they are to be imitated in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Starts, TimeStep
from bm3il.protocol.likeness import unlike
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

STEPS, NURSES, DOCTORS = 12, 2, 3
FIELDS = "observations", "action_masks", "active"
PARTS = (Part("queue", 1), Part("beds", 1), Part("clock", 1))


class Ward:
    """Nurses and doctors see a queue, drawn anew in every step, a number of beds, always the same, and the clock.

    unit: what the clock is counted in.   beds: how many.   masked: whether doctors may not do the last of two things.
    """

    def __init__(self, unit: float = 1.0, beds: float = 1.0, masked: bool = False) -> None:
        self.num_envs, self.unit, self.beds, self.masked = 1, unit, beds, masked
        kinds = [TypeSpec(name, count, 3, 2, parts=PARTS) for name, count in (("nurse", NURSES), ("doctor", DOCTORS))]
        self.spec = EnvironmentSpec("ward", tuple(kinds), STEPS)
        self.resets = self.steps = 0

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        self.random, self.now = np.random.default_rng(seed), 0
        self.resets += 1
        return self.shown()

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        assert not (self.masked and actions[1].any()), "a forbidden action"
        self.now += 1
        self.steps += 1
        return self.shown()

    def shown(self) -> TimeStep:
        counts = NURSES, DOCTORS
        seen = [np.full((1, n, 3), (0, self.beds, self.now * self.unit), np.float32) for n in counts]
        for each in seen:
            each[..., 0] = self.random.uniform(size=each.shape[:2])
        masks = [np.ones((1, n, 2), bool) for n in counts]
        masks[1][..., 1] = not self.masked
        ended, nobody = np.full(1, self.now == STEPS), np.zeros(1, bool)
        active = [np.ones((1, n), bool) for n in counts]
        return TimeStep(seen, masks, active, [np.zeros((1, n), np.float32) for n in counts], nobody, ended)


class Fewer(Ward):
    """The last of each kind is away: it shows zeros, and may do nothing."""

    def shown(self) -> TimeStep:
        now = super().shown()
        for m in (0, 1):
            now.active[m][:, -1] = False
            now.observations[m][:, -1] = 0
            now.action_masks[m][:, -1] = False
        return now


def recorded_in(ward: Ward, episodes: int = 1) -> Demonstrations:
    shown = []
    for seed in range(episodes):
        shown.append(ward.reset(100 + seed))
        shown += [ward.step([np.zeros((1, NURSES), int), np.zeros((1, DOCTORS), int)]) for _ in range(STEPS - 1)]
    rows = len(shown)
    per_type = [[np.concatenate([getattr(now, name)[m] for now in shown]) for m in (0, 1)] for name in FIELDS]
    return Demonstrations.of_types(
        ward.spec,
        "",
        per_type[0],
        [np.zeros((rows, n), int) for n in (NURSES, DOCTORS)],
        *per_type[1:],
        episode_lengths=np.full(episodes, STEPS),
        returns=np.zeros((episodes, NURSES + DOCTORS), np.float32),
        groups=np.arange(episodes),
    )


@pytest.mark.parametrize("episodes", [1, 20])
def test_recordings_of_the_same_world_look_like_it(episodes: int) -> None:
    assert unlike(recorded_in(Ward(masked=True), episodes), Ward(masked=True), steps=True) == []


def test_of_starts_is_told_what_is_constant_and_another() -> None:
    (hint,) = unlike(recorded_in(Ward(beds=6.0)), Ward(), steps=False)
    assert hint == (
        "for 'nurse' the recordings begin with other numbers than the environment: beds 6 (there 1). Has one side "
        "another unit, or another order of its columns? (1 more types are like it)"
    )


def test_another_unit_is_told_that_shows_only_later() -> None:
    recorded = recorded_in(Ward(unit=60.0))
    assert unlike(recorded, Ward(), steps=False) == []
    (hint,) = unlike(recorded, Ward(), steps=True)
    assert "clock 0 to 660 (there 0 to 12)" in hint
    (hint,) = unlike(recorded_in(Ward()), Ward(unit=60.0), steps=True)
    assert "clock 0 to 11 (there 0 to 720)" in hint


def test_what_is_small_on_both_sides_may_differ() -> None:
    assert unlike(recorded_in(Ward(unit=0.001)), Ward(unit=0.1), steps=True) == []


def test_recordings_without_the_masks_of_the_world_are_told() -> None:
    (hint,) = unlike(recorded_in(Ward()), Ward(masked=True), steps=True)
    assert hint.startswith("masks of 'doctor' were not written down, and 'ward' forbids some actions")


def test_a_slow_world_is_reset_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bm3il.protocol.likeness.SECONDS", 0.0)
    ward = Ward(beds=6.0)
    assert len(unlike(recorded_in(Ward()), ward, steps=True)) == 1
    assert (ward.resets, ward.steps) == (2, 0)


def test_what_those_show_who_are_away_hides_nothing_and_means_nothing() -> None:
    (hint,) = unlike(recorded_in(Fewer(beds=6.0)), Fewer(), steps=False)
    assert "beds 6 (there 1)" in hint
    assert unlike(recorded_in(Fewer()), Ward(), steps=False) == []
    (hint,) = unlike(recorded_in(Fewer()), Ward(masked=True), steps=True)
    assert hint.startswith("masks of 'doctor' were not written down")
    assert unlike(recorded_in(Ward()), Fewer(), steps=True) == []
