"""Data sets of Minari: recordings of one agent, for an environment of one agent.

Named `minari:ID`, of the data sets of this machine (`minari list local`), or by the path of their folder. Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.recording import Recording
from bm3il.protocol.recordings.spaces import flat, unit
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

PREFIX = "minari:"


def is_minari(name: str | Path) -> bool:
    """Whether a data set of Minari is meant."""
    return str(name).startswith(PREFIX) or _folder(Path(name)) is not None


def read_minari(name: str | Path, spec: EnvironmentSpec) -> Demonstrations:
    """Demonstrations of an environment of one agent. Its returns are the sums of the rewards.

    Observations are put side by side as `gymnasium.spaces.utils.flatten` does; actions of a box are scaled to −1..1.
    Raises InputError for a data set that is not there, that needs Minari where it is not installed, or that does not
    fit the environment.
    """
    if spec.num_agents != 1:
        raise InputError(f"{name}: data sets of Minari are of one agent, and '{spec.name}' has {spec.num_agents}")
    data = _opened(name)
    (kind,) = spec.types
    episodes = [_episode(name, data, kind, episode) for episode in data.iterate_episodes()]
    if not episodes:
        raise InputError(f"{name}: expected episodes, found none")
    lengths = np.array([len(actions) for _, actions, _ in episodes])
    ends = np.cumsum(lengths)

    def place(m: int, row: int, agent: int) -> str:
        episode = int(np.searchsorted(ends, row, side="right"))
        return f"{name}: step {row - int(ends[episode] - lengths[episode])} of episode {episode}"

    observations, actions, returns = (np.concatenate(part) for part in zip(*episodes, strict=True))
    recording = Recording(
        observations=[observations[:, None]],
        actions=[actions[:, None]],
        active=[np.ones((len(actions), 1), bool)],
        action_masks=[None],
        episode_lengths=lengths,
        returns=returns[:, None],
        place=place,
    )
    return recording.demonstrations(spec, f"imported from {name}")


def _folder(path: Path) -> Path | None:
    """Where the data are, if this is the folder of a data set."""
    return next((folder for folder in (path, path / "data") if (folder / "metadata.json").is_file()), None)


def _opened(name: str | Path) -> Any:
    try:
        import minari
    except ImportError as error:
        raise InputError(
            f"{name}: data sets of Minari need it, and it is not installed: pip install 'bm3il[minari]'"
        ) from error
    folder = None if str(name).startswith(PREFIX) else _folder(Path(name))
    try:
        return minari.load_dataset(str(name).removeprefix(PREFIX)) if folder is None else minari.MinariDataset(folder)
    except (OSError, ValueError, KeyError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: expected a data set of Minari on this machine: {reason}") from error


def _episode(
    name: str | Path, data: Any, kind: TypeSpec, episode: Any
) -> tuple[np.ndarray, np.ndarray, Sequence[float]]:
    """Observations [T, O] before the T actions, these, and the return [1]."""
    steps = len(episode.rewards)
    seen = [flat(data.observation_space, _at(episode.observations, t)) for t in range(steps)]
    actions = _actions(name, data.action_space, kind, np.asarray(episode.actions))
    if not steps or len(actions) != steps or len(seen[0]) != kind.observation_dim:
        raise InputError(
            f"{name}: expected observations of {kind.observation_dim} numbers and as many actions as rewards, found "
            f"{len(seen[0]) if seen else 0} numbers, {len(actions)} actions and {steps} rewards in episode {episode.id}"
        )
    return np.stack(seen), actions, [float(np.sum(episode.rewards, dtype=np.float64))]


def _at(observations: Any, t: int) -> Any:
    """The observation number t, of arrays in dictionaries and tuples."""
    if isinstance(observations, dict):
        return {key: _at(entry, t) for key, entry in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_at(entry, t) for entry in observations)
    return observations[t]


def _actions(name: str | Path, space: Any, kind: TypeSpec, actions: np.ndarray) -> np.ndarray:
    """[T] from 0 on, or [T, A] in −1..1."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete) and kind.discrete and space.n == kind.action_dim:
        return actions.astype(np.int64) - int(space.start)
    continuous = isinstance(space, spaces.Box) and space.is_bounded() and not kind.discrete
    if continuous and np.prod(space.shape) == kind.action_dim:
        return unit(space, actions)
    wanted = f"{kind.action_dim} discrete actions" if kind.discrete else f"a bounded box of {kind.action_dim} numbers"
    raise InputError(f"{name}: expected {wanted}, found actions of {space}")
