"""What a run says of a changed world: seeds' runs in processes of their own, plays, intervals, tables, the map."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.evaluation import evaluate
from bm3il.actors.experts.commuters import FreeFlow
from bm3il.launch.cli import main
from bm3il.launch.config import Config, load_preset
from bm3il.launch.learned.evaluate import FRESH_SEED
from bm3il.launch.result import read_result
from bm3il.launch.studies import pool
from bm3il.launch.surroundings import screen
from bm3il.launch.whatif import whatif
from bm3il.launch.whatif.figures import Sample, figures_of, hourly, hours_of, loads_of, play, student_t
from bm3il.launch.whatif.report import _load_change, print_tables
from bm3il.launch.whatif.whatif import changed_world, changes, slug
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.registry import make_environment

BERLIN = "berlin?scenario=berlin46&types=10&agents=50&sight=near"
CLOSED = f"{BERLIN}&closed=22,23"
TOWER = "rover_tower?pairs=2"
SLIPPING = f"{TOWER}&slip=0.1"
ITERATIONS = 60
TINY = [
    *("--algorithm", "bc", "--mode", "serial", "--cloning.iterations", "1", "--cloning.updates", "2"),
    *("--evaluation.episodes", "1", "--evaluation.final-episodes", "2", "--actor.hidden", "16"),
    *("--learner.hidden", "16", "--learner.clipped.epochs", "1", "--learner.clipped.parts", "2"),
    *("--reward.hidden", "16", "--reward.updates", "1", "--reward.batch-size", "8", "--reward.window-steps", "100"),
]


def cloned(folder: Path, name: str, *args: str) -> Path:
    """The folder of a tiny run of cloning."""
    assert main(["train", *TINY, "--runs-folder", str(folder), "--run", name, *args]) == 0
    return folder / name


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with one of the demonstrated days."""
    path = tmp_path_factory.mktemp("day") / "day.safetensors"
    Demonstrations.load(resolve("berlin46")).select(1, seed=0).save(path)
    return str(path)


@pytest.fixture(scope="module")
def berlin_run(tmp_path_factory: pytest.TempPathFactory, day: str) -> Path:
    return cloned(tmp_path_factory.mktemp("runs"), "berlin", "--preset", "berlin", "--demonstrations", day)


@pytest.fixture(scope="module")
def tower_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = ["--demonstration-episodes", "2", "--actor.steps-per-iteration", "50"]
    return cloned(tmp_path_factory.mktemp("runs"), "tower", "--preset", "rover_tower_4", *few)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C and SIGTERM mean after a test what they meant before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(run: Path, environment: str, seeds: int, steps: int, episodes: int = 3) -> int:
    size = ["--seeds", str(seeds), "--steps", str(steps), "--jobs", "1", "--episodes", str(episodes)]
    return main(["whatif", str(run), "--environment", environment, *size])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "whatif.json").read_text())  # type: ignore[no-any-return]


def first_line(folder: Path) -> str:
    """Of the log of a run: with wall seconds, so another one if it began anew."""
    return (folder / "log.jsonl").read_text().splitlines()[0]


def refused(capsys: pytest.CaptureFixture[str], run: Path, environment: str, *args: str) -> str:
    """The one line with which `whatif` refuses; nothing is left behind."""
    capsys.readouterr()
    before = set(run.rglob("*"))
    assert main(["whatif", str(run), "--environment", environment, *args]) == 2
    assert set(run.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.processes
def test_a_closed_road_from_clone_to_map(berlin_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(berlin_run, CLOSED, seeds=1, steps=2_000) == 0
    folder = berlin_run / "whatif" / "closed-22-23"
    report = report_of(folder)
    assert (report["change"], report["before"], report["environment"]) == ("closed=22,23", BERLIN, CLOSED)
    assert (report["seeds"], report["steps"], report["episodes"]) == ([1], 2_000, 3)
    assert set(report["returns"]) == {"random", "run", "clone", "imitator", "expert"}
    assert set(report["before_returns"]) == {"clone", "expert"}
    assert report["returns"]["expert"]["normalized"] == 1
    # One seed: its policies are known, what others would do is not.
    assert report["returns"]["clone"]["interval"] is None is report["imitator_minus_clone"]["interval"]
    assert len(report["returns"]["expert"]["interval"]) == 2
    assert read_result(folder / "seed-1")["status"] == "finished"

    loads = report["loads"]
    assert loads["closed"] == [22, 23]
    assert loads["hours"] == list(range(5, 22))
    assert loads["rush_hours"] == [6, 7, 8, 9, 15, 16, 17, 18]
    assert np.shape(loads["after"]["imitator"]["hours"]["mean"]) == (17, 46)
    assert loads["after"]["imitator"]["rush"]["low"] is None
    assert len(loads["after"]["expert"]["rush"]["low"]) == 46
    assert not np.array(loads["after"]["expert"]["hours"]["mean"])[:, [22, 23]].any()
    assert np.array(loads["before"]["expert"]["hours"])[:, [22, 23]].any()
    assert matplotlib.image.imread(folder / "whatif.png").std() > 0.05  # something is on it
    for text in (capsys.readouterr().out, (folder / "whatif.md").read_text()):
        assert "imitator − clone" in text
        assert "home1-work5" in text
        assert "One seed" in text


@pytest.mark.processes
def test_stopped_runs_go_on_and_one_that_fails_keeps_no_other(
    tower_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.02)
    folder, steps = tower_run / "whatif" / "slip-0.1", 250 * ITERATIONS
    first, second = folder / "seed-1", folder / "seed-2"

    def stop_the_first() -> None:
        while not (first / "log.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_the_first, daemon=True).start()
    assert ask(tower_run, SLIPPING, 2, steps) == 130
    begun, line = read_result(first), first_line(first)
    assert (begun["status"], read_result(second)) == ("interrupted", {})
    assert 0 < begun["iterations"] < ITERATIONS
    assert not (folder / "whatif.json").exists()
    assert ask(tower_run, SLIPPING, 2, 2 * steps) == 2
    assert f"steps: {steps} then, steps: {2 * steps} now" in capsys.readouterr().err

    (second / "checkpoints" / "00000010").mkdir(parents=True)  # there is nothing in it
    assert ask(tower_run, SLIPPING, 2, steps) == 1
    (words,) = capsys.readouterr().err.splitlines()
    assert words.startswith("bm3il: seed-2 failed: no checkpoint in ")
    assert words.endswith(f"log: {second / 'run.log'}")
    assert report_of(folder)["seeds"] == [1]
    assert read_result(first)["iterations"] == ITERATIONS
    assert first_line(first) == line  # it went on, and did not begin anew

    (folder / "whatif.json").unlink()
    log = (first / "run.log").read_text()
    assert ask(tower_run, SLIPPING, 1, steps) == 0
    assert (first / "run.log").read_text() == log  # it had ended
    assert "loads" not in report_of(folder)


def test_what_cannot_be_asked_is_refused(
    berlin_run: Path, tower_run: Path, day: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'rover_tower?pairs=2' is no change" in refused(capsys, berlin_run, TOWER)
    other = refused(capsys, berlin_run, "berlin?types=5&agents=50&sight=near")
    assert (
        "is no change of the run's world, 'berlin?scenario=berlin46&types=10&agents=50&sight=near': expected" in other
    )
    assert f"e.g. '{BERLIN}&slip=0.05'" in other
    assert "is the run's own world" in refused(capsys, berlin_run, "berlin?types=10&agents=50&sight=near")
    assert "no way" in refused(capsys, berlin_run, f"{BERLIN}&closed={','.join(map(str, range(46)))}")
    assert "--seeds must be at least 1, got 0" in refused(capsys, berlin_run, CLOSED, "--seeds", "0")
    assert "--steps must be at least 1" in refused(capsys, berlin_run, CLOSED, "--steps", "0")
    assert "--episodes must be at least 1" in refused(capsys, berlin_run, CLOSED, "--days", "0")
    assert "not the folder of a run" in refused(capsys, tmp_path, CLOSED)

    nobody = tmp_path / "nobody"
    shutil.copytree(tower_run, nobody, ignore=shutil.ignore_patterns("whatif"))
    config = Config.from_yaml((nobody / "config.yaml").read_text(), "")
    (nobody / "config.yaml").write_text(replace(config, demonstrations="").to_yaml())
    assert "nobody to imitate" in refused(capsys, nobody, SLIPPING)
    apart = cloned(tmp_path, "apart", "--preset", "berlin", "--demonstrations", day, "--parameter-sharing", "agent")
    assert "each agent has parameters of its own" in refused(capsys, apart, f"{BERLIN}&demand=1.2")


def test_the_recipe_for_changed_worlds() -> None:
    berlin = changed_world(replace(load_preset("berlin"), algorithm="bc"), CLOSED, seed=3, steps=7)
    assert (berlin.algorithm, berlin.mode, berlin.seed, berlin.steps) == ("bm3il", "serial", 3, 7)
    assert (berlin.learner.start, berlin.learner.policy, berlin.actor.babbling) == ("cloned", "clipped", 3)
    assert (berlin.reward.sees, berlin.reward.memory) == (("purpose",), "run")
    assert berlin.actor.steps_per_iteration == 1_000
    tower = replace(load_preset("rover_tower_8"), algorithm="ma-gail", nodes=2, actors=4)
    tower = changed_world(tower, "rover_tower?pairs=4&slip=0.1", seed=1, steps=7)
    assert (tower.algorithm, tower.nodes, tower.actors, tower.evaluation.starts) == ("ma-gail", 1, 1, "fresh")
    assert (tower.actor.steps_per_iteration, tower.actor.agent_identity) == (800, True)
    assert tower.learner.clipped == berlin.learner.clipped
    assert changed_world(replace(tower, algorithm="ma-gail"), TOWER, 1, 7).reward == tower.reward


def test_particles_are_as_many_as_the_run_had_or_as_by_default() -> None:
    def particles(algorithm: str) -> int:
        config = replace(load_preset("berlin"), algorithm=algorithm)
        run = replace(config, reward=replace(config.reward, particles=7)).checked()
        return changed_world(run, CLOSED, 1, 7).checked().reward.particles

    assert [particles(algorithm) for algorithm in ("bm3il", "ma-gail", "bc", "maac")] == [7, 1, 4, 4]


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (BERLIN, CLOSED, "closed-22-23"),
        (BERLIN, f"{BERLIN}&capacity=22:0.5,23:2&demand=1.2&slip=0.05", "capacity-22-0.5-23-2_demand-1.2_slip-0.05"),
        (BERLIN, BERLIN.replace("46", "46-tight"), "scenario-berlin46-tight"),
        (f"{BERLIN}&flow_scale=0.1", BERLIN, "without-flow_scale-0.1"),
        ("pettingzoo:mpe2.simple_spread_v3", "pettingzoo:mpe2.simple_spread_v3?slip=0.1", "slip-0.1"),
        ("town", "town?file=../../etc/x", "file-..-..-etc-x"),
    ],
)
def test_a_change_names_its_folder(before: str, after: str, name: str) -> None:
    assert slug(changes(before, after)) == name


def test_the_name_of_many_changes_is_short_and_its_own() -> None:
    names = {slug([f"closed={','.join(map(str, range(last)))}"]) for last in range(60, 70)}
    assert len(names) == 10
    assert max(map(len, names)) < 100


def test_intervals_are_student_s() -> None:
    mean, half = student_t(np.array([[1.0, 2], [2, 2], [3, 2], [4, 2], [5, 2]]), 0.95)
    np.testing.assert_allclose(mean, [3, 2])
    np.testing.assert_allclose(half, [2.776445 * np.sqrt(2.5 / 5), 0], rtol=1e-6)  # t of 4 degrees of freedom
    np.testing.assert_allclose(student_t(np.array([1.0, 3]), 0.9)[1], 6.313752, rtol=1e-6)  # and of 1
    assert np.isnan(student_t(np.array([[1.0, 2]]), 0.95)[1]).all()


def test_a_seed_s_imitator_is_compared_with_its_own_clone() -> None:
    spec = make_environment(TOWER, 1).spec
    clone = Sample("seeds", np.array([[10.0, 9, 11], [20, 18, 22], [60, 50, 70]]), None)
    imitator = Sample("seeds", clone.returns + np.array([[4.0], [5], [6]]), None)
    random, expert = (Sample("episodes", np.full((2, 3), value), None) for value in (-10.0, 90.0))
    after = {"random": random, "run": random, "clone": clone, "imitator": imitator}
    report = figures_of(spec, spec, {"clone": clone}, after | {"expert": expert})
    gain = report["imitator_minus_clone"]
    np.testing.assert_allclose([gain["mean"], *gain["interval"]], [5, 5 - 2.484138, 5 + 2.484138], rtol=1e-6)
    np.testing.assert_allclose(gain["types"]["tower"]["interval"], gain["interval"])
    assert (gain["normalized"], report["returns"]["imitator"]["normalized"]) == (0.05, 0.45)
    assert report["returns"]["imitator"]["of_seeds"] == [14, 25, 66]
    assert report["returns"]["imitator"]["types"]["rover"]["mean"] == pytest.approx(92 / 3)
    assert figures_of(spec, spec, {}, after)["imitator_minus_clone"]["normalized"] is None  # nobody knows the expert


def test_a_type_in_brackets_keeps_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_environment(TOWER, 1).spec
    spec = replace(spec, types=(replace(spec.types[0], name="[bus]"), *spec.types[1:]))
    plays = dict.fromkeys(("random", "run", "clone", "imitator"), Sample("seeds", np.ones((2, 3)), None))
    print_tables(figures_of(spec, spec, {}, plays) | {"unit": "return", "level": 0.9, "seeds": [1, 2]}, screen())
    assert "[bus]" in capsys.readouterr().out


def test_plays_are_those_of_evaluate_and_watch_the_roads() -> None:
    policy = FreeFlow(make_environment(CLOSED, 1))
    sample = play(CLOSED, policy, 3)
    returns = evaluate(CLOSED, policy, 3, FRESH_SEED)
    np.testing.assert_allclose(sample.returns[:, 0], returns.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(sample.returns[:, 1], returns[:, :8].mean(axis=1), rtol=1e-6)
    assert sample.loads is not None
    assert sample.loads.shape == (3, 17, 46)
    assert not sample.loads[:, :, [22, 23]].any()
    assert 0 < sample.loads[:, 3].sum(axis=1).mean() < 50  # some are on the road after 8, in a world of 50
    assert not sample.loads[:, 0].any()  # at 5 nobody is


def test_loads_are_means_over_an_hour_s_steps() -> None:
    counts = np.arange(10.0).reshape(1, 5, 2)
    hours = np.array([5, 5, 6, 6, 6])
    np.testing.assert_array_equal(hourly(counts, hours), [[[1, 2], [6, 7]]])


def test_an_interval_of_the_rush_is_of_its_mean() -> None:
    """Not the mean of the hours' intervals: what one hour has too much another may lack."""
    berlin = Berlin(1, closed="22")
    hours = np.unique(hours_of(berlin))
    loads = np.zeros((2, len(hours), 46))
    loads[0, hours == 8], loads[1, hours == 9] = 8, 8
    found = loads_of(berlin, {}, {"imitator": Sample("seeds", loads[:, :1, 0], loads)})["after"]["imitator"]
    assert (found["rush"]["mean"][0], found["rush"]["low"][0], found["rush"]["high"][0]) == (1, 1, 1)
    at_8 = hours.tolist().index(8)
    assert found["hours"]["mean"][at_8][0] == 4
    assert found["hours"]["high"][at_8][0] == pytest.approx(4 + 6.313752 * 4, rel=1e-5)


def test_everybody_is_played_where_and_as_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(folder: Path) -> Any:
        return SimpleNamespace(
            checkpoint=SimpleNamespace(learner={f"{who}/w": f"{who} of {folder}" for who in ("clone", "policy")})
        )

    monkeypatch.setattr(whatif, "load_trained", trained)
    monkeypatch.setattr(whatif, "_expert", lambda spec: f"expert of {spec}")
    monkeypatch.setattr(whatif, "UniformPolicy", lambda spec: f"random of {spec}")
    question: Any = SimpleNamespace(
        before="old",
        after="new",
        before_spec="OLD",
        after_spec="NEW",
        arrays={"w": "run"},
        policy=lambda arrays, world: f"{arrays['w']} in {world}",
    )
    assert list(whatif._everybody(question, [Path("s1"), Path("s2")])) == [
        ("new", "random", "random of NEW"),
        ("new", "run", "run in new"),
        *(
            entry
            for s in ("s1", "s2")
            for entry in (
                ("old", "clone", f"clone of {s} in old"),
                ("new", "clone", f"clone of {s} in new"),
                ("new", "imitator", f"policy of {s} in new"),
            )
        ),
        ("old", "expert", "expert of OLD"),
        ("new", "expert", "expert of NEW"),
    ]


def test_a_change_of_load_is_after_less_before_and_the_imitator_was_the_clone() -> None:
    loads = {
        "after": {name: {"rush": {"mean": [mean, 0.0]}} for name, mean in (("imitator", 5.0), ("expert", 1.0))},
        "before": {"clone": {"rush": [2.0, 1.0]}, "expert": {"rush": [4.0, 0.0]}},
    }
    assert _load_change(loads, "imitator").tolist() == [3.0, -1.0]
    assert _load_change(loads, "expert").tolist() == [-3.0, 0.0]


def test_an_undecided_discriminator_rewards_nothing_in_a_changed_world() -> None:
    config = changed_world(load_preset("berlin"), CLOSED, seed=3, steps=7)
    assert config.learner.reward_offset == math.log(2)
    clipped = config.learner.clipped
    assert (config.reward.imagined, clipped.clone_weight, clipped.critic_first) == (0.5, 0, 3)
