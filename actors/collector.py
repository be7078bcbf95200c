"""What an actor does with one version of the policy."""

from __future__ import annotations

import math

from actors.policy import Policy
from actors.rollout import rollout
from actors.settings import ActorSettings
from protocol.job import Job
from protocol.registry import make_environment
from protocol.seeds import derive_seed
from protocol.specs import EnvironmentSpec
from protocol.trajectories import Trajectories


class Collector:
    """The share of one actor: E whole episodes per iteration, all environments stepped together."""

    def __init__(self, job: Job, settings: ActorSettings, index: int) -> None:
        self._seed, self._index = job.seed, index
        spec = make_environment(job.environment, 1).spec
        self.environment = make_environment(job.environment, episodes_per_chunk(settings, spec, job.actors))

    def collect(self, policy: Policy, *stream: int | str) -> Trajectories:
        """The chunk of this stream, in lockstep the version: a pure function of (weights, run seed, actor index,
        stream)."""
        return rollout(self.environment, policy, derive_seed(self._seed, "rollout", self._index, *stream))


def episodes_per_chunk(settings: ActorSettings, spec: EnvironmentSpec, actors: int) -> int:
    """E: each actor's equal share of an iteration in whole episodes, rounded up."""
    return math.ceil(settings.steps_per_iteration / (actors * spec.episode_length))
