"""Pictures of a run on Berlin: the demonstrated days beside those of the policy.

`bm3il evaluate RUN --pictures` writes them to RUN/pictures: the map at the busiest hour, the loads of all roads over
the day, who is where, and a day as an animation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from rich.progress import track

from bm3il.actors.environments.berlin.environment import Berlin, berlin_of
from bm3il.actors.environments.berlin.map import COLOURS, HOME_COLOUR, WORK_COLOUR, draw_map
from bm3il.actors.rollout import Acts, rollout
from bm3il.learner.attention import attention_by_type
from bm3il.learner.critics import Critic
from bm3il.learner.replay import Replay
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

PICTURES = ("map.png", "loads.png", "places.png", "day.gif")
LOAD_LABEL = "agents on the road / agents that it holds at free speed"
DAYS = 50
ATTENTION_EPISODES = 10
SEED = 1_000_003
DOTS_PER_INCH = 100
FRAMES_PER_SECOND = 7
ELSEWHERE_COLOURS = {"at home": HOME_COLOUR, "on the road": "#999999", "at work": WORK_COLOUR, "elsewhere": "#F0E442"}


@dataclass(frozen=True)
class Days:
    """Where agents were: locations [days, T, N] at the beginning of every step."""

    title: str
    locations: np.ndarray

    def counts(self, places: int) -> np.ndarray:
        """[T, K] mean agents at each location."""
        return np.stack(
            [np.bincount(now.ravel(), minlength=places) / len(now) for now in self.locations.swapaxes(0, 1)]
        )


def draw_pictures(
    environment: str,
    policy: Acts,
    demonstrations: Demonstrations,
    folder: Path,
    hour: float = -1.0,
    names: Sequence[str] = PICTURES,
) -> list[Path]:
    """Draw pictures of a run, some of `PICTURES`, into `folder`; returns their paths.

    hour: of the map, 0..24; negative takes the busiest one. Raises InputError for an environment that has no map.
    """
    world = make_environment(environment, DAYS)
    berlin = berlin_of(world)
    folder.mkdir(exist_ok=True)
    steps = berlin.scenario.steps
    shown = demonstrations.in_form_of(world.spec).arrays["0.codes"][: DAYS * steps, :, 0]
    # Without the last row, which is what is seen after the last step.
    played = rollout(world, policy, SEED).arrays["0.codes"][:-1, ..., 0].swapaxes(0, 1)
    days = [Days("expert", shown.reshape(-1, steps, shown.shape[1])), Days("imitator", played)]
    step = _busiest(berlin, days[0]) if hour < 0 else _step_at(berlin, hour)
    drawings: dict[str, Callable[[Path], None]] = {
        "map.png": lambda path: _draw_maps(berlin, days, step, path),
        "loads.png": lambda path: _draw_loads(berlin, days, path),
        "places.png": lambda path: _draw_places(berlin, days, path),
        "day.gif": lambda path: _animate(berlin, days, path),
    }
    for name in track(names, "drawing", transient=True, disable=not sys.stdout.isatty()):
        drawings[name](folder / name)
    return [folder / name for name in names]


def attention_while_playing(critic: Critic, environment: str, policy: Acts) -> np.ndarray | None:
    """Which type listens to which while the policy plays, [M, M] as `attention_by_type`; None if the critic weighs
    nobody."""
    played = rollout(make_environment(environment, ATTENTION_EPISODES), policy, SEED)
    replay = Replay(critic.layout, played.terminated.size)
    return attention_by_type(critic, replay.rows(replay.add(played)))


def draw_attention(critic: Critic, environment: str, policy: Acts, path: Path) -> bool:
    """Which type listens to which, while the policy plays; false if the critic weighs nobody."""
    matrix = attention_while_playing(critic, environment, policy)
    if matrix is None:
        return False
    names = [kind.name for kind in critic.layout.spec.types]
    figure = Figure(figsize=(2.5 + 0.55 * len(names), 1.8 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap=COLOURS, vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="listened to", ylabel="listening type")
    figure.colorbar(image, ax=axes, label="attention, mean over heads and agents")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return True


def _hours(berlin: Berlin) -> np.ndarray:
    """[T] hour of the day at the beginning of each step."""
    scenario = berlin.scenario
    return (scenario.day_start_minute + scenario.step_minutes * np.arange(scenario.steps)) / 60


def _step_at(berlin: Berlin, hour: float) -> int:
    hours = _hours(berlin)
    if not hours[0] <= hour <= hours[-1] + berlin.scenario.step_minutes / 60:
        raise InputError(f"--hour must lie in the day, {hours[0]:g} to {hours[-1]:g}, got {hour:g}")
    return int(np.searchsorted(hours, hour, side="right")) - 1


def _busiest(berlin: Berlin, days: Days) -> int:
    return int(days.counts(berlin.scenario.num_locations)[:, : berlin.scenario.num_roads].sum(axis=1).argmax())


def _loads(berlin: Berlin, days: Days) -> np.ndarray:
    """[T, R] agents on a road as a part of what it holds at free speed."""
    roads = berlin.scenario.num_roads
    return days.counts(berlin.scenario.num_locations)[:, :roads] / berlin.load_agents


def _clock(berlin: Berlin, step: int) -> str:
    minute = round(berlin.scenario.day_start_minute + step * berlin.scenario.step_minutes)
    return f"{minute // 60:02d}:{minute % 60:02d}"


def _draw_maps(berlin: Berlin, days: list[Days], step: int, path: Path) -> None:
    figure, maps = _map_figure(berlin, days, step)
    figure.suptitle(f"{_clock(berlin, step)}, mean of {len(days[0].locations)} and {len(days[1].locations)} days")
    figure.colorbar(maps[0], ax=figure.axes, shrink=0.7, label=LOAD_LABEL)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _map_figure(berlin: Berlin, days: list[Days], step: int, names: bool = True) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    roads, limits = berlin.scenario.num_roads, (0.0, max(1.0, float(_loads(berlin, days[0])[step].max())))
    maps = []
    for axes, one in zip(figure.subplots(1, 2), days, strict=True):
        counts = one.counts(berlin.scenario.num_locations)[step]
        loads, closed = counts[:roads] / berlin.load_agents, berlin.changes.closed
        maps.append(draw_map(axes, berlin.scenario, loads, counts[roads:], limits, names, closed))
        axes.set_title(one.title)
    return figure, maps


def _draw_loads(berlin: Berlin, days: list[Days], path: Path) -> None:
    """Roads sorted by the expert's peak, one colour scale."""
    loads, hours = [_loads(berlin, one) for one in days], _hours(berlin)
    order = np.argsort(-loads[0].max(axis=0))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, one, load in zip(axes, days, loads, strict=True):
        image = ax.pcolormesh(
            hours, np.arange(len(order)), load.T[order], cmap=COLOURS, vmin=0, vmax=loads[0].max(), shading="nearest"
        )
        ax.set(title=one.title, xlabel="hour of the day")
    axes[0].invert_yaxis()
    axes[0].set_ylabel("roads, the expert's busiest first")
    figure.colorbar(image, ax=axes, label=LOAD_LABEL)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_places(berlin: Berlin, days: list[Days], path: Path) -> None:
    """A column per type, the expert above the imitator: which part of the agents is where."""
    spec, hours = berlin.spec, _hours(berlin)
    figure = Figure(figsize=(2 + 1.5 * spec.num_types, 4.4), layout="constrained")
    axes = figure.subplots(2, spec.num_types, sharex=True, sharey=True, squeeze=False)
    for row, one in zip(axes, days, strict=True):
        for ax, offset, kind in zip(row, spec.offsets, spec.types, strict=True):
            here = one.locations[..., offset : offset + kind.count]
            masks = here == berlin.home[offset], here < berlin.scenario.num_roads, here == berlin.work[offset]
            parts = [mask.mean(axis=(0, 2)) for mask in masks]
            parts.append(1 - sum(parts))
            areas = ax.stackplot(hours, parts, colors=list(ELSEWHERE_COLOURS.values()))
        row[0].set_ylabel(f"{one.title}\npart of agents")
    for ax, kind in zip(axes[0], spec.types, strict=True):
        ax.set_title(f"{kind.name}\n{kind.count} agents", fontsize=8)
    axes[0, 0].set(xlim=(hours[0], hours[-1]), ylim=(0, 1))
    figure.supxlabel("hour of the day")
    figure.legend(areas, list(ELSEWHERE_COLOURS), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _animate(berlin: Berlin, days: list[Days], path: Path) -> None:
    figure, maps = _map_figure(berlin, days, 0, names=False)
    figure.set_size_inches(8, 3.9)
    for axes in figure.axes:
        for text in list(axes.texts):
            text.remove()
    loads = [_loads(berlin, one) for one in days]
    for roads, load in zip(maps, loads, strict=True):
        roads.set_clim(0, max(1.0, float(np.quantile(loads[0].max(axis=1), 0.95))))
        roads.set_array(load[0])
    clock = figure.suptitle(_clock(berlin, 0))

    def frame(step: int) -> list[Any]:
        clock.set_text(_clock(berlin, step))
        for roads, load in zip(maps, loads, strict=True):
            roads.set_array(load[step])
        return maps

    FuncAnimation(figure, frame, frames=berlin.scenario.steps).save(
        path, writer=PillowWriter(fps=FRAMES_PER_SECOND), dpi=70
    )
