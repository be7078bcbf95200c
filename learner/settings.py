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
    """Clipped policy updates (`--learner.policy clipped`), from the fresh episodes of each iteration alone."""

    clip: Positive = 0.1
    """ε: how far the probability of an action may move in one iteration, as a part of itself."""
    epochs: Count = 4
    """Times that an iteration's rows are gone over."""
    parts: Count = 10
    """Gradient steps of one epoch, each on an equal part of the rows."""
    decay: Fraction = 0.95
    """λ of the generalised advantages: 0 trusts the critics after one step, 1 the rewards to the end."""
    entropy_weight: NonNegative = 0.005
    """Weight of the policies' entropy beside the normalised advantage."""
    clone_weight: NonNegative | None = None
    """Weight of the divergence KL(π ‖ π_clone) from the clone that the run started from. None: 0.3 for imitation in the
    world that was demonstrated, where a clone is hard to better; 0 in one that is a change of it, where the clone is
    what is wrong, and for runs on true rewards."""
    critic_first: Natural = 5
    """Iterations at the start in which only the critics learn: they know nothing of the clone yet."""


@dataclass(frozen=True)
class LearnerSettings:
    """Mean-field actor-critic (Eq. 8, 10, 13)."""

    hidden: Count = 64
    """Width of the critic's layers."""
    heads: Count = 4
    """Attention heads; must divide `hidden`."""
    attend_own_type: bool = True
    """The attention of Eq. 11 runs over all types (the text); false leaves the agent's own out (the released code)."""
    mean_field: Literal["others", "all"] = "others"
    """Whose mean action stands for an agent's own type: the others', so that nothing that a critic sees of them depends
    on the agent's own action (the baseline of Eq. 13 needs that), or everybody's, the letter of Eq. 6."""
    query: Literal["state", "state_action"] = "state"
    """What an agent's attention and critic are computed from: e^i(s), so that one pass gives Q of all own actions, or
    e^i(s, a^i) as in the text, with a pass for each own action. Continuous actions always take the second."""
    policy: Literal["actor", "boltzmann", "clipped"] = "actor"
    """What policies move towards: Eq. 13's gradient, the Boltzmann policy over Q (Eq. 12) at the temperature, or, in
    clipped steps, the advantages of fresh episodes (see `clipped`)."""
    start: Literal["random", "cloned"] = "random"
    """Where policies begin: random networks, or behaviour cloning of the demonstrations (see `cloning`)."""
    clipped: ClippedSettings = field(default_factory=ClippedSettings)
    updates: Count = 10
    """Critic and policy updates per iteration."""
    batch_size: Count = 256
    """Joint rows of one update."""
    window_steps: Natural = 0
    """Newest joint rows that updates draw from (0: 8,000); their rewards are always the current particles'. Clipped
    updates have no such window."""
    discount: Fraction = 0.95
    """γ."""
    target_rate: Fraction = 0.01
    """τ: the part by which target networks move towards the trained ones in an update."""
    policy_learning_rate: Positive = 3e-3
    """Step of Adam for the policies."""
    critic_learning_rate: Positive = 3e-3
    """Step of Adam for the critics."""
    final_learning_rate: NonNegative = 1.0
    """Learning rates at the end of the run, as a part of those at the start (linear in between)."""
    temperature: Positive = 0.3
    """Weight of the entropy (1/reward scale) at the start of the run."""
    final_temperature: NonNegative = 0.06
    """Weight of the entropy from `temperature_anneal` of the run on (geometric in between)."""
    temperature_anneal: Positive = 0.75
    """Part of the run over which the temperature falls."""
    reward_offset: float = 0.0
    """Subtracted from the reward of Eq. 9; log 2 makes the reward of an undecided discriminator 0."""
    policy_gradient_norm: Positive = 0.5
    """Largest norm of one policy network's gradient."""
    critic_gradient_norm: Positive = 10.0
    """Largest norm of one critic network's gradient."""
    precision: Precision = "float32"
    """Arithmetic of the matrix products, if the device has it (tf32: GPUs alone); parameters and optimisers stay
    float32."""
    cloning_weight: NonNegative = 0.0
    """Weight of a behaviour-cloning term on expert rows in the policy loss; 0 is the paper."""
    max_policy_lag: Count = 4
    """Async: iterations that the policy of a chunk may be behind the one that it trains; the learner waits for actors
    that would fall back further."""
    checkpoint_interval: Count = 10
    """Iterations between checkpoints."""
    checkpoints_kept: Count = 3
    """Newest checkpoints kept (the one with the best evaluation is kept besides)."""
    deadline_seconds: Positive = 120.0
    """Longest wait for chunks or rewards before the run ends with the name of what it waited for."""
    device: Device = "auto"
    """Where the learner computes; auto: as --device says."""
    threads: Natural = 0
    """Threads of its arithmetic; 0: as --threads says. With others the last bits may be others."""

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
    """Behaviour cloning (`bc`)."""

    updates: Count = 50
    """Gradient steps per iteration."""
    iterations: Count = 100
    """Iterations of the run."""
    batch_size: Count = 256
    """Joint expert rows of one step."""
    learning_rate: Positive = 3e-3
    """Step of Adam at the start; it falls linearly to a twentieth."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    held_out: Fraction = 0.1
    """Part of the independent episodes held out, to tell by `held_out_loss` whether the others are known by heart; 0
    learns from all."""
    kept_in: str = ""
    """Folder that keeps the clones that runs start from; a later run with the same start takes its own from there, to
    the same bits. Empty: none is kept."""


@dataclass(frozen=True)
class Settings:
    """Those of all roles: a learner knows what the others do, and does all of it in a serial run."""

    learner: LearnerSettings = field(default_factory=LearnerSettings)
    cloning: CloningSettings = field(default_factory=CloningSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
