"""Lockstep mode: which chunks the learner takes, and in which order."""

from __future__ import annotations

from pathlib import Path

import torch

from bm3il.actors.policy import Policy
from bm3il.actors.settings import ActorSettings
from bm3il.learner.experience import RemoteExperience
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.protocol.channels import Client
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Chunk, Done, Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories

ENVIRONMENT = "rover_tower?pairs=2"
SPEC = make_environment(ENVIRONMENT, 1).spec


def test_in_lockstep_chunks_are_of_the_weights_published_last_and_in_the_order_of_actors(tmp_path: Path) -> None:
    endpoints = Endpoints(*(f"ipc://{tmp_path}/{name}" for name in ("e", "w", "r", "c")))
    job = Job("run", tmp_path, ENVIRONMENT, SPEC, "", 0, "maac", "lockstep", 0, 1000, 2, "type", False, endpoints)
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    settings = Settings(LearnerSettings(deadline_seconds=3.0), actor=ActorSettings(steps_per_iteration=50, hidden=(4,)))
    experience = RemoteExperience(job, settings, telemetry)
    policy = Policy(Layout.of(SPEC, "type"), (4,), torch.Generator().manual_seed(0))
    actors = [Client(endpoints.experience, Sender("run", f"actor-{i}"), lambda _: {}, lambda _: None) for i in range(2)]

    def send(actor: int, version: int, mark: float) -> int:
        arrays = Trajectories.zeros(SPEC, 1).arrays
        arrays["0.own"][:] = mark
        ticket = actors[actor].submit(Chunk("s", version, 0, actor, SPEC.episode_length, 1, 0.0), arrays)
        experience._receive(1.0)
        return ticket

    for version in (0, 1):
        experience.publish("s", version, policy, 0)
    stale, *taken = send(0, 0, 9.0), send(1, 1, 1.0), send(0, 1, 0.0)
    chunks = experience.collect(lambda: None)
    assert [float(chunk.arrays["0.own"][0, 0, 0, 0]) for chunk in chunks] == [0.0, 1.0]
    notes = [actors[a].result(t, 3.0).body for a, t in ((0, stale), (1, taken[0]), (0, taken[1]))]
    assert notes == [Done("stale"), Done("taken"), Done("taken")]
    experience.close()
    for actor in actors:
        actor.close()
    telemetry.close()
