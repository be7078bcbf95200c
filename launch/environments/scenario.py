"""`bm3il scenario`: import one from a folder of other people's files, look into one, draw it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bm3il.actors.environments.berlin.aggregation import Hours, aggregate
from bm3il.actors.environments.berlin.doubts import doubts
from bm3il.actors.environments.berlin.matsim import HOME, WORK, read_matsim
from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.actors.environments.berlin.scenario import MIN_ROADS_OF_TRIP, Scenario
from bm3il.actors.environments.berlin.scenario_file import format_scenario, load_scenario
from bm3il.actors.environments.berlin.source_files import find_sources
from bm3il.actors.environments.berlin.tntp import read_tntp
from bm3il.actors.environments.berlin.town import LOCATIONS, read_town
from bm3il.launch.surroundings import screen
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically


@dataclass(frozen=True)
class Reading:
    """How the files of others are read. network, plans: which files, "" for those that are found.

    minutes_per_unit: of TNTP times.   home, work: MATSim's activity types.
    radius: keep trips within it of the middle, in the unit of the network's coordinates; 0 keeps all.
    """

    network: str = ""
    plans: str = ""
    minutes_per_unit: float = 1.0
    home: Sequence[str] = HOME
    work: Sequence[str] = WORK
    radius: float = 0.0


def import_folder(
    folder: Path, output: Path, name: str, roads: int, facilities: int, reading: Reading, hours: Hours
) -> int:
    """Make a scenario of a folder of MATSim or TNTP files, or of the two tables of a town. Raises InputError.

    What was left out of the files, or hardly can be meant, is told on the standard error.
    """
    if output.exists():
        raise InputError(f"{output} exists; take another --output")
    if (folder / LOCATIONS).exists():
        scenario, told = replace(read_town(folder, hours.flow_scale or 1.0), name=name or folder.name), list[str]()
    else:
        raw = read_folder(folder, reading)
        scenario = aggregate(raw, name or folder.name, roads, facilities, hours)
        told = [*raw.notes, *doubts(raw, scenario)]
    if not scenario.commutes():
        raise InputError(
            f"{folder}: nobody would travel: no home is {MIN_ROADS_OF_TRIP} roads or more from a work; "
            "ask for more --roads or other --facilities"
        )
    write_atomically(output, format_scenario(scenario))
    for line in told:
        print(f"bm3il: {line}", file=sys.stderr)
    _print(scenario)
    return 0


def read_folder(folder: Path, reading: Reading) -> RawNetwork:
    """What the MATSim or TNTP files of a folder tell. Raises InputError, naming file and row."""
    sources = find_sources(folder, reading.network, reading.plans)
    if sources.format == "tntp":
        raw = read_tntp(sources.network, sources.trips, sources.places, reading.minutes_per_unit)
    else:
        raw = read_matsim(sources.network, sources.trips, sources.places, reading.home, reading.work)
    return raw.within(reading.radius) if reading.radius else raw


def inspect(name: str, picture: Path | None) -> int:
    """Print what a scenario holds, and draw its map. Raises InputError if it is not a valid one."""
    scenario = load_scenario(name)
    _print(scenario)
    if picture is not None:
        # Only here: nothing else in this module draws, or needs matplotlib.
        from bm3il.actors.environments.berlin.map import save_map

        save_map(scenario, picture)
        print(picture)
    return 0


def _print(scenario: Scenario) -> None:
    console = screen()
    minutes, load = scenario.free_flow_minutes, scenario.load_agents
    before_work = scenario.work_start_minute - scenario.day_start_minute
    rows = [
        ("name", scenario.name),
        ("source", scenario.source),
        ("locations", f"{scenario.num_roads} roads, {scenario.num_facilities} facilities, "
         f"{len(scenario.junction_names)} junctions, {len(scenario.transitions)} moves"),
        ("free flow", f"{minutes.min():.1f} to {minutes.max():.1f} minutes a road, median {np.median(minutes):.1f}"),
        ("load", f"{load.min():.2f} to {load.max():.2f} agents a road, median {np.median(load):.2f}"),
        ("day", f"{scenario.steps} steps of {scenario.step_minutes:g} minutes, work begins after {before_work:g}"),
        ("trips", f"half of them take at most {scenario.median_trip_minutes():.1f} minutes on empty roads"),
        ("agent types", f"up to {len(scenario.commutes())}, of {len(scenario.demand)} pairs of home and work"),
    ]  # fmt: skip
    for label, value in rows:
        console.print(f"{label:<14}{value}", markup=False, soft_wrap=True)
