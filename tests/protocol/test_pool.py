"""Environments whose copies are divided among processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("gymnasium")

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.actors.simulator import Simulator
from bm3il.protocol import pool
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.pool import Pool
from bm3il.protocol.registry import make_environment
from bm3il.protocol.trajectories import Trajectories

HERE = str(Path(__file__).parent)
SMALL = "gymnasium:small_worlds:Small-v0"
ENTRY_POINTS = "[bm3il.environments]\nown_town = own_town:OwnTown\n"
PARENT = f"""
from bm3il.protocol.registry import make_environment
import numpy as np
environment = make_environment("{SMALL}?arguments=bad_step:2,fault:hang&processes=2", 2)
environment.reset(0)
environment.step([np.zeros((2, 1), int)])
print("stepping", flush=True)
environment.step([np.zeros((2, 1), int)])
"""


@pytest.fixture(autouse=True)
def own_worlds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modules beside this one, and a package that names an environment."""
    (tmp_path / "own_town-1.dist-info").mkdir()
    (tmp_path / "own_town-1.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(str(tmp_path))


def pooled(name: str, num_envs: int) -> Pool:
    environment = unperturbed(make_environment(name, num_envs))
    assert isinstance(environment, Pool)
    return environment


def played(environment: Environment, seed: int) -> Trajectories:
    return rollout(environment, UniformPolicy(environment.spec), seed)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "bm3il.protocol.share" in " ".join(child.cmdline())]


def assert_same(one: Trajectories, other: Trajectories) -> None:
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def step(environment: Environment) -> None:
    environment.step([np.zeros((environment.num_envs, 1), int)])


def test_the_results_are_those_of_one_process_and_come_sooner() -> None:
    name = f"{SMALL}?arguments=observed:dict,masked:some,seconds:0.03&slip=0.3"
    one, divided = make_environment(name, 5), make_environment(f"{name}&processes=2", 5)
    assert divided.spec == one.spec, "it is the same world"
    for seed in (0, 1):
        assert_same(played(one, seed), played(divided, seed))
    seconds = []
    divided.reset(2)
    for _ in range(2):
        start = time.monotonic()
        step(divided)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 5 * 0.03, "no faster than one after the other"
    divided.close()  # type: ignore[attr-defined]
    assert not children()


def test_environments_of_pettingzoo_can_be_divided() -> None:
    name = "pettingzoo:mpe2.simple_tag_v3?arguments=max_cycles:4"
    one, divided = make_environment(name, 3), pooled(f"{name}&processes=2", 3)
    assert divided.spec == one.spec
    assert_same(played(one, 5), played(divided, 5))
    divided.close()


def test_own_environments_can_be_divided_with_all_that_they_observe_and_start_from() -> None:
    one, divided = make_environment("own_town?cars=3", 3), pooled("own_town?cars=3&processes=2", 3)
    assert divided.spec == one.spec
    assert_same(played(one, 5), played(divided, 5))
    hours = {"hours": np.array([7.0, 12.5, 23.0])}
    now = divided.reset(0, hours)
    assert now.columns is not None
    assert now.columns[0]["shared"].tolist() == [[7], [12.5], [23]]
    with pytest.raises(InputError, match=r"^expected hours, got days$"):
        divided.reset(0, {"days": np.zeros(3)})
    assert divided.reset(0, hours).observations[0].shape == (3, 3, 10), "which is no reason to end"
    divided.close()


def test_what_goes_wrong_in_a_child_is_told_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Simulator(f"{SMALL}?arguments=bad_step:1&processes=2", 3)
    environment.reset(0)
    with pytest.raises(SimulatorError) as raised:
        step(environment)
    world = f"environment '{environment.spec.name}'"
    assert str(raised.value) == f"{world} raised ValueError: the land has no such place (with copies 0..0)"
    assert "in go_wrong" in str(raised.value.__cause__)
    os.kill(children()[1].pid, signal.SIGKILL)
    with pytest.raises(SimulatorError, match=r"the process of its copies 1\.\.2 has ended, with code -9"):
        environment.reset(0)
    monkeypatch.setattr(pool, "CLOSE_SECONDS", 0.5)
    os.kill(children()[0].pid, signal.SIGSTOP)
    environment.close()
    assert not children(), "one that does not answer is killed"


def test_what_cannot_be_made_is_said_as_without_children() -> None:
    with pytest.raises(InputError, match=r"Small-v0 cannot be made: RuntimeError: no such land$"):
        make_environment(f"{SMALL}?arguments=fault:make&processes=2", 2)
    assert not children()


@pytest.mark.processes
def test_children_end_with_their_parent_whatever_they_do() -> None:
    command = [sys.executable, "-c", f"import sys\nsys.path[:] = {sys.path!r}\n{PARENT}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"stepping\n"
        left = psutil.Process(parent.pid).children()
        assert len(left) == 2
        parent.kill()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


def test_one_copy_needs_no_child() -> None:
    assert not isinstance(make_environment(f"{SMALL}?processes=4", 1), Pool)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{SMALL}?processes=0", "expected processes ≥ 1, got 0"),
        (f"{SMALL}?processes=many", "processes of environment gymnasium: expected an integer"),
        (f"{SMALL}?proceses=2", "did you mean processes"),
        (f"{SMALL}?first_copy=1", "unknown option of environment gymnasium 'first_copy'"),
        ("rover_tower?processes=2", "the copies of environment 'rover_tower' cannot be divided among processes"),
    ],
)
def test_what_cannot_be_divided_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_environment(name, 2)
