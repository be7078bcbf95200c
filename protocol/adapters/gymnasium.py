"""Environments of Gymnasium, one agent each, e.g. `gymnasium:CartPole-v1?arguments=sutton_barto_reward:true`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from bm3il.protocol.adapters.options import arguments_of, one_line
from bm3il.protocol.adapters.spaces import MASK, kept, parts_of, reader, taker, widths
from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.seeds import small_seed
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

log = logging.getLogger(__name__)

AGENT = "agent"
"""Name of the one type, which has one agent."""
PICTURES = "rgb_array"
"""The mode of drawing that gives arrays."""


class Gymnasium:
    """E copies of an environment, stepped one after the other.

    target: what `gymnasium.make` takes; `my_module:MyEnv-v0` imports the module first.   arguments: what it is called
    with, `NAME:VALUE,…`, values as JSON (text without quotes is text).   episode_length: a time limit in place of the
    environment's own; needed if it has none.   first_copy: number of the first copy (`protocol.pool`).   drawn: whether
    `render` will be called, which environments must know beforehand.

    Box actions are scaled from [-1, 1] to the box. Masks come from `action_mask` in an environment's info. Observations
    are flattened; entries of a dictionary are named parts (`--reward.sees`). Those of spaces of integers are kept as
    integers, where these are small. What has ended shows zeros.
    """

    def __init__(
        self,
        num_envs: int,
        target: str = "",
        arguments: str = "",
        episode_length: int = 0,
        first_copy: int = 0,
        drawn: bool = False,
    ) -> None:
        """Raises InputError for an environment that cannot be made, whose observations have no fixed width, whose
        actions are neither discrete nor a bounded box, and one without a time limit."""
        if num_envs < 1:
            raise InputError(f"gymnasium: expected num_envs ≥ 1, got {num_envs}")
        limit = {"max_episode_steps": episode_length} if episode_length else {}
        options = arguments_of(arguments) | limit
        self._envs = [_made(target, options) for _ in range(num_envs)]
        if drawn and PICTURES in (self._envs[0].metadata.get("render_modes") or ()):
            self._envs[0].close()
            self._envs[0] = _made(target, {"render_mode": PICTURES, **options})
        self.num_envs, self._first_copy = num_envs, first_copy
        seen, acts = self._envs[0].observation_space, self._envs[0].action_space
        given = {"arguments": arguments, "episode_length": episode_length}
        query = "&".join(f"{option}={value}" for option, value in given.items() if value)
        view = f"gymnasium:{target}" + (f"?arguments={arguments}" if arguments else "")
        name = f"gymnasium:{target}" + (f"?{query}" if query else "")
        kind = TypeSpec(AGENT, 1, *widths(f"gymnasium:{target}", seen, acts), parts_of(seen))
        self.spec = EnvironmentSpec(name, (kind,), self._steps(target), view)
        self._read, self._take = reader(AGENT, seen), taker([acts])
        (self._form,) = forms(self.spec)
        self._columns = {n: np.zeros(shape, dtype) for n, (dtype, shape) in self._form.table_of(num_envs).items()}
        self._masks = self._columns["masks"]
        self._numbers = [column for name, column in self._columns.items() if name != "masks"]
        self._now = compact_step(
            self.spec,
            [self._columns],
            active=[np.zeros((num_envs, 1), bool)],
            rewards=[np.zeros((num_envs, 1), np.float32)],
            terminated=np.zeros(num_envs, bool),
            truncated=np.zeros(num_envs, bool),
        )

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes; each copy has a seed of its own. Raises InputError for given start states."""
        if starts:
            raise InputError(f"{self.spec.name} cannot start from given states: choose --evaluation.starts fresh")
        now, self._masks[:] = self._now, True
        for e, env in enumerate(self._envs):
            seen, info = env.reset(seed=small_seed(seed, "gymnasium", self._first_copy + e))
            self._show(e, seen, info)
        now.active[0][:] = True
        for array in (now.rewards[0], now.terminated, now.truncated):
            array[:] = 0
        return self._settled()

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Advance all copies that have not ended. actions: [[E, 1] integers], or [[E, 1, A] in [-1, 1]]."""
        now, chosen = self._now, self._take(actions[0])
        ended = now.terminated | now.truncated
        self._masks[:] = True
        if ended.any():  # nobody is there to see anything any more
            for array in (now.active[0], now.rewards[0], *self._numbers):
                array[ended] = 0
        for e in np.flatnonzero(~ended).tolist():
            seen, reward, now.terminated[e], now.truncated[e], info = self._envs[e].step(chosen[e][0])
            now.rewards[0][e, 0] = reward
            self._show(e, seen, info)
        return self._settled()

    def render(self) -> np.ndarray | None:
        """A picture of the first copy, [H, W, 3] uint8; None if it draws none, or lacks the package to draw with."""
        from gymnasium.error import DependencyNotInstalled

        if self._envs[0].render_mode is None:
            return None
        try:
            picture = self._envs[0].render()
        except DependencyNotInstalled as error:
            log.warning("%s draws nothing: %s", self.spec.name, one_line(error))
            return None
        return picture if isinstance(picture, np.ndarray) else None

    def close(self) -> None:
        """Free what the copies hold."""
        for env in self._envs:
            env.close()

    def _show(self, e: int, seen: Any, info: dict[str, Any]) -> None:
        numbers = self._read(seen)
        for run in self._form.runs:
            self._columns[run.kind][e, 0, run.stored] = kept(AGENT, numbers[run.columns], run.kind)
        if (mask := info.get(MASK)) is not None:
            if np.shape(mask) != self._masks.shape[2:]:
                raise InputError(f"{AGENT}: expected one {MASK} of {self._masks.shape[2]} actions, got {mask!r:.80}")
            self._masks[e, 0] = mask

    def _settled(self) -> TimeStep:
        """What has come to an end was not cut off; a mask that allows nothing allows everything."""
        self._now.truncated &= ~self._now.terminated
        self._masks[~self._masks.any(axis=-1)] = True
        return self._now

    def _steps(self, target: str) -> int:
        """Of an episode, at most."""
        limit = getattr(self._envs[0].spec, "max_episode_steps", None) or 0
        if limit < 1:
            raise InputError(f"gymnasium:{target} does not tell how long an episode is: give ?episode_length=")
        return int(limit)


def _made(target: str, arguments: dict[str, Any]) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise InputError(f"gymnasium:{target} needs Gymnasium: pip install 'bm3il[gymnasium]'") from error
    if not target:
        raise InputError("name an environment of Gymnasium, as in gymnasium:CartPole-v1")
    try:
        return gymnasium.make(target, disable_env_checker=True, **arguments)
    except Exception as error:  # its own constructor may raise anything
        raise InputError(f"gymnasium:{target} cannot be made: {one_line(error)}") from error
