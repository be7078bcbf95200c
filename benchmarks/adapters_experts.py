"""Rules that know how to play other people's environments: the experts of `adapters_learning.py`.

They act on what agents observe there and on nothing else, and are what a user would write: `EXPERTS` names those that
are entry points of the group `bm3il.experts`; `Hunt` plays in a loop of PettingZoo's own, through `bm3il.Recorder`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import permutations

import numpy as np
import torch

from bm3il.protocol.environment import TimeStep
from bm3il.protocol.specs import EnvironmentSpec


class Rule(ABC):
    """An expert whose agents act each by the rule of their type."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec

    def act(self, now: TimeStep, generator: torch.Generator | None = None, greedy: bool = False) -> list[np.ndarray]:
        """Per type actions [E, X_m], or [E, X_m, A_m]. Rules that draw lots take them from the generator."""
        shown = zip(self.spec.types, now.observations, now.action_masks, strict=True)
        return [self.chosen(kind.name, seen, masks, generator) for kind, seen, masks in shown]

    @abstractmethod
    def chosen(self, kind: str, seen: np.ndarray, masks: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """Of observations [E, X, O] and masks [E, X, A] what agents of this type do."""


def towards(way: np.ndarray, near: float) -> np.ndarray:
    """Ways to go [..., 2] → MPE's actions [...]: 1 −x, 2 +x, 3 −y, 4 +y along the longer coordinate, 0 if short."""
    axis = np.abs(way).argmax(axis=-1)
    length = np.take_along_axis(way, axis[..., None], axis=-1)[..., 0]
    return np.where(np.abs(length) < near, 0, 1 + 2 * axis + (length > 0))


class Spread(Rule):
    """`simple_spread` of three: each goes to the landmark that is its in the shortest way to share them out.

    Observed: velocity (2), position, ways to the landmarks (3 × 2) and to the others (2 × 2), words.
    """

    BRAKING = 0.35
    """Of the velocity, what it is worth as a way gone already."""

    def chosen(self, kind: str, seen: np.ndarray, masks: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        velocity, landmarks = seen[..., :2], seen[..., 4:10].reshape(*seen.shape[:-1], 3, 2)
        others = seen[..., 10:14].reshape(*seen.shape[:-1], 2, 2)
        everybody = np.concatenate([np.zeros_like(others[..., :1, :]), others], axis=-2)
        lengths = np.linalg.norm(landmarks[..., None, :, :] - everybody[..., :, None, :], axis=-1)
        shares = np.array(list(permutations(range(3))))
        best = shares[sum(lengths[..., a, shares[:, a]] for a in range(3)).argmin(axis=-1)]
        mine = np.take_along_axis(landmarks, best[..., :1, None], axis=-2)[..., 0, :]
        return towards(mine - self.BRAKING * velocity, 0.03)


class Hunt:
    """`simple_tag` for one agent at a time: three run at the fourth, where it will be, and that one runs away.

    Observed: velocity (2), position, two obstacles, ways to the others (3 × 2; hunters see the prey last), and, by
    hunters, the prey's velocity.
    """

    LEAD, BRAKING, WALL = 0.3, 0.2, 0.75

    def __call__(self, agent: str, seen: np.ndarray) -> int:
        velocity, position, others = seen[:2], seen[2:4], seen[8:14].reshape(3, 2)
        if agent.startswith("adversary"):
            return int(towards(others[2] + self.LEAD * seen[14:16] - self.BRAKING * velocity, 0.0))
        away = -(others / (np.linalg.norm(others, axis=1, keepdims=True) ** 3 + 1e-3)).sum(axis=0)
        back = -8 * np.sign(position) * np.maximum(np.abs(position) - self.WALL, 0) / (1 - self.WALL)
        return int(towards(away / (np.linalg.norm(away) + 1e-6) + back, 0.0))


class Noughts(Rule):
    """`tictactoe`: who begins wins where there is a way to, hinders the other, and else takes the best free place; the
    other one is careless.

    Observed: the nine places, each as mine and as the other's. After the moves comes one more action, to wait.
    """

    LINES = np.array([(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)])
    LIKED = np.array([3, 2, 3, 2, 4, 2, 3, 2, 3])

    def chosen(self, kind: str, seen: np.ndarray, masks: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        if kind == "player_2":
            return (torch.rand(masks.shape, generator=generator).numpy() * masks).argmax(axis=-1)
        board = seen.reshape(*seen.shape[:-1], 9, 2)
        worth = self.LIKED + 100 * self._completes(board[..., 0]) + 10 * self._completes(board[..., 1])
        worth = np.concatenate([worth, np.zeros_like(worth[..., :1])], axis=-1)
        return np.where(masks, worth, -1).argmax(axis=-1)

    def _completes(self, mine: np.ndarray) -> np.ndarray:
        """[..., 9] whether a place makes a line of three of the places [..., 9]."""
        found = np.zeros(mine.shape, bool)
        for line in self.LINES:
            for k in range(3):
                found[..., line[k]] |= mine[..., np.delete(line, k)].all(axis=-1)
        return found


class Navigation(Rule):
    """VMAS's `navigation`: straight to the goal, braking.

    Observed: position (2), velocity, way from the goal, and what a ring of rays meets.
    """

    PULL, BRAKING = 3.0, 1.5

    def chosen(self, kind: str, seen: np.ndarray, masks: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        velocity, from_goal = seen[..., 2:4], seen[..., 4:6]
        return np.clip(-self.PULL * from_goal - self.BRAKING * velocity, -1, 1).astype(np.float32)


class Battle(Rule):
    """magent2's `battle`: hit whom one can reach, else go to the nearest enemy in sight, else to where they come from.

    Observed: 13 × 13 squares around oneself, [y, x, what]: walls, friends, their health, enemies, their health.
    """

    STEPS = np.array([(dx, dy) for dy in range(-2, 3) for dx in range(-2, 3) if dx * dx + dy * dy <= 4])
    BLOWS = np.array([(dx, dy) for dy in range(-1, 2) for dx in range(-1, 2) if dx or dy])
    REACH = 6

    def chosen(self, kind: str, seen: np.ndarray, masks: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        shown = seen.reshape(*seen.shape[:2], 13, 13, 5)
        blocked, enemies = shown[..., [0, 1, 3]].any(axis=-1), shown[..., 3] > 0
        y, x = np.mgrid[-self.REACH : self.REACH + 1, -self.REACH : self.REACH + 1]
        distance = np.where(enemies, np.hypot(x, y), np.inf).reshape(*seen.shape[:2], -1)
        nearest = distance.argmin(axis=-1)
        place = np.stack([x.ravel()[nearest], y.ravel()[nearest]], axis=-1)
        met = np.isfinite(distance.min(axis=-1))
        goal = np.where(met[..., None], place, [99 if kind == "red" else -99, 0])
        left = np.linalg.norm(goal[..., None, :] - self.STEPS, axis=-1)
        free = ~blocked[..., self.STEPS[:, 1] + self.REACH, self.STEPS[:, 0] + self.REACH] | ~self.STEPS.any(axis=-1)
        step = np.where(free, left, np.inf).argmin(axis=-1)
        hit = (place[..., None, :] == self.BLOWS).all(axis=-1)
        return np.where(met & hit.any(axis=-1), len(self.STEPS) + hit.argmax(axis=-1), step)


EXPERTS: Mapping[str, type[Rule]] = {
    "pettingzoo:mpe2.simple_spread_v3": Spread,
    "pettingzoo:pettingzoo.classic.tictactoe_v3": Noughts,
    "pettingzoo:magent2.environments.battle_v4": Battle,
    "vmas:navigation": Navigation,
}
