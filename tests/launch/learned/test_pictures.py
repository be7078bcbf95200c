"""Pictures of a run on Berlin."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import bm3il
from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.experts.commuters import StayHome
from bm3il.actors.policy import UniformPolicy
from bm3il.launch.learned import pictures
from bm3il.launch.learned.pictures import Days, attention_while_playing, draw_pictures
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

ENVIRONMENT = "berlin?types=10&agents=50&sight=near"


def test_all_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DAYS", 2)
    demonstrations = Demonstrations.load(resolve("berlin46"))
    paths = draw_pictures(ENVIRONMENT, UniformPolicy(demonstrations.spec), demonstrations, tmp_path / "pictures", 8.5)
    assert [path.name for path in paths] == ["map.png", "loads.png", "places.png", "day.gif"]
    for path in paths[:3]:
        assert matplotlib.image.imread(path).std() > 0.05  # something is on it


def test_counts_are_means_over_days() -> None:
    days = Days("", np.array([[[0, 1, 1]], [[2, 1, 0]]]))
    np.testing.assert_allclose(days.counts(4), [[1, 1.5, 0.5, 0]])


def test_locations_are_read_from_observations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DAYS", 3)
    drawn: list[Days] = []
    monkeypatch.setattr(pictures, "_draw_maps", lambda berlin, days, step, path: drawn.extend(days))
    for name in ("_draw_loads", "_draw_places", "_animate"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    demonstrations, berlin = Demonstrations.load(resolve("berlin46")), make_environment(ENVIRONMENT, 3)
    assert isinstance(berlin, Berlin)
    places, steps = berlin.scenario.num_locations, berlin.scenario.steps
    draw_pictures(ENVIRONMENT, StayHome(berlin), demonstrations, tmp_path / "pictures", 8.5)
    expert, imitator = drawn
    seen = np.concatenate([o[: 3 * steps, :, :places].argmax(-1) for o in demonstrations.observations], axis=1)
    np.testing.assert_array_equal(expert.locations, seen.reshape(3, steps, -1))
    now = berlin.reset(pictures.SEED)
    for step in range(steps):
        np.testing.assert_array_equal(imitator.locations[:, step], berlin.locations)
        now = berlin.step(StayHome(berlin).act(now, None))  # type: ignore[arg-type]


def test_an_hour_is_the_step_that_it_falls_in() -> None:
    berlin = Berlin(1)
    assert (pictures._step_at(berlin, 8.0), pictures._clock(berlin, 18)) == (18, "08:00")
    assert pictures._step_at(berlin, 8.1) == 18
    with pytest.raises(InputError, match="--hour must lie in the day"):
        pictures._step_at(berlin, 3)


def test_other_environments_have_no_map(tmp_path: Path) -> None:
    demonstrations = Demonstrations.load(resolve("rover_tower_8"))
    with pytest.raises(InputError, match="expected a world of berlin"):
        draw_pictures("rover_tower?pairs=4", UniformPolicy(demonstrations.spec), demonstrations, tmp_path, -1)


@pytest.mark.parametrize("policy", ["clipped", "actor"])
def test_critics_of_every_kind_tell_whom_agents_listen_to(tmp_path: Path, policy: str) -> None:
    """Those of clipped updates have heads of their own."""
    small = {"mode": "serial", "steps": 50, "actor__steps_per_iteration": 50, "learner__updates": 1}
    few = {"evaluation__starts": "fresh", "evaluation__episodes": 2, "evaluation__final_episodes": 2}
    run = bm3il.train("rover_tower_4", run="a", runs_folder=tmp_path, learner__policy=policy, **small, **few)
    critic = run.trained.critic(run.policy.layout)
    assert critic is not None
    matrix = attention_while_playing(critic, run.trained.config.environment, run.policy)
    assert matrix is not None
    np.testing.assert_allclose(matrix.sum(axis=1), [1, 1], atol=1e-5)
