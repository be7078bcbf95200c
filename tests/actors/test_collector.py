from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bm3il.actors.collector import Collector, episodes_per_chunk, steps_per_iteration
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.process import build_policy
from bm3il.launch.config import load_preset
from bm3il.launch.topology import make_job
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.registry import make_environment

TOWER = "rover_tower?pairs=2"


def job_of(environment: str, actors: int = 1) -> Job:
    config = replace(load_preset("rover_tower_4"), environment=TOWER, actors=actors)
    return make_job(config, make_environment(environment, 1).spec, "", Path(), Endpoints("", "", "", ""))


def test_actors_share_an_iteration_in_whole_episodes() -> None:
    job, settings = job_of(TOWER, actors=3), replace(load_preset("rover_tower_4").actor, steps_per_iteration=200)
    assert job.spec.episode_length == 25
    assert episodes_per_chunk(settings, job) == 3
    assert steps_per_iteration(settings, job) == 225
    assert Collector(job, settings, 0).environment.num_envs == 3


def test_another_environment_than_the_launchers_is_refused() -> None:
    settings = load_preset("rover_tower_4").actor
    with pytest.raises(InputError, match=r"expected count 3, found 2; install the same version"):
        Collector(job_of("rover_tower?pairs=3"), settings, 0)
    described = job_of(TOWER)
    with pytest.raises(InputError, match="described in another way"):
        Collector(replace(described, spec=described.spec.plain()), settings, 0)


def test_every_actor_and_every_version_plays_episodes_of_its_own_the_same_each_time() -> None:
    job, settings = job_of(TOWER, actors=2), load_preset("rover_tower_4").actor
    policy = build_policy(job, settings)
    actors = [Collector(job, settings, index) for index in (0, 1, 0)]

    def starts(actor: int, version: int, *stream: int | str) -> bytes:
        return actors[actor].collect(policy, version, *stream).observations[0][0].tobytes()

    assert len({starts(actor, version) for actor in (0, 1) for version in (1, 2, 3)}) == 6
    assert starts(0, 1) == starts(2, 1)
    assert starts(0, 1, "async", 5) == starts(0, 2, "async", 5) != starts(0, 1, "async", 6)


def test_a_chunk_that_is_no_number_is_the_simulators_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = RoverTower.reset

    def broken(world: RoverTower, *args: object) -> TimeStep:
        now = reset(world, *args)  # type: ignore[arg-type]
        world._rover["own"][0, 0, 0] = np.nan
        return now

    monkeypatch.setattr(RoverTower, "reset", broken)
    job, settings = job_of(TOWER), load_preset("rover_tower_4").actor
    with pytest.raises(SimulatorError, match="is not finite"):
        Collector(job, settings, 0).collect(build_policy(job, settings), 1)
