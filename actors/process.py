"""The actor and evaluator processes: newest weights in, chunks or returns out."""

from __future__ import annotations

import time
from typing import Any

import torch

from actors.collector import Collector
from actors.evaluation import Evaluator
from actors.metrics import ActorMetrics, EvaluatorMetrics
from actors.policy import Policy
from actors.settings import ActorSettings, EvaluationSettings
from protocol.channels import Client, Listener, Refused
from protocol.errors import InputError
from protocol.job import Job
from protocol.layout import Layout
from protocol.messages import Chunk, Done, Evaluation, Refusal, Weights
from protocol.registry import make_environment
from protocol.seeds import derive_seed
from protocol.telemetry import Telemetry
from protocol.trajectories import ArrayTable

POLL_SECONDS = 0.2


def run_actor(job: Job, settings: ActorSettings, index: int, telemetry: Telemetry) -> None:
    """Collect one chunk per policy version and send it until it is acknowledged; ends when told to stop."""
    torch.set_num_threads(job.threads)
    collector = Collector(job, settings, index)
    policy = build_policy(job, settings)
    weights, learner = _connect(job, policy, telemetry)
    metrics = ActorMetrics(telemetry.registry)
    collected: tuple[str, int] | None = None
    while not telemetry.stop.is_set():
        with telemetry.stage("wait_for_weights"):
            message = weights.newest(POLL_SECONDS)
            _pump(learner)
        if message is None or (message.body.session, message.body.version) == collected:
            continue
        learner.forget()  # a chunk of an older version is of no use to anybody
        policy.load_arrays(message.arrays)
        start = time.perf_counter()
        with telemetry.stage("collect"):
            chunk = collector.collect(policy, message.body.version)
        collected = (message.body.session, message.body.version)
        metrics.count(chunk, message.body.version, learner.pending)
        steps, episodes = chunk.terminated.shape
        body = Chunk(*collected, index, steps, episodes, time.perf_counter() - start)
        learner.submit(body, chunk.to_arrays())


def run_evaluator(
    job: Job, actor_settings: ActorSettings, evaluation_settings: EvaluationSettings, telemetry: Telemetry
) -> None:
    """Report the true return of every policy version that is marked for evaluation, in their order."""
    torch.set_num_threads(job.threads)
    policy = build_policy(job, actor_settings)
    weights, learner = _connect(job, policy, telemetry)
    metrics = EvaluatorMetrics(telemetry.registry)
    evaluator = Evaluator(job, evaluation_settings)
    done: tuple[str, int] | None = None
    while not telemetry.stop.is_set():
        with telemetry.stage("wait_for_weights"):
            message = weights.next(POLL_SECONDS)
            _pump(learner)
        if message is None or not message.body.evaluate_episodes:
            continue
        if (message.body.session, message.body.version) == done:
            continue
        policy.load_arrays(message.arrays)
        start = time.perf_counter()
        with telemetry.stage("evaluate"):
            returns = evaluator.returns(policy, message.body.evaluate_episodes)
        metrics.count(returns, message.body.version)
        done = (message.body.session, message.body.version)
        learner.submit(Evaluation(*done, len(returns), time.perf_counter() - start), {"returns": returns})


def _pump(learner: Client) -> None:
    try:
        learner.pump()
    except Refused as refusal:  # by a learner that cannot read this process: another release
        raise InputError(f"the learner refuses what this process sends: {refusal}") from refusal


def build_policy(job: Job, settings: ActorSettings) -> Policy:
    """The policy networks of the job, at the start that its seed gives."""
    layout = Layout.of(make_environment(job.environment, 1).spec, job.parameter_sharing)
    generator = torch.Generator().manual_seed(derive_seed(job.seed, "policy"))
    return Policy(layout, settings.hidden, generator, settings.agent_identity)


def _connect(job: Job, policy: Policy, telemetry: Telemetry) -> tuple[Listener, Client]:
    def weights_schema(body: Any) -> ArrayTable | None:
        return policy.array_table() if isinstance(body, Weights) else None

    def answer_schema(body: Any) -> ArrayTable | None:
        return {} if isinstance(body, Done | Refusal) else None

    weights = Listener(job.endpoints.weights, telemetry.sender, weights_schema, telemetry.count_drop)
    learner = Client(job.endpoints.experience, telemetry.sender, answer_schema, telemetry.count_drop)
    return weights, learner
