"""The learner process, and the whole run in one process (`serial`)."""

from __future__ import annotations

from collections.abc import Callable

from bm3il.actors.process import build_policy
from bm3il.learner.algorithms import algorithm
from bm3il.learner.cloning import BehaviourCloning
from bm3il.learner.experience import Experience, LocalExperience, RemoteExperience
from bm3il.learner.imitation import Imitation, OffPolicyImitation, OnPolicyImitation
from bm3il.learner.settings import Settings
from bm3il.learner.streaming import StreamedExperience, StreamedOffPolicy, StreamedOnPolicy
from bm3il.learner.training import Iterated, Training
from bm3il.protocol.demonstrations import load_demonstrations
from bm3il.protocol.device import choose_device, use_threads
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server.client import LocalRewards, RemoteRewards, RewardService
from bm3il.reward_server.particles import state_table
from bm3il.reward_server.process import build_model

KINDS: dict[tuple[bool, bool], type[Imitation]] = {
    (False, False): OffPolicyImitation,
    (False, True): StreamedOffPolicy,
    (True, False): OnPolicyImitation,
    (True, True): StreamedOnPolicy,
}
"""By whether updates are clipped, and whether chunks stream."""


def run_learner(job: Job, settings: Settings, config_yaml: str, telemetry: Telemetry) -> str:
    """Train with actors and a reward server in other processes; returns the status, as `Training.run` does."""
    use_threads(settings.learner.threads)
    streams = job.mode == "async" and not algorithm(job.algorithm).clones
    # Of a run that clones, evaluations alone come this way.
    experience = (StreamedExperience if streams else RemoteExperience)(job, settings, telemetry)

    def rewards() -> RewardService:
        layout = Layout.of_job(job)
        # No `abort`: an iteration that has begun is ended, so that an interrupted run is as after a whole one.
        return RemoteRewards(
            job.endpoints.rewards,
            telemetry.sender,
            layout,
            state_table(layout, settings.reward),
            telemetry.count_drop,
            settings.learner.deadline_seconds,
            alone=job.mode != "async",
        )

    return _train(job, settings, config_yaml, experience, rewards, telemetry)


def run_serial(job: Job, settings: Settings, config_yaml: str, telemetry: Telemetry) -> str:
    """The same run with the same components in this process, to debug and to test: it ends with the same bits."""
    use_threads(settings.learner.threads)

    def rewards() -> RewardService:
        return LocalRewards(lambda: build_model(job, settings.reward))

    return _train(job, settings, config_yaml, LocalExperience(job, settings), rewards, telemetry)


def _train(
    job: Job,
    settings: Settings,
    config_yaml: str,
    experience: Experience,
    rewards: Callable[[], RewardService],
    telemetry: Telemetry,
) -> str:
    """`rewards` connects to the reward server, which a run that clones does not have."""
    policy, demonstrations = build_policy(job, settings.actor), load_demonstrations(job)
    if algorithm(job.algorithm).clones:
        if demonstrations is None:
            raise InputError("behaviour cloning needs demonstrations; name a file with --demonstrations")
        device = choose_device(settings.learner.device)
        run: Iterated = BehaviourCloning(policy, demonstrations, settings.cloning, device, job.seed, telemetry)
    else:
        kind = KINDS[settings.learner.policy == "clipped", job.mode == "async"]
        run = kind(job, settings, policy, demonstrations, experience, rewards(), telemetry)
    return Training(job, settings, run, experience, config_yaml, telemetry).run()
