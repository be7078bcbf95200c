"""`bm3il scenario`: import one from a folder of other people's files, look into one, draw it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from bm3il.actors.environments.berlin.aggregation import Hours, aggregate
from bm3il.actors.environments.berlin.matsim import read_matsim
from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.actors.environments.berlin.scenario_file import format_scenario, load_scenario
from bm3il.actors.environments.berlin.tntp import read_tntp
from bm3il.actors.environments.berlin.town import LOCATIONS, TRANSITIONS, read_town
from bm3il.launch.run_folder import write_atomically
from bm3il.protocol.errors import InputError


def import_folder(
    folder: Path,
    output: Path,
    name: str,
    roads: int,
    facilities: int,
    minutes_per_unit: float,
    radius: float,
    hours: Hours,
) -> int:
    """Make a scenario of a folder of MATSim or TNTP files, or of the two tables of a town. Raises InputError.

    radius: keep trips within it of the middle, in the unit of the network's coordinates; 0 keeps all.
    """
    if output.exists():
        raise InputError(f"{output} exists; take another --output")
    if (folder / LOCATIONS).exists():
        scenario = replace(read_town(folder, hours.flow_scale or 1.0), name=name or folder.name)
    else:
        raw = _read(folder, minutes_per_unit)
        if radius:
            raw = raw.within(radius)
        scenario = aggregate(raw, name or folder.name, roads, facilities, hours)
    write_atomically(output, format_scenario(scenario))
    _print(scenario)
    return 0


def inspect(name: str, picture: Path | None) -> int:
    """Print what a scenario holds, and draw its map. Raises InputError if it is not a valid one."""
    scenario = load_scenario(name)
    _print(scenario)
    if picture is not None:
        from bm3il.actors.environments.berlin.map import save_map

        save_map(scenario, picture)
        print(picture)
    return 0


def _read(folder: Path, minutes_per_unit: float) -> RawNetwork:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = {pattern: sorted(folder.glob(pattern)) for pattern in ("*_net.tntp", "*_trips.tntp", "*_node.tntp")}
    network, plans = sorted(folder.glob("*network*.xml*")), sorted(folder.glob("*plans*.xml*"))
    if found["*_net.tntp"] and found["*_trips.tntp"]:
        nodes = found["*_node.tntp"][0] if found["*_node.tntp"] else None
        return read_tntp(found["*_net.tntp"][0], found["*_trips.tntp"][0], nodes, minutes_per_unit)
    if network and plans:
        return read_matsim(network[0], plans[0])
    raise InputError(
        f"{folder} holds neither a MATSim network and plans (network.xml.gz, plans.xml.gz) "
        f"nor TNTP files (NAME_net.tntp, NAME_trips.tntp) nor a town's tables ({LOCATIONS}, {TRANSITIONS})"
    )


def _print(scenario: Scenario) -> None:
    console = Console(highlight=False)
    minutes, load = scenario.free_flow_minutes, scenario.load_agents
    usable = sum(len(scenario.way(int(h), int(w))) >= 2 for h, w, _ in scenario.demand)
    rows = [
        ("name", scenario.name),
        ("source", scenario.source),
        ("locations", f"{scenario.num_roads} roads, {scenario.num_facilities} facilities, "
         f"{len(scenario.junction_names)} junctions, {len(scenario.transitions)} moves"),
        ("free flow", f"{minutes.min():.1f} to {minutes.max():.1f} minutes a road, median {np.median(minutes):.1f}"),
        ("load", f"{load.min():.2f} to {load.max():.2f} agents a road, median {np.median(load):.2f}"),
        ("day", f"{scenario.steps} steps of {scenario.step_minutes:g} minutes"),
        ("agent types", f"up to {usable}, of {len(scenario.demand)} pairs of home and work"),
    ]  # fmt: skip
    for label, value in rows:
        console.print(f"{label:<14}{value}", markup=False, soft_wrap=True)
