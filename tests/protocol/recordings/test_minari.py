"""Data sets of Minari, made here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("minari")
pytest.importorskip("pyarrow")
import minari
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.minari import is_minari, read_minari
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

SEEN = spaces.Dict({"place": spaces.Box(-9, 9, (2,)), "lamp": spaces.Discrete(2)})
BOX = spaces.Box(np.array([0, -4], np.float32), np.array([1, 4], np.float32))


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    """Two episodes of a walk, of 3 and 2 steps: where it is, and which of two lamps is on."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = []
    for steps in (3, 2):
        seen = {
            "place": np.tile(np.arange(steps + 1, dtype=np.float32)[:, None] / 2, 2),
            "lamp": np.arange(steps + 1) % 2,
        }
        continuous = np.array([[1, 2 * step - 4] for step in range(steps)], np.float32)
        actions = continuous if request.param else np.arange(1, steps + 1)
        rewards = [float(np.sum(action)) for action in actions]
        ends = [step == 2 for step in range(steps)], [step == 1 and steps == 2 for step in range(steps)]
        episodes.append(EpisodeBuffer(None, 1, None, seen, actions, rewards, *ends))
    space = BOX if request.param else spaces.Discrete(3, start=1)
    told = {"algorithm_name": "none", "description": "a test", "data_format": "arrow"}
    minari.create_dataset_from_buffers("corridor/test-v0", episodes, action_space=space, observation_space=SEEN, **told)
    return "corridor/test-v0", request.param


def spec(continuous: bool, **changes: Any) -> EnvironmentSpec:
    kind: dict[str, Any] = {"observation_dim": 4, "action_dim": 2 if continuous else 3, "discrete": not continuous}
    return EnvironmentSpec("corridor", (TypeSpec("walker", **({"count": 1} | kind | changes)),), 3)


def test_a_data_set_becomes_demonstrations(recorded: tuple[str, bool], tmp_path: Path) -> None:
    name, continuous = recorded
    found = read_minari(f"minari:{name}", spec(continuous))
    assert found.episode_lengths.tolist() == [3, 2]
    lamp, place = found.observations[0][:, 0, :2], found.observations[0][:, 0, 2:]
    assert place.tolist() == [[0, 0], [0.5, 0.5], [1, 1], [0, 0], [0.5, 0.5]]
    assert lamp.argmax(axis=1).tolist() == [0, 1, 0, 0, 1]
    if continuous:
        np.testing.assert_array_equal(found.actions[0][:3, 0], [[1, -1], [1, -0.5], [1, 0]])
    else:
        assert found.actions[0][:, 0].tolist() == [0, 1, 2, 0, 1]
    assert found.returns[:, 0].tolist() == ([-3, -4] if continuous else [6, 3])
    by_path = read_minari(tmp_path / name, spec(continuous))
    np.testing.assert_array_equal(by_path.observations[0], found.observations[0])
    assert is_minari(f"minari:{name}")
    assert is_minari(tmp_path / name)
    assert not is_minari(tmp_path)


def test_a_data_set_of_another_environment_is_refused(recorded: tuple[str, bool]) -> None:
    name, continuous = recorded
    with pytest.raises(InputError, match=r"expected observations of 5 numbers .* found 4 numbers"):
        read_minari(f"minari:{name}", spec(continuous, observation_dim=5))
    with pytest.raises(InputError, match=r"found actions of (Box|Discrete)"):
        read_minari(f"minari:{name}", spec(not continuous))
    with pytest.raises(InputError, match="are of one agent, and 'corridor' has 2"):
        read_minari(f"minari:{name}", spec(continuous, count=2))
    with pytest.raises(InputError, match=r"step 2 of episode 0: expected episodes of at most 2 steps"):
        read_minari(f"minari:{name}", EnvironmentSpec("corridor", spec(continuous).types, 2))


def test_what_is_not_there_is_not_downloaded(recorded: tuple[str, bool], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a data set of Minari on this machine: .*not found") as error:
        read_minari("minari:corridor/other-v0", spec(False))
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match="expected a data set of Minari on this machine"):
        read_minari(tmp_path / "empty", spec(False))
