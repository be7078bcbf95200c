"""Worlds in which what agents choose is not always what they do: options of every environment (`protocol.registry`).

`slip=P`: in each step, the choice of each active agent is replaced, with probability P, by a uniformly random one of
those that it had; perhaps by the choice itself. For discrete actions.
`noise=S`: a ← clip(a + S·N(0, 1), −1, 1), each number by itself. For continuous actions.

The choice is what a rollout records: agents are told of what came of it by nothing but what they observe next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.seeds import derive_seed

OPTIONS = ("slip", "noise")


class Perturbed:
    """An environment, `inner`, in which choices slip and actions shake. It is a change of the world of `inner`.

    Its chances are a random stream of their own: `inner` draws what it would draw without.
    """

    def __init__(self, inner: Environment, slip: float, noise: float) -> None:
        self.inner, self.slip, self.noise, self.num_envs = inner, slip, noise, inner.num_envs
        base = inner.spec.name
        values = {name: value for name, value in (("slip", slip), ("noise", noise)) if value}
        options = "&".join(f"{name}={np.format_float_positional(value, trim='-')}" for name, value in values.items())
        name = f"{base}{'&' if '?' in base else '?'}{options}"
        self.spec = replace(inner.spec, name=name, changes=inner.spec.changes or base)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """As `inner.reset`."""
        self._random = np.random.default_rng(derive_seed(seed, "perturbation"))
        self._now = self.inner.reset(seed, starts)
        return self._now

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """As `inner.step`, with what becomes of the actions; these stay as they are."""
        now = zip(self.spec.types, actions, self._now.action_masks, self._now.active, strict=True)
        done = [
            self._slipped(action, masks, active) if kind.discrete else self._shaken(action)
            for kind, action, masks, active in now
        ]
        self._now = self.inner.step(done)
        return self._now

    def close(self) -> None:
        """As `inner.close`, if it has that."""
        if (close := getattr(self.inner, "close", None)) is not None:
            close()

    def _slipped(self, chosen: np.ndarray, masks: np.ndarray, active: np.ndarray) -> np.ndarray:
        """[E, X_m] what is done in place of `chosen` [E, X_m] by agents of these masks [E, X_m, A_m]."""
        if not self.slip:
            return chosen
        env, agent = np.nonzero((self._random.random(active.shape) < self.slip) & active)
        allowed = masks[env, agent]
        rank = self._random.integers(allowed.sum(axis=1))
        done = np.array(chosen, np.int64)
        done[env, agent] = (allowed.cumsum(axis=1) > rank[:, None]).argmax(axis=1)
        return done

    def _shaken(self, action: np.ndarray) -> np.ndarray:
        if not self.noise:
            return action
        shaken = np.float32(self.noise) * self._random.standard_normal(action.shape, np.float32) + action
        return np.clip(shaken, -1, 1)


def perturbed(environment: Environment, slip: float = 0.0, noise: float = 0.0) -> Environment:
    """The environment under slip and noise; itself where both are 0.

    Raises InputError for what is no probability or no standard deviation, and for one that no action could show.
    """
    if not (slip or noise):
        return environment
    if not 0 <= slip <= 1:
        raise InputError(f"slip must be a probability, in 0..1, got {slip:g}")
    if not 0 <= noise < math.inf:
        raise InputError(f"noise must be a standard deviation, a number from 0, got {noise:g}")
    discrete = [kind.discrete for kind in environment.spec.types]
    if slip and not any(discrete):
        raise InputError(f"slip is of discrete actions, and '{environment.spec.name}' has none: give noise={slip:g}")
    if noise and all(discrete):
        raise InputError(
            f"noise is of continuous actions, and '{environment.spec.name}' has none: give slip={min(noise, 1):g}"
        )
    return Perturbed(environment, slip, noise)


def unperturbed(environment: Environment) -> Environment:
    """The environment without the slip and the noise around it: what it is itself, for those who must know."""
    return environment.inner if isinstance(environment, Perturbed) else environment
