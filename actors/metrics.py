"""What an actor and an evaluator tell Prometheus."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge

from bm3il.protocol.trajectories import Trajectories


class ActorMetrics:
    """`bm3il_actor_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"bm3il_actor_{name}", text, registry=registry)

        self._env_steps = Counter(
            "bm3il_actor_env_steps", "Joint environment steps played (all agents of one environment)", registry=registry
        )
        self._episodes = Counter("bm3il_actor_episodes", "Whole episodes played", registry=registry)
        self._episode_return = gauge(
            "episode_return", "True return per agent and episode, mean over the last chunk; never trained on"
        )
        self._policy_version = gauge("policy_version", "Iterations of the policy that acted last")
        self._unacknowledged = gauge("unacknowledged_chunks", "Chunks not taken when the last one was sent")
        self._bytes = Counter(
            "bm3il_actor_sent_bytes",
            "Bytes of messages to the learner, those that were sent again by themselves",
            ["kind"],
            registry=registry,
        )

    def count_bytes(self, kind: str, count: int) -> None:
        """As `protocol.channels.CountBytes`."""
        self._bytes.labels(kind).inc(count)

    def count(self, chunk: Trajectories, version: int, unacknowledged: int) -> None:
        """Count a collected chunk."""
        self._env_steps.inc(chunk.num_steps)
        self._episodes.inc(chunk.num_episodes)
        self._episode_return.set(float(chunk.returns().mean()))
        self._policy_version.set(version)
        self._unacknowledged.set(unacknowledged)


class EvaluatorMetrics:
    """`bm3il_evaluator_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._episodes = Counter(
            "bm3il_evaluator_episodes", "Whole episodes played with policies of the run", registry=registry
        )
        self._episode_return = Gauge(
            "bm3il_evaluator_episode_return",
            "True return per agent and episode, mean of one evaluation",
            registry=registry,
        )
        self._policy_version = Gauge(
            "bm3il_evaluator_policy_version", "Iterations of the policy evaluated last", registry=registry
        )

        self.skipped = Counter(
            "bm3il_evaluator_skipped_policies",
            "Policies that were to be evaluated, and waited too long for their turn",
            registry=registry,
        )

    def count(self, returns: np.ndarray, version: int) -> None:
        """Count an evaluation; returns: [episodes, N]."""
        self._episodes.inc(len(returns))
        self._episode_return.set(float(returns.mean()))
        self._policy_version.set(version)
