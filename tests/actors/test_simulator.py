"""What an environment does wrong is told from what we do wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bm3il.actors import simulator
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.actors.simulator import Simulator
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import DeadlineError, InputError, SimulatorError

NAME = "rover_tower?pairs=2"


def failing(error: BaseException) -> Callable[..., TimeStep]:
    def step(*_: Any) -> TimeStep:
        raise error

    return step


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), OSError(28, "full"), ValueError("odd"), DeadlineError("ours?")]
)
@pytest.mark.parametrize("where", ["reset", "step"])
def test_what_it_raises_is_named_and_is_its_own_fault(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Simulator(NAME, 2)
    now = played.reset(0)
    monkeypatch.setattr(RoverTower, where, failing(error))
    text = f"environment '{NAME}' raised {type(error).__name__}: {error}"
    with pytest.raises(SimulatorError) as raised:
        played.reset(0) if where == "reset" else played.step([np.zeros(a.shape, np.int64) for a in now.active])
    assert str(raised.value) == text
    assert raised.value.__cause__ is error


def test_what_is_for_the_user_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean"):
        Simulator("rover_towr", 1)
    played = Simulator(NAME, 2)
    monkeypatch.setattr(RoverTower, "reset", failing(InputError("cannot start from there")))
    with pytest.raises(InputError, match="cannot start"):
        played.reset(0)


def test_an_environment_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "make_environment", failing(ConnectionRefusedError("nobody there")))
    with pytest.raises(SimulatorError, match=r"'rover_tower\?pairs=2' raised ConnectionRefusedError: nobody there"):
        Simulator(NAME, 2)


def test_numbers_that_are_none_are_its_fault_unless_they_are_rewards() -> None:
    played = Simulator(NAME, 2)
    trajectories = rollout(played, UniformPolicy(played.spec), 0)
    trajectories.arrays["0.rewards"][...] = np.nan
    played.check(trajectories)
    trajectories.arrays["0.own"][3, 0, 0] = np.nan
    with pytest.raises(SimulatorError, match=r"'rover_tower.pairs=2': type 'rover': an observation is not finite"):
        played.check(trajectories)


def test_it_tells_of_each_step_and_is_closed_whatever_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    played = Simulator(NAME, 2, lambda: steps.append(1))
    rollout(played, UniformPolicy(played.spec), 0)
    assert len(steps) == played.spec.episode_length
    closed: list[int] = []

    def close(self: RoverTower) -> None:
        closed.append(1)
        raise OSError("gone already")

    monkeypatch.setattr(RoverTower, "close", close, raising=False)
    played.close()
    assert closed == [1]


HANGING = """
import ctypes, io, sys, time
from bm3il.actors import simulator
from bm3il.actors.environments.rover_tower import RoverTower
simulator.DEAF_SECONDS = 0.5
sys.stderr = io.StringIO()  # has no file, as somebody's notebook may have it
RoverTower.reset = {how}
simulator.end_if_hung(0.5)
time.sleep(1)  # of our own work it does not matter how long it takes
simulator.Simulator("rover_tower?pairs=2", 1).reset(0)
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("lambda *_: time.sleep(60)", "has not come back from 'reset' for 0 s"),
        ("lambda *_: ctypes.PyDLL(None).sleep(60)", "Timeout"),  # it holds the interpreter: nobody can tell its name
    ],
    ids=["waits", "holds the interpreter"],
)
def test_a_process_whose_simulator_hangs_ends_with_its_stack(how: str, told: str) -> None:
    began = time.monotonic()
    program = [sys.executable, "-c", HANGING.format(how=how)]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=30)
    assert time.monotonic() - began < 25
    assert ended.returncode == 1
    assert told in ended.stderr
    assert "simulator.py" in ended.stderr  # where it was


def test_a_command_that_has_ended_is_watched_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another hang in the same process, which may be somebody's notebook, is not its business."""
    ended: list[str] = []
    monkeypatch.setattr(simulator, "_end", ended.append)
    with simulator.ending_if_hung(0.1):
        Simulator(NAME, 1).reset(0)
    monkeypatch.setattr(simulator._clock, "inside", (NAME, "step", time.monotonic() - 60))
    time.sleep(0.2)
    assert not ended
    with simulator.ending_if_hung(0.1):
        time.sleep(0.2)
    assert f"'{NAME}' has not come back from 'step'" in ended[0]
