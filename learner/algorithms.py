"""The algorithms, as compositions: what the critic sees × how many particles × where the reward comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from learner.critics import Context
from protocol.errors import unknown_name
from reward_server.settings import RewardSettings


@dataclass(frozen=True)
class Algorithm:
    """A row of the table.

    context: what the critic sees of the others.
    bayesian: whether the settings' number of particles is used; otherwise L = 1, a plain discriminator.
    imitates: whether the reward is learned; otherwise it is the environment's.
    clones: behaviour cloning: no critic, no reward, no environment steps.
    """

    context: Context
    bayesian: bool = False
    imitates: bool = True
    clones: bool = False

    def reward_settings(self, settings: RewardSettings) -> RewardSettings:
        """The settings with which the reward server runs this algorithm."""
        particles = settings.particles if self.bayesian else 1
        return replace(settings, particles=particles, source="learned" if self.imitates else "environment")


ALGORITHMS = {
    "bm3il": Algorithm("types", bayesian=True),
    "ma-gail": Algorithm("none"),
    "ma-daac": Algorithm("agents"),
    "bayesian-ma-daac": Algorithm("agents", bayesian=True),
    "mtmfil": Algorithm("uniform_types"),
    "expert": Algorithm("types", imitates=False),
    "maac": Algorithm("agents", imitates=False),
    "bc": Algorithm("none", imitates=False, clones=True),
}


def algorithm(name: str) -> Algorithm:
    """The row of this name. Raises InputError, naming the nearest, if there is none."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]
