"""Episodes as pictures: what the environment draws, else what everybody does; and below it what each type returns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from PIL import Image

from bm3il.actors.environments.drawing import pixels
from bm3il.actors.evaluation import AtWork
from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

MOVING = ".gif"
DOTS_PER_INCH = 100
FRAME_MILLISECONDS, LAST_MILLISECONDS = 120, 2_000
MOMENTS = 6
"""In a picture that does not move."""
TYPES_SHOWN = 10
"""Of more types, the first."""
COLOURS_APART = 10, 20
"""How many there are in the palettes tab10 and tab20."""
LEGEND_COLUMNS = 5
CHARACTERS_PER_INCH = 13
"""Of a title."""


@dataclass(frozen=True)
class Episode:
    """T steps of N agents.

    frames: pictures [H, W, 3] uint8 by the step that they were taken after, 0 and T among them; {} if the environment
        draws none.
    actions: [T, N] the action of each agent, NaN of those who were not there; of continuous ones the mean.
    returns: [T + 1, N] true returns so far.
    """

    frames: Mapping[int, np.ndarray]
    actions: np.ndarray
    returns: np.ndarray

    @property
    def steps(self) -> int:
        """T."""
        return len(self.actions)


def check_path(path: Path) -> None:
    """Raise InputError for a file of a kind that cannot be drawn, and for one that cannot be written."""
    known = sorted({MOVING, *(f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes())})
    if path.suffix.lower() not in known:
        raise InputError(f"cannot draw '{path.name}': expected one of {', '.join(known)}")
    is_new = not path.exists()
    try:
        # To append, so that an older picture stays until there is one to take its place.
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def draw(
    episodes: Mapping[str, Episode],
    spec: EnvironmentSpec,
    title: str,
    path: Path,
    at_work: AtWork = lambda *_: None,
) -> None:
    """Draw episodes side by side, by the names of who played them: moving, or some moments of each. Raises OSError.

    at_work: called after each picture that is to move with its number, and how many there are.
    """
    longest = max(episode.steps for episode in episodes.values())
    if spec.num_types > TYPES_SHOWN:
        title += f", the first {TYPES_SHOWN} of {spec.num_types} types"
    if path.suffix.lower() != MOVING and _are_drawn(episodes):
        _moments(episodes, spec, title).savefig(path, dpi=DOTS_PER_INCH)
        return
    stage = _Stage(episodes, spec, title)
    if path.suffix.lower() != MOVING:
        stage.show(longest)
        stage.figure.savefig(path, dpi=DOTS_PER_INCH)
        return
    steps = sorted({step for episode in episodes.values() for step in episode.frames} or range(longest + 1))
    frames = []
    for number, step in enumerate(steps, 1):
        stage.show(step)
        frames.append(Image.fromarray(pixels(stage.figure)))
        at_work(number, len(steps))
    durations = [FRAME_MILLISECONDS] * (len(steps) - 1) + [LAST_MILLISECONDS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


class _Stage:
    """A figure of all episodes, as far as one step."""

    def __init__(self, episodes: Mapping[str, Episode], spec: EnvironmentSpec, title: str) -> None:
        self._episodes, self._spec = list(episodes.values()), spec
        kinds = list(enumerate(spec.types))[:TYPES_SHOWN]
        heights = [4.2] if _are_drawn(episodes) else [max(0.5, min(2.0, 0.16 * kind.count)) for _, kind in kinds]
        self.figure = Figure(
            figsize=(0.6 + 4.2 * len(episodes), sum(heights) + 2.6), dpi=DOTS_PER_INCH, layout="constrained"
        )
        axes = self.figure.subplots(
            len(heights) + 1, len(episodes), squeeze=False, sharey="row", height_ratios=[*heights, 1.6]
        )
        self._images: list[list[Any]] = []
        for column, (who, episode) in zip(axes.T, episodes.items(), strict=True):
            column[0].set_title(who, fontsize=10)
            if _are_drawn(episodes):
                self._images.append([_show(column[0], episode.frames[0])])
            else:
                self._images.append([_strip(ax, kind, episode) for ax, (_, kind) in zip(column, kinds, strict=False)])
        self._lines = [_returns(ax, episode, spec) for ax, episode in zip(axes[-1], self._episodes, strict=True)]
        axes[-1, 0].set_ylabel("return so far", fontsize=8)
        _explain(self.figure, axes[-1, 0])
        self._title = _titled(self.figure, title + "\n")
        # Laid out once: what changes later shall not move the rest.
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def show(self, step: int) -> None:
        """What there was to see after so many steps."""
        text, _, _ = self._title.get_text().rpartition("\n")
        self._title.set_text(f"{text}\nstep {step}")
        for episode, images, lines in zip(self._episodes, self._images, self._lines, strict=True):
            now = min(step, episode.steps)
            if episode.frames:
                images[0].set_data(episode.frames[max(s for s in episode.frames if s <= now)])
            else:
                past = np.arange(episode.steps)[:, None] < now
                for m, image in enumerate(images):
                    image.set_data(np.where(past, episode.actions[:, self._spec.agents(m)], np.nan).T)
            for m, line in enumerate(lines):
                line.set_data(np.arange(now + 1), _mean(episode, self._spec, m)[: now + 1])


def _titled(figure: Figure, title: str) -> Any:
    """The title, in as many lines as it needs: an environment's name, with all its options, may be long."""
    room = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    # The options of an environment are one word, which may be broken after any &.
    lines = [textwrap.fill(line.replace("&", "& "), room).replace("& ", "&") for line in title.split("\n")]
    return figure.suptitle("\n".join(lines), fontsize=9)


def _moments(episodes: Mapping[str, Episode], spec: EnvironmentSpec, title: str) -> Figure:
    """A row for each episode: some moments, and the returns on the way."""
    height, width = next(iter(next(iter(episodes.values())).frames.values())).shape[:2]
    figure = Figure(figsize=(2.6 * (MOMENTS + 1) * width / height, 0.5 + 2.9 * len(episodes)), layout="constrained")
    axes = figure.subplots(len(episodes), MOMENTS + 1, squeeze=False)
    for row, (who, episode) in zip(axes, episodes.items(), strict=True):
        steps = sorted(episode.frames)
        chosen = [steps[round(k)] for k in np.linspace(0, len(steps) - 1, MOMENTS)]
        for ax, step in zip(row, chosen, strict=False):
            _show(ax, episode.frames[step])
            ax.set_title(f"{who}, step {step}" if step == 0 else f"step {step}", fontsize=8)
        row[-1].sharey(axes[0, -1])
        _returns(row[-1], episode, spec)
        row[-1].set_title("return so far", fontsize=8)
    _explain(figure, axes[0, -1])
    _titled(figure, title)
    return figure


def _are_drawn(episodes: Mapping[str, Episode]) -> bool:
    return all(episode.frames for episode in episodes.values())


def _show(axes: Axes, picture: np.ndarray) -> Any:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#dddddd")  # many pictures are white
    return axes.imshow(picture)


def _explain(figure: Figure, axes: Axes) -> None:
    """A legend of the lines in some axes, below everything."""
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7, frameon=False)


def _strip(axes: Axes, kind: TypeSpec, episode: Episode) -> Any:
    """An empty strip of what the agents of a type do, a row for each."""
    if kind.discrete:
        few = next((count for count in COLOURS_APART if kind.action_dim <= count), None)
        cmap, low, high = (f"tab{few}", 0, few - 1) if few else ("viridis", 0, kind.action_dim - 1)
    else:
        cmap, low, high = "coolwarm", -1, 1
    nothing = np.full((kind.count, max(1, episode.steps)), np.nan)
    image = axes.imshow(nothing, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_ylabel(kind.name, fontsize=7, rotation=0, ha="right", va="center")
    axes.set(yticks=[], xticks=[])
    return image


def _returns(axes: Axes, episode: Episode, spec: EnvironmentSpec) -> list[Any]:
    """Lines of what the agents of each type have got so far, all of them drawn."""
    lines = []
    for m, kind in enumerate(spec.types[:TYPES_SHOWN]):
        lines += axes.plot(_mean(episode, spec, m), linewidth=1.4, label=kind.name)
    axes.margins(0.03, 0.08)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def _mean(episode: Episode, spec: EnvironmentSpec, m: int) -> np.ndarray:
    """[T + 1] per agent of a type."""
    means: np.ndarray = episode.returns[:, spec.agents(m)].mean(axis=1)
    return means
