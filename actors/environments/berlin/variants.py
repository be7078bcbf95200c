"""Named ways in which a scenario asks more of a learner: `berlin46-incidents` is `berlin46` with incidents.

They were fixed before any algorithm was compared on them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """What differs from the plain scenario. Whatever is drawn is drawn anew every day, and agents observe it.

    load_factor: roads hold this part of their load.
    incidents: so many roads are slow for `incident_minutes` of the day; they then hold `incident_load_factor` of
        their load.   rush_minutes: incidents begin at most so long before or after the hours when work begins and ends.
    shift_minutes: each agent's working hours begin and end up to so much earlier or later.
    absence: part of the agents who need not go to work.
    """

    load_factor: float = 1.0
    incidents: int = 0
    incident_minutes: float = 120.0
    incident_load_factor: float = 0.1
    rush_minutes: float = 60.0
    shift_minutes: float = 0.0
    absence: float = 0.0

    @property
    def varies(self) -> bool:
        """Whether days differ from each other."""
        return bool(self.incidents or self.shift_minutes or self.absence)


PLAIN = Variant()
VARIANTS = {
    "tight": Variant(load_factor=0.6),
    "incidents": Variant(incidents=6),
    "shifts": Variant(shift_minutes=90),
    "demand": Variant(absence=0.3),
}


def split_variant(name: str) -> tuple[str, Variant]:
    """`berlin46-incidents` → (`berlin46`, its variant); a name without a known ending is a plain scenario."""
    scenario, _, variant = name.rpartition("-")
    return (scenario, VARIANTS[variant]) if scenario and variant in VARIANTS else (name, PLAIN)
