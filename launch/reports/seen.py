"""What is seen of a run's newest policy when it plays: whom it listens to, and in Berlin where everybody goes."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.launch.config import Config
from bm3il.launch.files import load_demonstrations
from bm3il.launch.learned.pictures import PICTURES, attention_while_playing, draw_pictures
from bm3il.launch.learned.trained import Trained, load_trained
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment

TITLES = ("At the busiest hour", "Loads of the roads over the day", "Who is where")
"""Of the first of `PICTURES`; an animation has no place in print."""


@dataclass(frozen=True)
class Seen:
    """types: names of the rows and columns of `attention` [M][M].   pictures: titles and data URIs.   notes: what could
    not be seen, and why."""

    types: tuple[str, ...] = ()
    attention: tuple[tuple[float, ...], ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[tuple[str, tuple[float, ...]]]:
        """Of the attention, with their names."""
        return list(zip(self.types, self.attention, strict=True))

    @property
    def strongest(self) -> float:
        """Of the attention, what has the full colour: the largest, or twice what each had if all were alike."""
        return max([2 / max(1, len(self.types)), *(value for row in self.attention for value in row)])


def look_at(folder: Path, config: Config) -> Seen:
    """Let the policy of the newest checkpoint play. What cannot be played is a note: a page does without."""
    if not (folder / "checkpoints").is_dir():
        return Seen()
    try:
        trained = load_trained(folder)
        critic, name = trained.critic(trained.policy.layout), config.environment
        matrix = None if critic is None else attention_while_playing(critic, name, trained.policy)
        types = () if matrix is None else tuple(kind.name for kind in trained.policy.layout.spec.types)
        attention = () if matrix is None else tuple(tuple(map(float, row)) for row in matrix)
        return Seen(types, attention, tuple(_pictures(trained)))
    except InputError as error:
        return Seen(notes=(f"the policy was not seen at play: {error}",))
    except Exception as error:  # a simulator is somebody else's code, and may raise anything
        return Seen(notes=(f"the policy was not seen at play: {type(error).__name__}: {error}",))


def _pictures(trained: Trained) -> Iterator[tuple[str, str]]:
    config = trained.config
    is_berlin = isinstance(unperturbed(make_environment(config.environment, 1)), Berlin)
    if not is_berlin or not config.demonstrations:
        return
    demonstrations = load_demonstrations(config).for_crowd(trained.policy.layout.spec)
    with tempfile.TemporaryDirectory() as folder:
        names = PICTURES[: len(TITLES)]
        paths = draw_pictures(config.environment, trained.policy, demonstrations, Path(folder), names=names)
        for title, path in zip(TITLES, paths, strict=True):
            yield title, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
