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
    """Where rewards come from; the algorithm decides it: `environment` (the true reward, through the same server) for
    `expert` and `maac`, `learned` for imitation."""
    particles: Count = 4
    """L, the number of SVGD particles per discriminator (always 1 for algorithms without SVGD)."""
    hidden: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers of a discriminator."""
    activation: Literal["relu", "sigmoid"] = "relu"
    """Activation of the hidden layers."""
    sees: tuple[str, ...] = ("all",)
    """Input of the discriminators: `all` (the whole observation and the action, as in the paper), or any of: named
    parts of the observation (such as `place`, `time`), `purpose` (the parts that the environment marks as such),
    `action`."""
    kernel_scope: KernelScope = "function"
    """What the SVGD kernel acts on: `function` the logits, `tensor` each parameter tensor by itself, `network` all
    parameters together; `none` is a plain ensemble."""
    likelihood_episodes: Positive = 10.0
    """Number of episodes that the likelihood of Eq. 3 stands for: it is the mean log-likelihood of a batch times the
    steps of this many episodes, whatever the batch size. Larger values make the particles' prior and repulsion matter
    less. With few, short episodes the prior dominates and nothing is learned: raise this or `prior_stddev`."""
    prior_stddev: NonNegative = 1.0
    """Standard deviation of the Gaussian prior over the parameters; 0: no prior."""
    learning_rate: Positive = 1e-3
    """Learning rate (Adam) at the start of the run."""
    final_learning_rate: NonNegative = 1.0
    """Learning rate at the end of the run, as a fraction of the one at the start (linear in between)."""
    label_smoothing: Fraction = 0.0
    """With label smoothing s the labels are s and 1 − s instead of 0 and 1."""
    updates: Count = 5
    """Particle updates per iteration."""
    batch_size: Count = 256
    """Joint rows per update: this many of the agents, and as many of the expert."""
    memory: MemoryKind = "window"
    """Which joint rows of the agents are kept for updates: `window` keeps the newest ones, `run` a random sample of the
    whole run, so that behaviour which the agents have given up is still known to be wrong."""
    imagined: Fraction = 0.0
    """Fraction of the agents' rows in an update that is replaced by rows nobody played: each part of the observation,
    and the action, comes from a different moment of the expert, e.g. its places at other hours. So behaviour that was
    never tried does not pass as right."""
    window_steps: Count = 8_000
    """Number of joint rows of the agents that are kept (see `memory`)."""
    max_batch_rows: Count = 4_096
    """Maximum number of joint rows in a batch of queries; a larger query is a batch of its own."""
    max_delay_seconds: NonNegative = 0.001
    """Longest time that a query waits for others to fill a batch."""
    max_queue_rows: Count = 262_144
    """Maximum number of joint rows in the queue; a query beyond it is refused with `overloaded`, and its client sends
    it again."""
    deadline_seconds: Positive = 60.0
    """Timeout for queries: older ones are refused, because nobody waits for their answer any more. Since the learner
    does wait, values below twice --learner.deadline-seconds are raised to that."""
    precision: Precision = "float32"
    """Precision of matrix products; float32 is used if the device does not support it (tf32: GPUs only). Parameters,
    kernels and the optimiser are always float32."""
    device: Device = "auto"
    """Device of the reward server; auto: the value of --device."""
    threads: Natural = 0
    """Compute threads of the reward server; 0: the value of --threads."""
