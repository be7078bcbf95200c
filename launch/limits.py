"""Which values of the configuration a run can use: what is wrong shows in one line before anything starts."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING

from protocol.errors import InputError

if TYPE_CHECKING:
    from launch.config import Config

AT_LEAST_1 = (
    "steps",
    "nodes",
    "threads",
    "learner.hidden",
    "learner.heads",
    "learner.updates",
    "learner.batch_size",
    "learner.max_policy_lag",
    "learner.clipped.epochs",
    "learner.clipped.parts",
    "learner.checkpoint_interval",
    "learner.checkpoints_kept",
    "cloning.updates",
    "cloning.iterations",
    "cloning.batch_size",
    "actor.steps_per_iteration",
    "actor.hidden",
    "reward.particles",
    "reward.hidden",
    "reward.updates",
    "reward.batch_size",
    "reward.window_steps",
    "reward.max_batch_rows",
    "reward.max_queue_rows",
    "evaluation.interval",
    "evaluation.final_episodes",
)
AT_LEAST_0 = (
    "seed",
    "actors",
    "demonstration_episodes",
    "learner.final_learning_rate",
    "learner.final_temperature",
    "actor.babbling",
    "learner.cloning_weight",
    "learner.window_steps",
    "learner.clipped.entropy_weight",
    "learner.clipped.clone_weight",
    "learner.clipped.critic_first",
    "cloning.weight_decay",
    "reward.prior_stddev",
    "reward.final_learning_rate",
    "reward.max_delay_seconds",
    "evaluation.episodes",
)
ABOVE_0 = (
    "learner.policy_learning_rate",
    "learner.critic_learning_rate",
    "learner.clipped.clip",
    "learner.temperature",
    "learner.temperature_anneal",
    "learner.policy_gradient_norm",
    "learner.critic_gradient_norm",
    "learner.deadline_seconds",
    "cloning.learning_rate",
    "reward.likelihood_episodes",
    "reward.learning_rate",
    "reward.deadline_seconds",
)
PARTS = (
    "learner.discount",
    "learner.clipped.decay",
    "learner.target_rate",
    "cloning.held_out",
    "reward.label_smoothing",
    "reward.imagined",
)


def check_limits(config: Config) -> None:
    """Raise InputError, naming the flag, for the first number that no run could use."""
    _expect(config, AT_LEAST_1, "at least 1", 1, math.inf)
    _expect(config, AT_LEAST_0, "at least 0", 0, math.inf)
    _expect(config, ABOVE_0, "above 0", math.ulp(0.0), math.inf)
    _expect(config, PARTS, "within 0..1", 0, 1)
    if config.learner.hidden % config.learner.heads:
        raise InputError(
            f"--learner.heads must divide --learner.hidden, got {config.learner.heads} and {config.learner.hidden}"
        )
    _check_start(config)


def _check_start(config: Config) -> None:
    """What clipped updates and a start from the clone need, and what they have no use for."""
    learner = config.learner
    if learner.start == "cloned" and not config.demonstrations:
        raise InputError("--learner.start cloned needs what it clones: name a file by --demonstrations")
    if learner.clipped.clone_weight and learner.start != "cloned":
        raise InputError("--learner.clipped.clone-weight holds policies near the clone: add --learner.start cloned")
    if learner.policy != "clipped":
        return
    if learner.window_steps:
        raise InputError(
            f"--learner.policy clipped learns from fresh rows alone: leave out --learner.window-steps "
            f"{learner.window_steps}, or take --learner.policy actor"
        )
    if learner.cloning_weight:
        raise InputError(
            "--learner.cloning-weight is a term of --learner.policy actor; with clipped, --learner.start cloned and "
            "--learner.clipped.clone-weight hold policies near the clone"
        )


def flag(option: str) -> str:
    """The name of an option on the command line, without its dashes."""
    return option.replace("_", "-")


def _expect(config: Config, options: tuple[str, ...], what: str, lowest: float, highest: float) -> None:
    for option in options:
        value = attrgetter(option)(config)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(lowest <= number <= highest for number in numbers):  # false for NaN, too
            raise InputError(f"--{flag(option)} must be {what}, got {value}")
