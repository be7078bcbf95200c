"""Settings of the learner, and of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bm3il.actors.settings import ActorSettings, EvaluationSettings
from bm3il.protocol.errors import InputError
from bm3il.protocol.settings import Count, Device, Fraction, Natural, NonNegative, Positive, Precision
from bm3il.reward_server.settings import RewardSettings


@dataclass(frozen=True)
class ClippedSettings:
    """Clipped policy updates (`--learner.policy clipped`), from the fresh episodes of each iteration only."""

    clip: Positive = 0.1
    """ε, the clipping range: the fraction by which the probability of an action may change in one iteration."""
    epochs: Count = 4
    """Number of passes over the rows of an iteration."""
    parts: Count = 10
    """Minibatches per epoch: the rows are split into this many equal parts, with one gradient step on each."""
    decay: Fraction = 0.95
    """λ of generalised advantage estimation: 0 relies on the critics after one step, 1 on the rewards up to the end of
    the episode."""
    entropy_weight: NonNegative = 0.005
    """Weight of the entropy bonus, relative to the normalised advantage."""
    clone_weight: NonNegative | None = None
    """Weight of the divergence KL(π ‖ π_clone), which keeps policies near the clone that the run started from. None:
    0.3 for imitation in the demonstrated world, where a clone is hard to improve on; 0 in a changed world, where the
    clone is what is wrong, and for runs on true rewards."""
    critic_first: Natural = 5
    """Iterations at the start in which only the critics learn, since they know nothing about the policy yet."""


@dataclass(frozen=True)
class LearnerSettings:
    """Mean-field actor-critic (Eq. 8, 10, 13)."""

    hidden: Count = 64
    """Width of the critic's layers."""
    heads: Count = 4
    """Number of attention heads; must divide `hidden`."""
    attend_own_type: bool = True
    """The attention of Eq. 11 covers all agent types (as in the paper); without it the agent's own type is left out (as
    in the released code)."""
    mean_field: Literal["others", "all"] = "others"
    """Whose mean action represents an agent's own type. `others` leaves out the agent itself, so that this input of the
    critic does not depend on its own action (the baseline of Eq. 13 needs that); `all` includes it, literally Eq. 6."""
    query: Literal["state", "state_action"] = "state"
    """Input of an agent's attention and critic: `state` is e^i(s), one pass for the Q-values of all its actions;
    `state_action` is e^i(s, a^i) as in the paper's text, one pass per action. Continuous actions always use the second.
    Clipped updates, whose critics estimate V, ignore this."""
    policy: Literal["actor", "boltzmann", "clipped"] = "actor"
    """How policies are updated. `actor`: the gradient of Eq. 13; `boltzmann`: towards the Boltzmann policy over Q
    (Eq. 12) at the temperature; `clipped`: clipped steps on the advantages of fresh episodes (see `clipped`)."""
    start: Literal["random", "cloned"] = "random"
    """Initial policies: random networks, or a behaviour clone of the demonstrations (see `cloning`)."""
    clipped: ClippedSettings = field(default_factory=ClippedSettings)
    updates: Count = 10
    """Critic and policy updates per iteration. Clipped updates use `clipped.epochs` and `clipped.parts` instead."""
    batch_size: Count = 256
    """Joint rows per update. Clipped updates use `clipped.parts` instead."""
    window_steps: Natural = 0
    """Size of the replay window: updates sample from this many of the newest joint rows; 0: 8,000. Their rewards are
    always those of the current particles. Clipped updates have no replay window."""
    discount: Fraction = 0.95
    """Discount factor γ."""
    target_rate: Fraction = 0.01
    """τ: the fraction by which target networks move towards the trained networks in each update. Clipped updates have
    no target networks."""
    policy_learning_rate: Positive = 3e-3
    """Learning rate of the policies (Adam) at the start of the run."""
    critic_learning_rate: Positive = 3e-3
    """Learning rate of the critics (Adam) at the start of the run."""
    final_learning_rate: NonNegative = 1.0
    """Learning rates at the end of the run, as a fraction of those at the start (linear in between)."""
    temperature: Positive = 0.3
    """Weight of the entropy bonus (the inverse of the reward scale) at the start of the run. Clipped updates use
    `clipped.entropy_weight` instead."""
    final_temperature: Positive = 0.06
    """Temperature at the end of the annealing (see `temperature_anneal`); it falls geometrically and then stays."""
    temperature_anneal: Positive = 0.75
    """Fraction of the run over which the temperature falls."""
    reward_offset: float = 0.0
    """Constant subtracted from the reward of Eq. 9; with log 2 the reward of an undecided discriminator is 0."""
    policy_gradient_norm: Positive = 0.5
    """Gradient clipping: largest gradient norm of one policy network."""
    critic_gradient_norm: Positive = 10.0
    """Gradient clipping: largest gradient norm of one critic network."""
    precision: Precision = "float32"
    """Precision of matrix products; float32 is used if the device does not support it (tf32: GPUs only). Parameters
    and optimisers are always float32."""
    cloning_weight: NonNegative = 0.0
    """Weight of a behaviour-cloning term on expert rows in the policy loss; 0: none, as in the paper."""
    max_policy_lag: Count = 4
    """Async mode: how many iterations the policy that played a chunk may be behind the policy trained on it; the
    learner waits for actors that would fall further behind."""
    checkpoint_interval: Count = 10
    """Iterations between checkpoints."""
    checkpoints_kept: Count = 3
    """Number of newest checkpoints kept; the one with the best evaluation is kept as well."""
    deadline_seconds: Positive = 120.0
    """Timeout of the learner's waits for chunks or rewards; when it expires, the run ends and names what it waited
    for."""
    device: Device = "auto"
    """Device of the learner; auto: the value of --device."""
    threads: Natural = 0
    """Compute threads of the learner; 0: the value of --threads. Another number may change the last bits of results."""

    def check(self) -> None:
        """Raise InputError, naming the flags, for settings that do not go together."""
        if self.hidden % self.heads:
            raise InputError(f"--learner.heads must divide --learner.hidden, got {self.heads} and {self.hidden}")
        if self.clipped.clone_weight and self.start != "cloned":
            raise InputError("--learner.clipped.clone-weight holds policies near the clone: add --learner.start cloned")
        if self.policy != "clipped":
            return
        if self.window_steps:
            raise InputError(
                f"--learner.policy clipped learns from fresh rows alone: leave out --learner.window-steps "
                f"{self.window_steps}, or take --learner.policy actor"
            )
        if self.cloning_weight:
            raise InputError(
                "--learner.cloning-weight is a term of --learner.policy actor; with clipped, --learner.start cloned "
                "and --learner.clipped.clone-weight hold policies near the clone"
            )


@dataclass(frozen=True)
class CloningSettings:
    """Behaviour cloning: the algorithm `bc`, and the clone of `--learner.start cloned`."""

    updates: Count = 50
    """Gradient steps per iteration."""
    iterations: Count = 100
    """Number of iterations."""
    batch_size: Count = 256
    """Joint expert rows per gradient step."""
    learning_rate: Positive = 3e-3
    """Learning rate (Adam) at the start; it falls linearly to a twentieth."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    held_out: Fraction = 0.1
    """Fraction of the independent episodes held out: their `held_out_loss` shows whether the clone overfits the others;
    0: learn from all."""
    kept_in: str = ""
    """Folder in which the clones that runs start from are stored; a later run with the same start loads its clone from
    there, identical to the bit. Empty: none is stored."""


@dataclass(frozen=True)
class Settings:
    """Those of all roles: a learner knows what the others do, and does all of it in a serial run."""

    learner: LearnerSettings = field(default_factory=LearnerSettings)
    cloning: CloningSettings = field(default_factory=CloningSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
