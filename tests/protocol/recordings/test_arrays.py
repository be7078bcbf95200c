"""An npz of plain arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bm3il.actors.experts.recording import record
from bm3il.actors.policy import UniformPolicy
from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.arrays import read_arrays
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec

SPEC = EnvironmentSpec("town", (TypeSpec("bus", 2, 3, 4), TypeSpec("tram", 1, 2, 2, discrete=False)), 4)


def arrays() -> dict[str, np.ndarray]:
    """Two episodes of 3 and 2 steps."""
    random = np.random.default_rng(0)
    actions = random.integers(4, size=(5, 2))
    masks = random.random((5, 2, 4)) < 0.5
    np.put_along_axis(masks, actions[..., None], True, axis=2)
    return {
        "bus.observations": random.normal(size=(5, 2, 3)),
        "bus.actions": actions,
        "bus.action_masks": masks,
        "bus.active": np.array([[1, 0], [1, 1], [1, 1], [1, 1], [0, 1]]),
        "tram.observations": random.normal(size=(5, 1, 2)),
        "tram.actions": random.uniform(-1, 1, (5, 1, 2)),
        "episode_lengths": np.array([3, 2]),
        "returns": np.ones((2, 3)),
        "groups": np.array([4, 4]),
    }


def write(tmp_path: Path, **fields: Any) -> Path:
    np.savez(tmp_path / "mine.npz", **fields)
    return tmp_path / "mine.npz"


def test_arrays_come_back(tmp_path: Path) -> None:
    fields = arrays()
    found = read_arrays(write(tmp_path, **fields), SPEC)
    there = fields["bus.active"] == 1
    np.testing.assert_array_equal(found.active[0], there)
    np.testing.assert_array_equal(found.observations[0][there], fields["bus.observations"][there].astype(np.float32))
    np.testing.assert_array_equal(found.action_masks[0][there], fields["bus.action_masks"][there])
    np.testing.assert_array_equal(found.actions[0][there], fields["bus.actions"][there])
    np.testing.assert_array_equal(found.actions[1], fields["tram.actions"].astype(np.float32))
    assert (found.episode_lengths.tolist(), found.groups.tolist(), found.return_mean) == ([3, 2], [4, 4], 1)


def test_masks_of_who_takes_no_part_may_be_anything(tmp_path: Path) -> None:
    fields = arrays()
    masks = np.where((fields["bus.active"] == 1)[..., None], fields["bus.action_masks"], np.nan)
    found = read_arrays(write(tmp_path, **fields | {"bus.action_masks": masks}), SPEC)
    np.testing.assert_array_equal(found.action_masks[0], read_arrays(write(tmp_path, **fields), SPEC).action_masks[0])


def test_what_may_be_left_out_is(tmp_path: Path) -> None:
    optional = ("bus.action_masks", "bus.active", "returns", "groups")
    found = read_arrays(write(tmp_path, **{n: a for n, a in arrays().items() if n not in optional}), SPEC)
    assert found.active[0].all()
    assert found.action_masks[0].all()
    assert found.return_mean is None
    assert found.groups.tolist() == [0, 1]


def test_an_environment_that_describes_its_observations_takes_them_expanded(tmp_path: Path) -> None:
    town = make_environment("berlin?types=2&agents=4&sight=near", 1)
    played = record(town, UniformPolicy(town.spec), 1, seed=3, origin="")
    fields: dict[str, Any] = {"episode_lengths": played.episode_lengths}
    for m, t in enumerate(town.spec.types):
        fields |= {f"{t.name}.observations": played.observations[m], f"{t.name}.actions": played.actions[m]}
    found = read_arrays(write(tmp_path, **fields), town.spec)
    assert found.spec == town.spec
    for m in range(2):
        np.testing.assert_array_equal(found.observations[m], played.observations[m])
        np.testing.assert_array_equal(found.action_masks[m], played.action_masks[m])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bus.actions", None, "the array 'bus.actions' is missing"),
        ("episode_lengths", None, "the field 'episode_lengths' is missing"),
        ("bus.activ", np.ones((5, 2)), r"unknown array 'bus.activ'; did you mean bus.active"),
        ("episode_lengths", np.array([2, 2]), r"bus.observations: expected \[4, 2, 3\], found \[5, 2, 3\]"),
        ("episode_lengths", np.array([5]), r"row 4 \(step 4 of episode 0\), .*: expected episodes of at most 4 steps"),
        ("episode_lengths", np.array([2**62] * 3 + [2**62 + 5]), r"episode_lengths: expected at most \d+ rows in all"),
        ("episode_lengths", np.array(5), r"episode_lengths: expected \[episodes\] integers .*, found int64 \[5\]"),
        ("episode_lengths", np.array([3.0, 2.0]), "episode_lengths: expected"),
        (
            "bus.actions",
            np.full((5, 2), 4),
            r"row 0 \(step 0 of episode 0\), bus_0: expected an action of 'bus' in 0..3",
        ),
        ("bus.actions", np.full((5, 2), 1.5), "bus.actions: expected integers, found float64"),
        ("bus.action_masks", np.zeros((5, 2, 4)), r"bus_0: expected an allowed action \(none at all\), got"),
        ("tram.actions", np.full((5, 1, 2), -2), r"tram_0: expected an action of 'tram' in -1..1, got -2"),
        (
            "tram.observations",
            np.full((5, 1, 2), np.nan),
            r"tram_0: expected a finite number in 'observation.0', got nan",
        ),
        ("bus.observations", np.full((5, 2, 3), 1e99), r"bus_0: expected a finite number in 'observation.0', got inf"),
        (
            "bus.active",
            np.full((5, 2), 0.5),
            r"row 0 \(step 0 .*\), bus_0: expected 0 or 1 .* in 'bus.active', got 0.5",
        ),
        ("bus.active", np.full((5, 2), np.nan), r"bus_0: expected 0 or 1 .* in 'bus.active', got nan"),
        ("bus.action_masks", np.full((5, 2, 4), -1), r"bus_0: expected 0 or 1 .* in 'bus.action_masks', got -1"),
        ("groups", np.array([0.5, np.nan]), "groups: expected integers, found float64"),
        ("tram.observations", np.array([[{}]], object), "pickle"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, name: str, value: Any, text: str) -> None:
    fields = {n: a for n, a in (arrays() | {name: value}).items() if a is not None}
    if name == "episode_lengths" and value is not None and value.size == 1:
        fields = {n: a for n, a in fields.items() if n not in ("returns", "groups")}
    with pytest.raises(InputError, match=text) as error:
        read_arrays(write(tmp_path, **fields), SPEC)
    assert str(error.value).startswith(str(tmp_path / "mine.npz"))
    assert "\n" not in str(error.value)
