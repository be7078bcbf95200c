"""Rover Tower (Iqbal & Sha 2019, "Actor-Attention-Critic for Multi-Agent Reinforcement Learning", §4.1).

P rovers drive in the plane without knowing where to. Each is guided by one of P towers, which sees its rover and the
goal of the pair, and sends one of five symbols per step. Who belongs to whom is drawn anew in every episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bm3il.protocol.environment import Starts, TimeStep, compact_step
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.specs import FREE, EnvironmentSpec, Part, TypeSpec

# All as in the original, whose recorded episodes the tests reproduce to 1e-6.
EPISODE_LENGTH = 25
LANDMARKS = 6
SYMBOLS = 5
STEP_SECONDS = 0.1
VELOCITY_KEPT = 0.75
VELOCITY_GAIN = 0.225
GOAL_BONUS = 10.0
GOAL_SQUARED_RADIUS = 0.1725
DIRECTIONS = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], np.float64)
"""Rover action → unit acceleration (x, y): nothing, +x, −x, +y, −y."""

ROVER_PURPOSE = ("symbol", "position", "velocity")
TOWER_PURPOSE = ("position", "goal")
"""To be led, and to lead to the goal; who belongs to whom says nothing about either."""


class RoverTower:
    """E games of P pairs. Types: `rover` (P agents, P + 9 wide), `tower` (P agents, P + 4 wide), 5 actions each.

    A rover observes [its tower one-hot (P), that tower's last symbol one-hot (5; zeros at first), own position (2),
    own velocity (2)]; a tower [its rover one-hot (P), its rover's position (2), the position of the pair's goal (2)].
    After a move both get −d² + 10·[d² < 0.1725], d the distance of rover and goal. An episode is truncated after 25
    steps. Towers stand somewhere, but nothing depends on where, so they have no position here.

    Start states: `rover_positions` [E, P, 2] and `goal_positions` [E, P, 2] (of the pair of each *tower*), both within
    ±1000, and `rover_of_tower` [E, P], the rover that each tower guides, a permutation of 0..P−1 per environment.
    """

    def __init__(self, num_envs: int, pairs: int = 4) -> None:
        if num_envs < 1 or not 1 <= pairs <= 1_000:
            raise InputError(f"rover_tower: expected num_envs ≥ 1 and pairs in 1..1000, got {num_envs} and {pairs}")
        self.num_envs, self.pairs = num_envs, pairs
        rover = Part("tower", pairs, "code"), Part("symbol", SYMBOLS, "code"), Part("position", 2), Part("velocity", 2)
        tower = Part("rover", pairs, "code"), Part("position", 2), Part("goal", 2)
        types = (
            TypeSpec("rover", pairs, pairs + 9, SYMBOLS, True, rover, ROVER_PURPOSE, FREE),
            TypeSpec("tower", pairs, pairs + 4, SYMBOLS, True, tower, TOWER_PURPOSE, FREE),
        )
        self.spec = EnvironmentSpec(f"rover_tower?pairs={pairs}", types, EPISODE_LENGTH)
        shape = (num_envs, pairs)
        self._rover, self._tower = (
            {name: np.zeros(shape, dtype) for name, (dtype, shape) in form.table_of(num_envs).items()}
            for form in forms(self.spec)
        )
        self._now = compact_step(
            self.spec,
            [self._rover, self._tower],
            active=[np.ones(shape, bool) for _ in types],
            rewards=[np.zeros(shape, np.float32) for _ in types],
            terminated=np.zeros(num_envs, bool),
            truncated=np.zeros(num_envs, bool),
        )
        # Rovers of all environments in a row, coordinates apart: every operation of a step runs over contiguous memory.
        agents = num_envs * pairs
        self._position, self._velocity, self._goal = (np.zeros((2, agents)) for _ in range(3))
        self._work = np.empty((2, agents))
        self._squared, self._reward = np.empty(agents), np.empty(agents)
        self._at_goal = np.empty(agents, bool)
        self._rover_of_tower = np.zeros(agents, np.int64)
        self._tower_of_rover = np.zeros(agents, np.int64)
        # As if an episode had just ended: a step before `reset` changes nothing.
        self._steps = EPISODE_LENGTH

    @property
    def positions(self) -> np.ndarray:
        """Positions of the rovers, [E, P, 2] float64."""
        return self._position.T.reshape(self.num_envs, self.pairs, 2)

    @property
    def velocities(self) -> np.ndarray:
        """Velocities of the rovers, [E, P, 2] float64."""
        return self._velocity.T.reshape(self.num_envs, self.pairs, 2)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        """Start E new episodes, drawn from `seed` or from the given start states.

        Raises InputError for start states of another environment.
        """
        starts = self.draw_starts(seed) if starts is None else self._checked(starts)
        shape = (self.num_envs, self.pairs)
        offsets = np.arange(self.num_envs)[:, None] * self.pairs
        rover_of_tower = np.asarray(starts["rover_of_tower"], np.int64)
        tower_of_rover = np.argsort(rover_of_tower, axis=1)
        self._rover_of_tower[:] = (offsets + rover_of_tower).ravel()
        self._tower_of_rover[:] = (offsets + tower_of_rover).ravel()
        self._position[:] = np.asarray(starts["rover_positions"], np.float64).reshape(-1, 2).T
        goals = np.asarray(starts["goal_positions"], np.float64).reshape(-1, 2)
        self._goal[:] = goals[self._tower_of_rover].T
        self._velocity.fill(0)
        self._steps = 0
        self._rover["codes"][..., 0] = tower_of_rover
        self._rover["codes"][..., 1] = SYMBOLS  # nothing was said yet
        self._tower["codes"][..., 0] = rover_of_tower
        self._tower["own"][..., 2:] = goals.reshape(*shape, 2)
        self._write_motion()
        self._set_flags(active=True, truncated=False)
        self._clear_rewards()
        return self._now

    def draw_starts(self, seed: int) -> dict[str, np.ndarray]:
        """The start states of `reset(seed)`, to be given to `reset(starts=…)` later."""
        random = np.random.default_rng(seed)
        landmarks = random.uniform(-1, 1, (self.num_envs, LANDMARKS, 2))
        goals = random.integers(LANDMARKS, size=(self.num_envs, self.pairs, 1))
        in_order = np.tile(np.arange(self.pairs), (self.num_envs, 1))
        return {
            "rover_positions": random.uniform(-1, 1, (self.num_envs, self.pairs, 2)),
            "goal_positions": np.take_along_axis(landmarks, goals, axis=1),
            "rover_of_tower": random.permuted(in_order, axis=1),
        }

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        """Move the rovers, deliver the symbols. actions: rovers' and towers', each [E, P] integers in 0..4.

        Raises ValueError for an action out of range.
        """
        if self._steps >= EPISODE_LENGTH:
            self._set_flags(active=False, truncated=True)
            self._clear_rewards()
            return self._now
        rover_actions, tower_actions = (np.ascontiguousarray(action, np.int64).ravel() for action in actions)
        for action in (rover_actions, tower_actions):
            # A negative number is a huge one when it is read without its sign: one comparison for both ends.
            if action.view(np.uint64).max() >= SYMBOLS:
                raise ValueError(f"Rover Tower: actions must lie in 0..{SYMBOLS - 1}")
        self._move(rover_actions)
        self._reward_pairs()
        self._write_motion()
        self._write_symbols(tower_actions)
        self._steps += 1
        if self._steps == EPISODE_LENGTH:
            self._set_flags(active=True, truncated=True)
        return self._now

    def render(self) -> np.ndarray:
        """The first of the games, [H, W, 3] uint8."""
        from bm3il.actors.environments.rover_tower_picture import SILENT, draw

        towers, heard = self._rover["codes"][0].T.tolist()
        goals = self._goal.T[: self.pairs]  # in the order of the rovers
        symbols = [SILENT if symbol == SYMBOLS else str(symbol) for symbol in heard]
        return draw(self.positions[0], self.velocities[0], goals, towers, symbols, GOAL_SQUARED_RADIUS**0.5)

    def _move(self, actions: np.ndarray) -> None:
        velocity, work = self._velocity, self._work
        for coordinate, push in enumerate(VELOCITY_GAIN * DIRECTIONS.T):
            # `step` has checked them, so nothing is clipped; in its default mode numpy fills `out` through a buffer.
            np.take(push, actions, out=work[coordinate], mode="clip")
        velocity *= VELOCITY_KEPT
        velocity += work
        # The original scales speeds above 1 down to 1, but nobody is faster than 0.225 / (1 − 0.75) = 0.9.
        np.multiply(velocity, STEP_SECONDS, out=work)
        self._position += work

    def _reward_pairs(self) -> None:
        np.subtract(self._position, self._goal, out=self._work)
        self._work *= self._work
        np.add(self._work[0], self._work[1], out=self._squared)
        np.less(self._squared, GOAL_SQUARED_RADIUS, out=self._at_goal)
        np.multiply(self._at_goal, GOAL_BONUS, out=self._reward)
        self._reward -= self._squared
        rover, tower = (rewards.reshape(-1) for rewards in self._now.rewards)
        rover[:] = self._reward
        np.take(rover, self._rover_of_tower, out=tower, mode="clip")

    def _write_motion(self) -> None:
        rover, tower = (columns["own"].reshape(-1, 4) for columns in (self._rover, self._tower))
        for coordinate in range(2):
            rover[:, coordinate] = self._position[coordinate]
            rover[:, 2 + coordinate] = self._velocity[coordinate]
            seen = np.take(self._position[coordinate], self._rover_of_tower, out=self._work[coordinate], mode="clip")
            tower[:, coordinate] = seen

    def _write_symbols(self, actions: np.ndarray) -> None:
        self._rover["codes"].reshape(-1, 2)[:, 1] = actions.take(self._tower_of_rover)

    def _set_flags(self, active: bool, truncated: bool) -> None:
        for array in self._now.active:
            array.fill(active)
        self._now.truncated.fill(truncated)

    def _clear_rewards(self) -> None:
        for array in self._now.rewards:
            array.fill(0)

    def _checked(self, starts: Starts) -> Starts:
        shape = (self.num_envs, self.pairs)
        expected = {"rover_positions": (*shape, 2), "goal_positions": (*shape, 2), "rover_of_tower": shape}
        if set(starts) != set(expected):
            raise InputError(
                f"{self.spec.name}: expected start states {', '.join(sorted(expected))}, "
                f"found {', '.join(sorted(starts)) or 'none'}"
            )
        for name, wanted in expected.items():
            if starts[name].shape != wanted:
                raise InputError(f"{self.spec.name}: expected {name} {list(wanted)}, found {list(starts[name].shape)}")
        for name in ("rover_positions", "goal_positions"):
            if not (np.abs(starts[name]) <= 1_000).all():
                raise InputError(f"{self.spec.name}: {name} must be numbers within ±1000")
        if not (np.sort(starts["rover_of_tower"], axis=1) == np.arange(self.pairs)).all():
            raise InputError(f"{self.spec.name}: rover_of_tower must be a permutation of 0..{self.pairs - 1} per row")
        return starts
