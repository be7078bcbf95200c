"""What an actor does with one version of the policy."""

from __future__ import annotations

import math
from collections.abc import Callable

from bm3il.actors.babbling import Babble
from bm3il.actors.policy import Policy
from bm3il.actors.rollout import Acts, rollout
from bm3il.actors.settings import ActorSettings
from bm3il.actors.simulator import Simulator
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Job
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.trajectories import Trajectories


class Collector:
    """The share of one actor: E whole episodes per iteration, all environments stepped together."""

    def __init__(
        self, job: Job, settings: ActorSettings, index: int, after_step: Callable[[], None] = lambda: None
    ) -> None:
        """after_step: called whenever the environments have come back from a step.

        Raises InputError if this machine's environment is not the job's.
        """
        self._seed, self._index, self._settings = job.seed, index, settings
        self.environment = Simulator(job.environment, episodes_per_chunk(settings, job), after_step)
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
        Raises SimulatorError if the environment fails.
        """
        seed = derive_seed(self._seed, "rollout", self._index, *(stream or (version,)))
        acting: Acts = policy
        if version < self._settings.babbling:
            # Made anew from the chunk's own seed: what an actor played before has no part in it.
            acting = Babble(policy.layout, self._settings.hidden, self.environment.num_envs, seed)
        played = rollout(self.environment, acting, seed)
        # Here, although the learner checks it again: that one can only drop the chunk, and would then wait in vain for
        # another, from an actor that nobody blames.
        self.environment.check(played)
        return played


def episodes_per_chunk(settings: ActorSettings, job: Job) -> int:
    """E: each actor's equal share of an iteration in whole episodes, rounded up."""
    return math.ceil(settings.steps_per_iteration / (job.actors * job.spec.episode_length))


def steps_per_iteration(settings: ActorSettings, job: Job) -> int:
    """Joint steps of an iteration, at most, over all actors together: whole episodes."""
    return job.actors * episodes_per_chunk(settings, job) * job.spec.episode_length
