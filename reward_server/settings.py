"""Settings of the reward server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bm3il.protocol.settings import Count, Device, Fraction, Natural, NonNegative, Positive, Precision

Source = Literal["learned", "environment"]
KernelScope = Literal["function", "tensor", "network", "none"]
MemoryKind = Literal["window", "run"]


@dataclass(frozen=True)
class RewardSettings:
    """Discriminators, their particles, and how queries are batched."""

    source: Source = "learned"
    """`environment` answers the true reward through the same path: to train experts and to debug."""
    particles: Count = 4
    """L, SVGD particles per discriminator (algorithms without SVGD force 1)."""
    hidden: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers of a discriminator."""
    activation: Literal["relu", "sigmoid"] = "relu"
    """Activation of the hidden layers."""
    sees: tuple[str, ...] = ("all",)
    """What discriminators see: `all` of the observation and the action (the paper), or named parts of the observation
    (`place`, `time`), `purpose` (the parts that the environment calls so), `action`."""
    kernel_scope: KernelScope = "function"
    """What the SVGD kernel acts on: logits, each parameter tensor, the whole network; `none` is a plain ensemble."""
    likelihood_episodes: Positive = 10.0
    """Episodes over whose steps the likelihood of Eq. 3 sums: a batch's mean log-likelihood times their steps, whatever
    the batch size. The more, the less prior and repulsion of the particles matter beside it. With few short episodes
    the prior wins and nothing is learned: take more of them, or a wider `prior_stddev`."""
    prior_stddev: NonNegative = 1.0
    """Standard deviation of the Gaussian prior of the parameters; 0 leaves the prior out."""
    learning_rate: Positive = 1e-3
    """Step of Adam at the start of the run."""
    final_learning_rate: NonNegative = 1.0
    """Learning rate at the end of the run, as a part of that at the start (linear in between)."""
    label_smoothing: Fraction = 0.0
    """Labels are smoothing and 1 − smoothing instead of 0 and 1."""
    updates: Count = 5
    """Particle updates per iteration."""
    batch_size: Count = 256
    """Agent rows, and as many expert rows, of one update."""
    memory: MemoryKind = "window"
    """Which of the agents' joint rows updates draw from: the newest of the run (`window`), or a sample of all of them
    (`run`), so that what agents no longer do is still known to be wrong."""
    imagined: Fraction = 0.0
    """Part of the agents' rows of an update that nobody played: rows of the expert whose parts are each from another
    moment, its places at other hours. They keep what was never tried from passing for right."""
    window_steps: Count = 8_000
    """How many joint rows of the agents that is."""
    max_batch_rows: Count = 4_096
    """Most joint rows of queries that are computed together."""
    max_delay_seconds: NonNegative = 0.001
    """Longest time that a query waits for others to be computed with."""
    max_queue_rows: Count = 262_144
    """Joint rows that may wait; a query beyond is refused with `overloaded` and asked again by its client."""
    deadline_seconds: Positive = 60.0
    """Queries older than this are refused instead of computed: nobody waits for them any more. The learner does wait,
    and is never given less than twice its own deadline."""
    precision: Precision = "float32"
    """Arithmetic of the matrix products, if the device has it (tf32: GPUs alone); parameters, kernels and the optimiser
    stay float32."""
    device: Device = "auto"
    """Where the reward server computes; auto: as --device says."""
    threads: Natural = 0
    """Threads of its arithmetic; 0: as --threads says."""
