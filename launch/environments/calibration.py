"""`bm3il calibrate ENVIRONMENT`: what a day is worth to commuters who ignore each other, and to those who do not."""

from __future__ import annotations

import numpy as np
from rich.progress import track
from rich.table import Table

from bm3il.actors.environments.berlin.environment import berlin_of
from bm3il.actors.evaluation import ReturnEstimate, evaluate
from bm3il.actors.experts.commuters import CongestionAware, FreeFlow, StayHome
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import Acts
from bm3il.launch.surroundings import screen
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

INTERVAL_95 = 1.96


def calibrate(name: str, days: int, seed: int) -> int:
    """Print the return per agent and day of simple and of expert commuters, with 95 % intervals over days.

    The interaction gap is how far free flow for everyone stays below the congestion-aware expert, as a part of the
    range from random to expert: 0 where agents do not get in each other's way.
    Raises InputError for an environment that is no Berlin, or fewer than two days.
    """
    environment = make_environment(name, 1)
    loads = berlin_of(environment).load_agents
    if days < 2:
        raise InputError(f"--days must be at least 2, got {days}")
    console = screen()
    makers: dict[str, type] = {"stay at home": StayHome, "free flow": FreeFlow, "congestion-aware": CongestionAware}
    policies: dict[str, Acts] = {"random": UniformPolicy(environment.spec)}
    policies |= {label: maker(environment) for label, maker in makers.items()}
    table = Table("policy", "return per agent and day", "95 %", "days", title=environment.spec.name)
    means = {}
    for label, policy in track(policies.items(), "playing", console=console, transient=True):
        estimate = ReturnEstimate.of(evaluate(name, policy, days, seed))
        assert estimate.stderr is not None  # of two days or more
        half = INTERVAL_95 * estimate.stderr
        means[label] = estimate.mean
        table.add_row(
            label, f"{estimate.mean:.1f}", f"{estimate.mean - half:.1f} to {estimate.mean + half:.1f}", str(days)
        )
    console.print(table)
    gap = (means["congestion-aware"] - means["free flow"]) / (means["congestion-aware"] - means["random"])
    console.print(f"interaction gap {gap:.1%} of the range from random to congestion-aware")
    console.print(
        f"a road holds {np.median(loads):.2f} agents (median; {loads.min():.2f} to {loads.max():.2f}) at free speed"
    )
    return 0
