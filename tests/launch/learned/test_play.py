"""`bm3il play`: an episode to look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

import bm3il
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import returns
from bm3il.launch import progress
from bm3il.launch.cli import main
from bm3il.launch.files import load_demonstrations
from bm3il.launch.learned import episode_picture, play
from bm3il.launch.learned.episode_picture import Episode, draw
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.launch.test_cli import fails
from tests.launch.test_public import TINY

TOWERS = "rover_tower?pairs=2"
WORLD = EnvironmentSpec("world", (TypeSpec("walker", 3, 4, 5), TypeSpec("flyer", 2, 3, 2, discrete=False)), 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bm3il.Run:
    folder = tmp_path_factory.mktemp("runs")
    return bm3il.train("rover_tower_4", steps=100, run="rovers", runs_folder=folder, **TINY)


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        shown = []
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            shown.append(np.asarray(image.convert("RGB")))
        return shown


def test_a_run_is_played_beside_expert_and_random(
    run: bm3il.Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play, "MOST_FRAMES", 5)
    assert main(["play", str(run.folder), "--seed", "3", "--expert", "--random"]) == 0
    told = capsys.readouterr().out
    expected = returns(make_environment(TOWERS, 1), UniformPolicy(run.spec), 3)
    rovers = next(line for line in told.splitlines() if "rover " in line)
    assert f"{expected[0, :2].mean():.2f}" in rovers
    assert [word for word in ("policy", "expert", "random") if word in told] == ["policy", "expert", "random"]
    assert told.endswith(f"{run.folder / 'play.gif'}\n")
    shown = frames(run.folder / "play.gif")
    assert len(shown) == 6
    assert (shown[0] != shown[-1]).mean() > 0.01


def test_a_demonstrated_start_is_played_from(
    run: bm3il.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "game.png")
    assert main(["play", str(run.folder), "--episode", "2", "--output", output]) == 0
    assert matplotlib.image.imread(output).std() > 0.05  # something is on it
    capsys.readouterr()
    assert "--episode must be within 0..99, got 100" in fails(capsys, "play", str(run.folder), "--episode", "100")
    assert "not allowed with" in fails(capsys, "play", str(run.folder), "--episode", "1", "--seed", "1")
    demonstrations = load_demonstrations(run.trained.config)
    starts = play._demonstrated(run.trained, 2)
    np.testing.assert_array_equal(starts["goal_positions"], demonstrations.starts["goal_positions"][2:3])


def test_what_cannot_be_played_or_drawn_is_said_at_once(
    run: bm3il.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "cannot draw 'game.mp5': expected one of " in fails(capsys, "play", str(run.folder), "--output", "game.mp5")
    assert "does not fit this run" in fails(capsys, "play", str(run.folder), "--environment", "rover_tower?pairs=3")
    assert "--seed must be at least 0" in fails(capsys, "play", str(run.folder), "--seed", "-1")
    assert "is not the folder of a run" in fails(capsys, "play", str(tmp_path))


def test_what_cannot_be_written_is_said_before_anything_is_played(
    run: bm3il.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play, "record", None)
    (tmp_path / "folder.gif").mkdir()
    for where, why in (("none/game.gif", "No such file or directory"), ("folder.gif", "Is a directory")):
        output = str(tmp_path / where)
        assert f"cannot write {output}: {why}" in fails(capsys, "play", str(run.folder), "--output", output)
    episode_picture.check_path(tmp_path / "game.gif")
    assert not (tmp_path / "game.gif").exists()


def test_who_waits_is_told_how_far_it_is(
    run: bm3il.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    assert main(["play", str(run.folder), "--random", "--output", str(tmp_path / "game.gif")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["policy plays: step 1 of 25", "policy plays: step 2 of 25"]
    assert "random plays: step 25 of 25" in told
    assert told[-1] == "drawing: picture 26 of 26"


@pytest.mark.parametrize("name", [TOWERS, "rover_tower?pairs=2&slip=0.1", "berlin?types=3&agents=6&closed=22"])
def test_our_environments_draw_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "MOST_FRAMES", 6)
    world = make_environment(name, 2)
    episode = play.record(name, UniformPolicy(world.spec), 0)
    every = -(-world.spec.episode_length // 6)
    assert sorted(episode.frames) == sorted({*range(0, episode.steps, every), episode.steps})
    first, last = episode.frames[0], episode.frames[episode.steps]
    assert first.shape == last.shape
    assert first.dtype == np.uint8
    assert first.std() > 10
    assert np.abs(first.astype(int) - last).mean() > 0.5
    expected = returns(make_environment(name, 1), UniformPolicy(world.spec), 0)
    np.testing.assert_allclose(episode.returns[-1], expected[0], rtol=1e-5)


def test_a_type_in_brackets_keeps_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    bus = EnvironmentSpec("world", (TypeSpec("[bus]", 2, 1, 2),), 1)
    play._print(bus, {"policy": Episode({}, np.ones((1, 2)), np.ones((2, 2)))})
    assert "[bus]" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*render method without:UserWarning")
def test_pettingzoo_draws_in_its_own_way() -> None:
    name = "pettingzoo:mpe2.simple_tag_v3?arguments=max_cycles:4"
    world = make_environment(name, 1)
    world.reset(0)
    assert world.render() is None  # type: ignore[attr-defined]
    episode = play.record(name, UniformPolicy(world.spec), 0)
    assert sorted(episode.frames) == [0, 1, 2, 3, 4]
    assert max(episode.frames[0].shape) <= play.MOST_PIXELS
    assert episode.frames[0].std() > 1


def test_who_knows_no_pictures_is_shown_by_its_actions(tmp_path: Path) -> None:
    name = "pettingzoo:tests.protocol.picture_world?arguments=agents:3,side:4"
    episode = play.record(name, UniformPolicy(make_environment(name, 1).spec), 0)
    assert episode.frames == {}
    assert episode.actions.shape == (8, 3)


def test_who_is_not_there_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = RoverTower.step

    def dying(self: RoverTower, actions: Sequence[np.ndarray]) -> TimeStep:
        now = step(self, actions)
        now.active[0][:, 0] = False
        return now

    monkeypatch.setattr(RoverTower, "step", dying)
    monkeypatch.setattr(play, "MOST_FRAMES", 1)
    episode = play.record(TOWERS, UniformPolicy(make_environment(TOWERS, 1).spec), 0)
    nobody = np.zeros(episode.actions.shape, bool)
    nobody[1:, 0] = True
    np.testing.assert_array_equal(np.isnan(episode.actions), nobody)


def test_an_environment_that_draws_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoverTower, "render", lambda self: np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"render\(\) must give uint8 \[H, W, 3\], gave uint8 \[4, 4\]"):
        play.record(TOWERS, UniformPolicy(make_environment(TOWERS, 1).spec), 0)


def played(steps: int, drawn: bool) -> Episode:
    random = np.random.default_rng(steps)
    actions = np.concatenate([random.integers(5, size=(steps, 3)), random.uniform(-1, 1, (steps, 2))], axis=1)
    actions[-1, 0] = np.nan
    pictures = {t: np.full((30, 40, 3), 20 * t, np.uint8) for t in range(steps + 1)} if drawn else {}
    return Episode(pictures, actions, np.cumsum(random.standard_normal((steps + 1, 5)), axis=0))


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_episodes_of_unequal_length_are_drawn_side_by_side(suffix: str, drawn: bool, tmp_path: Path) -> None:
    path = tmp_path / f"episodes{suffix}"
    draw({"policy": played(4, drawn), "random": played(2, drawn)}, WORLD, "a world", path)
    shown = frames(path)
    assert shown[0].std() > 10
    if suffix == ".gif":
        assert len(shown) == 5  # equal frames at the end are one, which stays
        assert all((a != b).any() for a, b in pairwise(shown))


def test_a_strip_shows_what_was_done_until_now() -> None:
    episode = played(4, drawn=False)
    stage = episode_picture._Stage({"policy": episode}, WORLD, "a world")
    stage.show(2)
    walkers, flyers = (np.ma.filled(image.get_array(), np.nan) for image in stage._images[0])
    np.testing.assert_array_equal(walkers[:, :2], episode.actions[:2, :3].T)
    assert np.isnan(walkers[:, 2:]).all()
    np.testing.assert_array_equal(flyers[:, :2], episode.actions[:2, 3:].T)
    np.testing.assert_allclose(stage._lines[0][1].get_ydata(), episode.returns[:3, 3:].mean(1))
