"""The algorithms, as compositions: what the critic sees × how many particles × where the reward comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bm3il.learner.critics import Context
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.errors import unknown_name
from bm3il.reward_server.settings import KernelScope, RewardSettings, Source


@dataclass(frozen=True)
class Algorithm:
    """A row of the table.

    context: what the critic sees of the others.
    bayesian: whether the settings' number of particles is used; otherwise L = 1, a plain discriminator.
    imitates: whether the reward is learned; otherwise it is the environment's.
    clones: behaviour cloning: no critic, no reward, no environment steps.
    as_released: as the authors' code, where it differs from the text: an agent's own type is left out of the attention,
        the query comes from the state alone, and the SVGD kernel acts on each parameter tensor by itself.
    """

    context: Context
    bayesian: bool = False
    imitates: bool = True
    clones: bool = False
    as_released: bool = False

    def reward_settings(self, settings: RewardSettings) -> RewardSettings:
        """The settings with which the reward server runs this algorithm."""
        particles = settings.particles if self.bayesian else 1
        source: Source = "learned" if self.imitates else "environment"
        scope: KernelScope = "tensor" if self.as_released else settings.kernel_scope
        return replace(settings, particles=particles, source=source, kernel_scope=scope)

    def learner_settings(self, settings: LearnerSettings) -> LearnerSettings:
        """The settings with which the learner runs this algorithm."""
        return replace(
            settings,
            attend_own_type=settings.attend_own_type and not self.as_released,
            query="state" if self.as_released else settings.query,
            # It centres a learned reward, and has nothing to say about a true one.
            reward_offset=settings.reward_offset if self.imitates else 0.0,
        )


ALGORITHMS = {
    "bm3il": Algorithm("types", bayesian=True),
    "bm3il-released": Algorithm("types", bayesian=True, as_released=True),
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
