"""What an actor does with one version of the policy."""

from __future__ import annotations

import math

from actors.babbling import Babble
from actors.policy import Policy
from actors.rollout import Acts, rollout
from actors.settings import ActorSettings
from protocol.errors import InputError
from protocol.job import Job
from protocol.registry import make_environment
from protocol.seeds import derive_seed
from protocol.trajectories import Trajectories


class Collector:
    """The share of one actor: E whole episodes per iteration, all environments stepped together."""

    def __init__(self, job: Job, settings: ActorSettings, index: int) -> None:
        """Raises InputError if this machine's environment is not the job's."""
        self._seed, self._index, self._settings = job.seed, index, settings
        self.environment = make_environment(job.environment, episodes_per_chunk(settings, job))
        if self.environment.spec != job.spec:
            difference = job.spec.difference(self.environment.spec) or "its observations are described in another way"
            raise InputError(
                f"'{job.environment}' is another environment here than where the run was started: {difference}; "
                "install the same version of it on every machine"
            )

    def collect(self, policy: Policy, version: int, *stream: int | str) -> Trajectories:
        """The chunk of these weights: a pure function of (weights, their version, run seed, actor index, stream).

        stream: what tells chunks of one version apart; in lockstep there is one chunk of each.
        The first versions are not played but babbled (`ActorSettings.babbling`).
        """
        seed = derive_seed(self._seed, "rollout", self._index, *(stream or (version,)))
        acting: Acts = policy
        if version < self._settings.babbling:
            acting = Babble(policy.layout, self._settings.hidden, self.environment.num_envs, seed)
        return rollout(self.environment, acting, seed)


def episodes_per_chunk(settings: ActorSettings, job: Job) -> int:
    """E: each actor's equal share of an iteration in whole episodes, rounded up."""
    return math.ceil(settings.steps_per_iteration / (job.actors * job.spec.episode_length))


def steps_per_iteration(settings: ActorSettings, job: Job) -> int:
    """Joint steps of an iteration, at most, over all actors together: whole episodes."""
    return job.actors * episodes_per_chunk(settings, job) * job.spec.episode_length
