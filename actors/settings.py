"""Settings of the actors and of the evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bm3il.protocol.settings import Count, Natural, Positive


@dataclass(frozen=True)
class ActorSettings:
    """Rollouts, and the policy network that they run."""

    steps_per_iteration: Count = 800
    """Joint environment steps of one iteration, over all actors together (whole episodes: rounded up)."""
    hidden: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers of a policy."""
    babbling: Natural = 0
    """Iterations at the start in which actors play networks as they are drawn instead of the policy: they show a reward
    that remembers the run (`reward.memory`) what nobody would do. Clipped updates learn nothing else from them."""
    agent_identity: bool = False
    """With parameters per type: every network also sees which agent of the type it acts for."""
    step_seconds: Positive = 60.0
    """Longest time that a step of the environments, or their reset, may take: whoever plays a simulator that hangs is
    started again. At most half of --learner.deadline-seconds, whatever is said here."""
    threads: Natural = 0
    """Threads of the arithmetic of an actor, and of the evaluator; 0: as --threads says."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a policy is judged: true returns on fixed seeds."""

    interval: Count = 10
    """Iterations between evaluations."""
    episodes: Natural = 200
    """Episodes of one evaluation (the same start states each time)."""
    final_episodes: Count = 1_000
    """Episodes of the evaluation of the final policy, and of the uniform one that it is held against."""
    seconds: Positive = 30.0
    """Longest time that one evaluation should take: of a simulator that is slow, fewer episodes are played, the first
    ones, and at least one; `curve.csv` and `result.json` say how many they were. Policies that wait for their turn for
    longer are skipped, but not the first and the newest."""
    starts: Literal["fresh", "demonstrations"] = "fresh"
    """Seeded start states, or those of the demonstrations (all of them), from which the expert's return is known."""
    greedy: bool = False
    """Take the likeliest action instead of drawing one."""
