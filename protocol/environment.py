"""The contract between an environment and everything else: batched over E environments, grouped by type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from protocol.specs import EnvironmentSpec

Starts = Mapping[str, np.ndarray]


@dataclass
class TimeStep:
    """What E environments show after `reset` or `step`; one array per type in each list.

    observations: [E, X_m, O_m] float32.
    action_masks: [E, X_m, A_m] bool, the actions allowed *now* (all true for continuous actions).
    active: [E, X_m] bool; false for an agent that died or has not spawned. On the step that ends an episode the agents
        that lived to see its end are still active (a truncated episode is bootstrapped from there).
    rewards: [E, X_m] float32, true rewards of the step just taken (zero after `reset`); read only for evaluation
        and for training experts, never by imitation.
    terminated: [E] bool, the episode has ended and nothing follows (no bootstrap).
    truncated: [E] bool, the episode was cut off by a time limit (bootstrap through it).

    Stepping an environment that has ended changes nothing until `reset`: its agents are inactive, its rewards 0, its
    flags stay set.
    The arrays may be overwritten by the next call: copy what must stay.
    """

    observations: list[np.ndarray]
    action_masks: list[np.ndarray]
    active: list[np.ndarray]
    rewards: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray


@runtime_checkable
class Environment(Protocol):
    """E independent copies of one multi-agent environment, stepped together."""

    spec: EnvironmentSpec
    num_envs: int

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes. The same seed gives the same episodes under the same actions.

        starts: start states by name, each [E, ...], as `Demonstrations.starts` holds them, for paired evaluation;
            an environment that cannot start from given states raises InputError.
        """
        ...

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all E environments by one joint step.

        actions: per type [E, X_m] int64 if discrete, else [E, X_m, A_m] float32 in [-1, 1]; those of inactive
            agents are ignored.
        """
        ...
