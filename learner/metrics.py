"""What the learner tells Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class LearnerMetrics:
    """`bm3il_learner_*`; the seconds of each stage are in `bm3il_learner_stage_seconds`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"bm3il_learner_{name}", text, registry=registry)

        self._env_steps = gauge("env_steps", "Joint environment steps trained on since the start of the run")
        self._policy_version = gauge("policy_version", "Iterations done: the version of the newest weights")
        self._episode_return = gauge(
            "episode_return", "True return per agent and episode, mean of the last evaluation; never trained on"
        )
        self._type_return = Gauge(
            "bm3il_learner_type_return",
            "True return per agent of a type and episode, mean of the last evaluation, where there are several types",
            ["type"],
            registry=registry,
        )
        self._figures = Gauge(
            "bm3il_learner_figure",
            "Means over the last iteration, by name as in log.jsonl: losses, entropies (nats), reward of a step",
            ["name"],
            registry=registry,
        )
        self.rewinds = Counter(
            "bm3il_learner_rewinds", "Times the run went back to a checkpoint (reward server lost)", registry=registry
        )

    def count_evaluation(self, mean: float, types: Mapping[str, Mapping[str, float | None]]) -> None:
        """Publish true returns: of all agents, and `return_mean` of each type."""
        self._episode_return.set(mean)
        for name, told in types.items():
            # The mean is always there (`Scale.of_types`); only others of these figures may be None.
            self._type_return.labels(name).set(told["return_mean"] or 0.0)

    def count_iteration(self, iteration: int, env_steps: int, figures: dict[str, float]) -> None:
        """Publish the figures of an iteration."""
        self._policy_version.set(iteration)
        self._env_steps.set(env_steps)
        for name, value in figures.items():
            self._figures.labels(name).set(value)


class ChunkMetrics:
    """`bm3il_learner_*` of the chunks that actors send."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.waiting = Gauge(
            "bm3il_learner_chunks_waiting", "Chunks that have come and are not trained on yet", registry=registry
        )
        self.taken = Counter("bm3il_learner_taken_bytes", "Bytes of chunks that were trained on", registry=registry)
        self._received = Counter(
            "bm3il_learner_received_bytes",
            "Bytes of messages of actors and the evaluator, those that had come before by themselves",
            ["kind"],
            registry=registry,
        )
        self.policy_lag = Histogram(
            "bm3il_learner_policy_lag",
            "Iterations between the policy that acted and the one trained, per chunk, when it is consumed",
            buckets=(0, 1, 2, 4, 8, 16, 32),
            registry=registry,
        )

    def count_bytes(self, kind: str, count: int) -> None:
        """As `protocol.channels.CountBytes`."""
        self._received.labels(kind).inc(count)


class RewardMetrics:
    """`bm3il_learner_*` of the rewards that are trained on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reward_lag = Histogram(
            "bm3il_learner_reward_lag",
            "Updates of the particles between those that gave a batch's rewards and the newest, when it is trained on",
            buckets=(0, 1, 2, 4, 8),
            registry=registry,
        )
