"""What can be imported and is hardly meant: files of others leave units open and fill columns that nobody measured."""

from __future__ import annotations

import numpy as np

from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.actors.environments.berlin.scenario import Scenario

SHORTEST_TRIP_MINUTES = 1.0
LONGEST_TRIP = 0.5
"""Of the time before work begins: roads slow down as they fill."""
PLAUSIBLE_CAPACITY = (50.0, 50_000.0)
"""Vehicles per hour of a link, if all have the same: what is outside stands for "unknown" or "without limit"."""
MIN_INSIDE = 0.5


def doubts(raw: RawNetwork, scenario: Scenario) -> list[str]:
    """A line for everything in the files that does not look right, naming the option that mends it."""
    found = [_capacities(raw), _trips(raw, scenario), _outside(raw)]
    return [doubt for doubt in found if doubt]


def _capacities(raw: RawNetwork) -> str:
    capacity = raw.capacity[raw.minutes > 0]  # connectors of zones take no time and hold any number
    least, most = PLAUSIBLE_CAPACITY
    if not len(capacity) or np.ptp(capacity) > 0 or least <= capacity[0] <= most:
        return ""
    return (
        f"every link has a capacity of {capacity[0]:g} vehicles per hour, as if it were unknown: "
        "--flow-scale says how much roads hold"
    )


def _trips(raw: RawNetwork, scenario: Scenario) -> str:
    minutes, before_work = scenario.median_trip_minutes(), scenario.work_start_minute - scenario.day_start_minute
    too_long = minutes > LONGEST_TRIP * before_work
    if minutes >= SHORTEST_TRIP_MINUTES and not too_long:
        return ""
    unit = "" if raw.unit_told else " --minutes-per-unit tells their unit (0.0166667 for seconds, 60 for hours)"
    return (
        f"half of all trips take {minutes:.3g} minutes or {'more' if too_long else 'less'} on empty roads, "
        f"in a day that has {before_work:g} before work: are the times of the files right?{unit}"
    )


def _outside(raw: RawNetwork) -> str:
    inside = raw.ends_inside()
    if inside >= MIN_INSIDE:
        return ""
    return (
        f"only {inside:.0%} of homes and works lie where the network is; the others are taken to its edge: "
        "--radius leaves them out"
    )
