"""The learner process, and the whole run in one process (`serial`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actors.policy import Policy
from actors.process import build_policy
from actors.settings import ActorSettings, EvaluationSettings
from learner.algorithms import algorithm
from learner.cloning import BehaviourCloning
from learner.experience import Experience, LocalExperience, RemoteExperience
from learner.imitation import Imitation, OffPolicyImitation, OnPolicyImitation
from learner.record import RunRecord
from learner.settings import CloningSettings, LearnerSettings
from learner.streaming import StreamedExperience, StreamedOffPolicy, StreamedOnPolicy
from learner.training import Iterated, Training, iterations_for
from protocol.demonstrations import load_demonstrations
from protocol.device import choose_device
from protocol.errors import InputError
from protocol.job import Job
from protocol.telemetry import Telemetry
from reward_server.client import LocalRewards, RemoteRewards, RewardService
from reward_server.particles import state_table
from reward_server.process import build_model
from reward_server.settings import RewardSettings

KINDS: dict[tuple[bool, bool], type[Imitation]] = {
    (False, False): OffPolicyImitation,
    (False, True): StreamedOffPolicy,
    (True, False): OnPolicyImitation,
    (True, True): StreamedOnPolicy,
}
"""By whether updates are clipped, and whether chunks stream."""


def run_learner(
    job: Job,
    settings: LearnerSettings,
    cloning: CloningSettings,
    actor: ActorSettings,
    reward: RewardSettings,
    evaluation: EvaluationSettings,
    config_yaml: str,
    telemetry: Telemetry,
) -> str:
    """Train with actors and a reward server in other processes; returns the status, as `Training.run` does."""
    torch.set_num_threads(job.threads)
    policy = build_policy(job, actor)
    experience: RemoteExperience
    if job.mode == "async" and not algorithm(job.algorithm).clones:
        lag, deadline_seconds = settings.max_policy_lag, settings.deadline_seconds
        experience = StreamedExperience(job, policy, actor, lag, deadline_seconds, telemetry)
    else:  # of a run that clones, evaluations alone come this way
        experience = RemoteExperience(job, policy, actor, settings.deadline_seconds, telemetry)

    def rewards() -> RewardService:
        return RemoteRewards(
            job.endpoints.rewards,
            telemetry.sender,
            policy.layout,
            state_table(policy.layout, reward, actor.agent_identity),
            telemetry.count_drop,
            settings.deadline_seconds,
            alone=job.mode != "async",
        )

    return _train(job, settings, cloning, actor, evaluation, config_yaml, experience, rewards, policy, telemetry)


def run_serial(
    job: Job,
    settings: LearnerSettings,
    cloning: CloningSettings,
    actor: ActorSettings,
    reward: RewardSettings,
    evaluation: EvaluationSettings,
    config_yaml: str,
    telemetry: Telemetry,
) -> str:
    """The same run with the same components in this process, to debug and to test: it ends with the same bits."""
    torch.set_num_threads(job.threads)
    policy = build_policy(job, actor)
    experience = LocalExperience(job, actor, evaluation)

    def rewards() -> RewardService:
        return LocalRewards(lambda: build_model(job, reward, actor.agent_identity))

    return _train(job, settings, cloning, actor, evaluation, config_yaml, experience, rewards, policy, telemetry)


def _train(
    job: Job,
    settings: LearnerSettings,
    cloning: CloningSettings,
    actor: ActorSettings,
    evaluation: EvaluationSettings,
    config_yaml: str,
    experience: Experience,
    rewards: Callable[[], RewardService],
    policy: Policy,
    telemetry: Telemetry,
) -> str:
    """`rewards` connects to the reward server, which a run that clones does not have."""
    demonstrations = load_demonstrations(job, policy.layout.spec)
    if algorithm(job.algorithm).clones:
        if demonstrations is None:
            raise InputError("behaviour cloning needs demonstrations; name a file with --demonstrations")
        device = choose_device(job.device)
        algorithm_run: Iterated = BehaviourCloning(policy, demonstrations, cloning, device, job.seed, telemetry)
        iterations = cloning.iterations
    else:
        kind = KINDS[settings.policy == "clipped", job.mode == "async"]
        algorithm_run = kind(job, settings, cloning, actor, policy, demonstrations, experience, rewards(), telemetry)
        iterations = iterations_for(job.steps, actor, job, policy)
    record = RunRecord(job.run_folder)
    return Training(
        job, settings, evaluation, iterations, algorithm_run, experience, record, config_yaml, telemetry
    ).run()
