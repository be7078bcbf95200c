"""Scripted experts: they act on what the agents observe, and on nothing else.

An expert is an entry point of the group `bm3il.experts`, so a user's package adds its own, under the name of the
environment, without options (or without its target, for whatever that is):

    [project.entry-points."bm3il.experts"]
    my_town = "my_package.experts:Planner"      # called as Planner(spec); acts as `actors.rollout.Acts`
"""

from __future__ import annotations

from importlib.metadata import entry_points

import numpy as np
import torch

from bm3il.actors.experts.commuters import CongestionAware
from bm3il.actors.rollout import Acts
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec

GROUP = "bm3il.experts"
ARRIVED = 0.1
DELAY = 1
"""The number that tells, of an edge ahead, by how much the way over it takes longer than the fastest one."""


class NoExpertError(InputError):
    """Nobody has written a scripted expert for this environment."""


class RoverTowerExpert:
    """Rover Tower solved through the messages.

    The tower's symbol is the direction in which its rover is farther from the goal, in the numbering of the rover's
    actions, and 0 where it is near: the steepest descent of the squared distance. The rover obeys. In the first step
    it has heard nothing yet and makes for the centre, where goals are nearest on average.
    """

    def act(self, now: TimeStep, generator: torch.Generator | None = None, greedy: bool = False) -> list[np.ndarray]:
        """Actions of rovers and towers, [E, P] int64 each; the rule is deterministic, so the rest is not used."""
        rover, tower = now.observations
        symbols, position = rover[..., -9:-4], rover[..., -4:-2]
        orders = symbols.argmax(axis=-1)
        rover_actions = np.where(symbols.any(axis=-1), orders, _direction(-position))
        return [rover_actions, _direction(tower[..., -2:] - tower[..., -4:-2])]


class Rerouting:
    """Vehicles of SUMO that take, at every junction, the way that is fastest by the rides that are told there now."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        ways = [part.width for part in spec.types[0].parts if part.name.startswith("ahead.")]
        self._ways, self._width = len(ways), ways[0]

    def act(self, now: TimeStep, generator: torch.Generator | None = None, greedy: bool = False) -> list[np.ndarray]:
        """Per type [E, X_m] int64; the rule is deterministic, so the rest is not used."""
        return [self._chosen(*shown) for shown in zip(now.observations, now.action_masks, strict=True)]

    def _chosen(self, seen: np.ndarray, masks: np.ndarray) -> np.ndarray:
        ahead = seen[..., -self._ways * self._width :].reshape(*seen.shape[:-1], self._ways, self._width)
        delays = np.where(masks[..., 1:], ahead[..., DELAY], np.inf)
        return np.where(masks[..., 0], 0, 1 + delays.argmin(axis=-1))


def rover_tower_expert(spec: EnvironmentSpec) -> Acts:
    """It is the same for any number of pairs."""
    return RoverTowerExpert()


def berlin_expert(spec: EnvironmentSpec) -> Acts:
    """It has planned in the world of this spec, changed as that may be."""
    return CongestionAware(make_environment(spec.name, 1))


def expert_for(spec: EnvironmentSpec) -> Acts:
    """The scripted expert of an environment.

    Raises NoExpertError if there is none, InputError if it cannot be imported.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    target = spec.name.partition("?")[0]
    point = points.get(target) or points.get(target.partition(":")[0])
    if point is None:
        raise NoExpertError(
            f"no scripted expert for '{spec.name}'; there is one for {', '.join(sorted(points))}, and your own is an "
            f"entry point of the group {GROUP}"
        )
    try:
        return point.load()(spec)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the expert of '{spec.name}' is {point.value}, which cannot be imported: {error}") from error


def _direction(way: np.ndarray) -> np.ndarray:
    """Ways to go [..., 2] → action [...]: 1 +x, 2 −x, 3 +y, 4 −y along the longer coordinate, 0 if it is short."""
    axis = np.abs(way).argmax(axis=-1)
    distance = np.take_along_axis(way, axis[..., None], axis=-1)[..., 0]
    return np.where(np.abs(distance) < ARRIVED, 0, 1 + 2 * axis + (distance < 0))
