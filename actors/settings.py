"""Settings of the actors and of the evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bm3il.protocol.settings import Count, Natural, Positive


@dataclass(frozen=True)
class ActorSettings:
    """Rollouts, and the policy network that acts in them."""

    steps_per_iteration: Count = 800
    """Joint environment steps per iteration, over all actors together (rounded up to whole episodes)."""
    hidden: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers of a policy network."""
    babbling: Natural = 0
    """Iterations at the start in which actors play random networks instead of the policy, to show a reward that
    remembers the whole run (`reward.memory run`) what nobody would do. With clipped updates only the reward learns from
    them."""
    agent_identity: bool = False
    """With --parameter-sharing type: every network also gets as input which agent of the type it acts for."""
    step_seconds: Positive = 60.0
    """Timeout for one step or reset of the environments: if a simulator hangs for longer, the process that plays it is
    restarted. Values above half of --learner.deadline-seconds are reduced to that."""
    threads: Natural = 0
    """Compute threads of each actor and of the evaluator; 0: the value of --threads."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a policy is evaluated: true returns on fixed seeds."""

    interval: Count = 10
    """Iterations between evaluations."""
    episodes: Natural = 200
    """Episodes per evaluation, with the same start states each time (see `starts`)."""
    final_episodes: Count = 1_000
    """Episodes for evaluating the final policy, the clone that a run starts from, and the uniform random policy that
    they are compared with (see `starts`)."""
    seconds: Positive = 30.0
    """Time limit for one evaluation. With a slow simulator only the first episodes are played, at least one;
    `curve.csv` and `result.json` contain their number. Policies that would wait longer than this are skipped, except
    the first and the newest."""
    starts: Literal["fresh", "demonstrations"] = "fresh"
    """`fresh`: start states from the seed. `demonstrations`: the start states of all demonstrations, one episode each
    (whatever `episodes` says), from which the expert's return is known."""
    greedy: bool = False
    """Take the most likely action instead of sampling one."""
