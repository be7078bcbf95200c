"""What the reward server tells Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROWS_BUCKETS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class RewardServerMetrics:
    """`bm3il_reward_server_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queries = Counter("bm3il_reward_server_queries", "Reward queries answered", registry=registry)
        self._rows = Counter(
            "bm3il_reward_server_query_rows", "Joint rows whose rewards were answered (all agents)", registry=registry
        )
        self._refused = Counter(
            "bm3il_reward_server_refused_requests", "Requests refused, by cause", ["cause"], registry=registry
        )
        self._batch_rows = Histogram(
            "bm3il_reward_server_batch_rows",
            "Joint rows that were computed together",
            buckets=ROWS_BUCKETS,
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "bm3il_reward_server_queue_seconds",
            "Time that a query waited before it was computed, updates included; from when the socket was last empty",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._compute_seconds = Histogram(
            "bm3il_reward_server_compute_seconds",
            "Time that a batch of queries was computed",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._queue_rows = Gauge("bm3il_reward_server_queue_rows", "Joint rows that wait", registry=registry)
        self._version = Gauge(
            "bm3il_reward_server_particles_version", "Updates of the particles so far", registry=registry
        )
        help_texts = {
            "discriminator_loss": "Negative log-likelihood per row and agent of the last batch, mean",
            "accuracy_agent": "Agent rows (per agent) that the discriminators of the last batch recognised, 0..1",
            "accuracy_expert": "Expert rows (per agent) that the discriminators of the last batch recognised, 0..1",
            "discriminator_entropy": "Entropy of a discriminator's verdict per row and agent, mean, in nats",
            "particle_distance": "Euclidean distance of two particles' parameters, mean over pairs and groups",
            "particle_deviation": "Standard deviation of a reward over particles, mean over rows and agents",
            "repulsion_ratio": "Repulsion of the particles as a part of their attraction (SVGD), mean over groups",
        }
        # Prometheus wants the unit in a name; in log.jsonl the figures keep their shorter ones.
        exported = {
            "discriminator_loss": "loss_nats",
            "discriminator_entropy": "entropy_nats",
            "accuracy_agent": "accuracy_agent_ratio",
            "accuracy_expert": "accuracy_expert_ratio",
        }
        self._health = {
            name: Gauge(f"bm3il_reward_server_{exported.get(name, name)}", text, registry=registry)
            for name, text in help_texts.items()
        }

    def count_batch(self, rows: list[int], queue_seconds: list[float], compute_seconds: float, waiting: int) -> None:
        """Count a computed batch: rows and waiting time of each query, and the joint rows that still wait."""
        self._queries.inc(len(rows))
        self._rows.inc(sum(rows))
        self._batch_rows.observe(sum(rows))
        for seconds in queue_seconds:
            self._queue_seconds.observe(seconds)
        self._compute_seconds.observe(compute_seconds)
        self._queue_rows.set(waiting)

    def count_refusal(self, cause: str) -> None:
        """Count a refused request."""
        self._refused.labels(cause).inc()

    def set_health(self, version: int, figures: Mapping[str, float]) -> None:
        """Show the figures of the last update (`Health.figures`)."""
        self._version.set(version)
        for name, value in figures.items():
            self._health[name].set(value)
