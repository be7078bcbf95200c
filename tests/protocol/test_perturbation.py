"""Slip and noise, around any environment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import Perturbed, perturbed, unperturbed
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import Trajectories

BERLIN = "berlin?scenario=berlin46&types=5&agents=20&sight=near"
SPREAD = "pettingzoo:mpe2.simple_spread_v3?arguments=continuous_actions:true"
ENVS, ACTIONS = 500, 4


class Recorder:
    """Keeps what reaches it. Two `walker` have 4 actions, of which their masks allow 0 and 2, and the second one is
    inactive; one `glider` has 3 numbers."""

    spec = EnvironmentSpec("town", (TypeSpec("walker", 2, 1, ACTIONS), TypeSpec("glider", 1, 1, 3, False)), 10)
    num_envs = ENVS

    def __init__(self) -> None:
        self.done: list[list[np.ndarray]] = []
        self.closed = False

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        return self.now()

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        self.done.append([np.array(action) for action in actions])
        return self.now()

    def close(self) -> None:
        self.closed = True

    def now(self) -> TimeStep:
        shapes = [(ENVS, t.count) for t in self.spec.types]
        return TimeStep(
            observations=[np.zeros((*s, 1), np.float32) for s in shapes],
            action_masks=[np.tile([True, False, True, False], (ENVS, 2, 1)), np.ones((ENVS, 1, 3), bool)],
            active=[np.tile([True, False], (ENVS, 1)), np.ones((ENVS, 1), bool)],
            rewards=[np.zeros(s, np.float32) for s in shapes],
            terminated=np.zeros(ENVS, bool),
            truncated=np.zeros(ENVS, bool),
        )


def chosen() -> list[np.ndarray]:
    return [np.full((ENVS, 2), 2), np.full((ENVS, 1, 3), 0.5, np.float32)]


def played(slip: float, noise: float, seed: int = 0, steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """What became of `chosen`: of walkers [steps, E, 2], of gliders [steps, E, 1, 3]."""
    recorder = Recorder()
    environment = perturbed(recorder, slip, noise)
    environment.reset(seed)
    for _ in range(steps):
        environment.step(chosen())
    return np.stack([done[0] for done in recorder.done]), np.stack([done[1] for done in recorder.done])


def assert_same(one: Trajectories, other: Trajectories) -> None:
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def test_choices_slip_to_each_allowed_action_alike() -> None:
    walkers, gliders = played(slip=0.3, noise=0)
    first = walkers[..., 0]
    assert set(np.unique(first)) == {0, 2}, "forbidden actions are never taken"
    # Half of the slips lead to the choice itself; 10,000 draws have a standard error of 0.0036.
    assert (first == 0).mean() == pytest.approx(0.15, abs=0.015)
    assert (walkers[..., 1] == 2).all(), "inactive agents have nothing to slip"
    assert (gliders == np.float32(0.5)).all()


def test_all_slip_with_probability_one() -> None:
    assert (played(slip=1, noise=0)[0][..., 0] == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_noise_is_normal_and_clipped() -> None:
    walkers, gliders = played(slip=0, noise=0.1)
    assert (gliders - 0.5).std() == pytest.approx(0.1, rel=0.03)
    assert gliders.mean() == pytest.approx(0.5, abs=0.005)
    assert (walkers == 2).all()
    wide = played(slip=0, noise=3)[1]
    assert (wide.min(), wide.max(), wide.dtype) == (-1, 1, np.float32)


def test_the_seed_decides() -> None:
    first, again, other = played(0.3, 0.1), played(0.3, 0.1), played(0.3, 0.1, seed=1)
    for mine, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(mine, same)
        assert (mine != different).any()


def test_choices_stay_as_they_are() -> None:
    environment, actions = perturbed(Recorder(), 1, 1), chosen()
    environment.reset(0)
    environment.step(actions)
    for after, before in zip(actions, chosen(), strict=True):
        np.testing.assert_array_equal(after, before)


def test_the_rest_of_the_environment_is_the_same() -> None:
    recorder = Recorder()
    environment = perturbed(recorder, 0.5)
    assert isinstance(environment, Environment)
    assert unperturbed(environment) is recorder
    assert unperturbed(recorder) is recorder
    assert isinstance(environment, Perturbed)
    environment.close()
    assert recorder.closed


@pytest.mark.parametrize("name", [BERLIN, "rover_tower?pairs=2"])
def test_no_slip_is_no_option(name: str) -> None:
    plain, still = make_environment(name, 3), make_environment(f"{name}&slip=0", 3)
    assert still.spec == plain.spec
    assert_same(*(rollout(each, UniformPolicy(plain.spec), 5) for each in (plain, still)))


def test_a_slip_that_never_happens_changes_no_other_chance() -> None:
    plain, slipping = make_environment(BERLIN, 3), make_environment(f"{BERLIN}&slip=1e-12", 3)
    assert_same(*(rollout(each, UniformPolicy(plain.spec), 5) for each in (plain, slipping)))


def test_the_choice_is_what_is_recorded() -> None:
    environment = make_environment(f"{BERLIN}&slip=1", 3)
    trajectories = rollout(environment, UniformPolicy(environment.spec), 5)
    action, mask = trajectories.actions[0], trajectories.action_masks[0][:-1]
    assert np.take_along_axis(mask, action[..., None], axis=-1).all()
    # From a facility everybody goes where the action leads, but for who slipped.
    here, there = (trajectories.observations[0][t, ..., :56].argmax(axis=-1) for t in (0, 1))
    assert (here >= 46).all()
    assert (there != action[0]).any()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rover_tower?pairs=2&slip=0.05", "rover_tower?pairs=2"),
        (f"{BERLIN}&slip=0.0001", BERLIN),
        ("pettingzoo:mpe2.simple_spread_v3?types=agent_2,agent_0+agent_1&slip=1", None),
        (f"{SPREAD}&noise=0.25", SPREAD),
    ],
)
def test_the_name_makes_it_again(name: str, changes: str | None) -> None:
    spec = make_environment(name, 1).spec
    assert spec.name == name
    assert spec.changes == (changes or name.rpartition("&")[0])
    base = make_environment(spec.changes, 1).spec
    assert not base.changes
    assert base.difference(spec) is None


@pytest.mark.parametrize("name", [f"{BERLIN}&slip=0.2", f"{SPREAD}&noise=0.5", "rover_tower?pairs=2&slip=0.5"])
def test_it_keeps_the_contract(name: str) -> None:
    assert check_environment(name) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rover_tower?slip=1.01", r"slip must be a probability, in 0\.\.1, got 1\.01"),
        ("rover_tower?slip=-0.1", "slip must be a probability"),
        ("rover_tower?slip=nan", "slip must be a probability"),
        ("rover_tower?slip=often", "slip of environment rover_tower: expected a number"),
        ("rover_tower?noise=0.1", "noise is of continuous actions.*give slip=0.1"),
        (f"{SPREAD}&noise=-1", "noise must be a standard deviation"),
        (f"{SPREAD}&noise=nan", "noise must be a standard deviation"),
        (f"{SPREAD}&noise=inf", "noise must be a standard deviation"),
        (f"{SPREAD}&slip=0.1", "slip is of discrete actions.*give noise=0.1"),
        ("rover_tower?slp=0.1", "did you mean slip"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_environment(name, 1)
