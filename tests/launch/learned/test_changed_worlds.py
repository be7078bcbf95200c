"""From one world to a changed one, through the commands: training on old demonstrations, evaluating an old policy."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.actors.experts import commuters
from bm3il.actors.experts.recording import record
from bm3il.actors.policy import UniformPolicy
from bm3il.launch.cli import main
from bm3il.launch.config import parse_config
from bm3il.launch.learned import evaluate, pictures
from bm3il.launch.learned.trained import load_trained
from bm3il.launch.run import check
from bm3il.protocol import registry
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

BERLIN = "berlin?scenario=berlin46&types=10&agents=50&sight=near"
CROWD = f"{BERLIN}&demand=1.2"


def train(folder: Path, *args: str) -> dict[str, Any]:
    """The result of a tiny run with the name `run`."""
    tiny = ["--cloning.iterations", "1", "--evaluation.episodes", "1", "--evaluation.final-episodes", "2"]
    where = ["--mode", "serial", "--runs-folder", str(folder), "--run", "run"]
    assert main(["train", *tiny, *where, *args]) == 0
    return json.loads((folder / "run" / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with one of the demonstrated days."""
    path = tmp_path_factory.mktemp("day") / "day.safetensors"
    Demonstrations.load(resolve("berlin46")).select(1, seed=0).save(path)
    return str(path)


def berlin(day: str, *args: str) -> list[str]:
    return ["--preset", "berlin", "--demonstrations", day, *args]


@pytest.mark.parametrize("apart", [["--parameter-sharing", "agent"], ["--actor.agent-identity"]])
def test_agents_with_parameters_of_their_own_are_as_many_as_recorded(day: str, apart: list[str]) -> None:
    config = parse_config(berlin(day, "--environment", CROWD, "--learner.clipped.clone-weight", "0"))
    assert check(config)[0] == config.checked()
    with pytest.raises(InputError, match="expected count 10, found 8; take --parameter-sharing type") as raised:
        check(parse_config(berlin(day, "--environment", CROWD, *apart)))
    assert BERLIN in str(raised.value)
    check(parse_config(berlin(day, "--environment", f"{BERLIN}&closed=22&slip=0.1", *apart)))


def test_demonstrations_of_a_smaller_crowd_train_a_larger_one(day: str, tmp_path: Path) -> None:
    result = train(tmp_path, *berlin(day, "--algorithm", "bc", "--environment", CROWD))
    assert (result["status"], result["environment"]) == ("finished", CROWD)


def test_a_reward_learned_from_a_smaller_crowd_judges_a_larger_one(day: str, tmp_path: Path) -> None:
    few = ["--steps", "100", "--learner.updates", "1", "--learner.batch-size", "8", "--reward.batch-size", "8"]
    result = train(tmp_path, *berlin(day, "--environment", CROWD, *few))
    assert (result["status"], result["env_steps"]) == ("finished", 200)


@pytest.fixture(scope="module")
def run(day: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a clone of one day, with parameters per type."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, *berlin(day, "--algorithm", "bc"))
    return folder / "run"


def evaluated(run: Path, *args: str) -> list[dict[str, Any]]:
    assert main(["evaluate", str(run), "--episodes", "2", *args]) == 0
    return json.loads((run / "evaluation.json").read_text())["rows"]  # type: ignore[no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that must exit with 2."""
    capsys.readouterr()
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def test_a_policy_plays_in_a_changed_world_beside_the_expert_of_that(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commuters, "EQUILIBRIUM_ROUNDS", 3)
    world = f"{BERLIN}&closed=22,23&demand=1.2&slip=0.02"
    rows = evaluated(run, "--environment", world)
    assert [(row["environment"], row["starts"], row["actions"]) for row in rows] == [
        (world, "fresh", "drawn"),
        (world, "fresh", "greedy"),
    ]
    for row in rows:
        assert row["random_return"] == pytest.approx(-404, abs=3)
        assert 250 < row["expert_return"] < 400
        range_ = row["expert_return"] - row["random_return"]
        assert row["normalized_return"] == pytest.approx((row["return_mean"] - row["random_return"]) / range_)


def test_the_parameters_are_the_same_in_every_world(run: Path) -> None:
    trained = load_trained(run)
    moved = trained.policy_in(make_environment(CROWD, 1).spec)
    assert moved.sha256() == trained.policy.sha256()
    assert [t.count for t in moved.layout.spec.types][:2] == [10, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rover_tower", "does not fit this run"),
        ("berlin?types=9&sight=near", f"expected 10 agent types, found 9; its world is '{BERLIN}'"),
        ("berlin?closed=22", "that mean 'berlin46, near loads seen', found 'berlin46, all loads seen'"),
        (f"{BERLIN}&closed=46", "there is no road 46"),
        ("berlyn", "did you mean berlin"),
    ],
)
def test_other_worlds_are_refused(run: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "evaluate", str(run), "--environment", name)


def test_pictures_are_of_the_changed_world(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DAYS", "ATTENTION_EPISODES", "FRAMES_PER_SECOND"):
        monkeypatch.setattr(pictures, name, 1)
    agents: list[int] = []
    monkeypatch.setattr(
        pictures, "_animate", lambda berlin, days, path: agents.extend(d.locations.shape[2] for d in days)
    )
    monkeypatch.setattr(evaluate, "expert_for", lambda spec: UniformPolicy(spec))
    evaluated(run, "--environment", f"{BERLIN}&closed=22,23&demand=1.2&slip=0.05", "--pictures")
    assert {path.name for path in (run / "pictures").iterdir()} >= {"map.png", "loads.png", "places.png"}
    assert agents == [61, 61], "of the demonstrations, too"


@pytest.fixture(scope="module")
def rover_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a clone of Rover Tower, with parameters per agent."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--algorithm", "bc", "--parameter-sharing", "agent", "--demonstration-episodes", "2"]
    train(folder, "--preset", "rover_tower_4", *few)
    return folder / "run"


def test_paired_starts_are_tried_in_a_changed_world(rover_run: Path) -> None:
    rows = evaluated(rover_run, "--environment", "rover_tower?pairs=2&slip=0.3", "--paired")
    assert [row["starts"] for row in rows] == ["fresh", "fresh", "paired", "paired"]
    known = evaluated(rover_run, "--paired")[2]["expert_return"]
    assert rows[2]["expert_return"] < known - 20, "the scripted expert slips, too"
    for row in rows:  # two rovers and two towers
        for figure in ("return_mean", "random_return", "expert_return"):
            of_types = [row["types"][name][figure] for name in ("rover", "tower")]
            assert row[figure] == pytest.approx(sum(of_types) / 2, rel=1e-4)


def test_the_expert_is_the_demonstrated_one_only_where_he_was(
    rover_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, and from fresh starts, the scripted one plays."""
    monkeypatch.setattr(evaluate, "expert_for", lambda spec: UniformPolicy(spec))
    few = ["--preset", "rover_tower_4", "--algorithm", "bc", "--demonstration-episodes", "2"]
    train(tmp_path, *few, "--environment", "rover_tower?pairs=2&slip=0.3")
    demonstrated = Demonstrations.load(resolve("rover_tower_4")).returns.mean()
    for run, paired in ((rover_run, demonstrated), (tmp_path / "run", None)):
        for args in ([], ["--environment", load_trained(run).config.environment]):
            rows = evaluated(run, "--paired", *args)
            assert rows[0]["expert_return"] == rows[0]["random_return"]
            assert rows[2]["expert_return"] == pytest.approx(paired or rows[2]["random_return"], rel=1e-5)


def test_where_all_slip_nobody_is_better_than_random(rover_run: Path) -> None:
    rows = evaluated(rover_run, "--environment", "rover_tower?pairs=2&slip=1")
    assert rows[0]["expert_return"] == pytest.approx(rows[0]["random_return"])
    assert rows[0]["normalized_return"] is None


def test_parameters_per_agent_fit_as_many_agents_only(rover_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "evaluate", str(rover_run), "--environment", "rover_tower?pairs=4")
    assert "expected count 2, found 4" in error


def test_starts_that_do_not_fit_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = f"{BERLIN}&slip=0.1"
    assert "no start states" in refused(capsys, "evaluate", str(run), "--environment", world, "--paired")


def test_starts_of_another_world_are_refused_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shifts = make_environment(BERLIN.replace("berlin46", "berlin46-shifts"), 1)
    file = str(tmp_path / "shifts.safetensors")
    record(shifts, UniformPolicy(shifts.spec), 1, 0, "a day of working hours that differ").save(file)
    train(tmp_path, *berlin(file, "--algorithm", "bc", "--environment", shifts.spec.name))
    monkeypatch.delattr(evaluate, "evaluate")
    run = str(tmp_path / "run")
    for world in (BERLIN, f"{shifts.spec.name}&demand=2"):
        assert "expected start states" in refused(capsys, "evaluate", run, "--environment", world, "--paired")


class Liar(RoverTower):
    """Says that it changes `base`."""

    def __init__(self, num_envs: int, base: str) -> None:
        super().__init__(num_envs, 2)
        self.spec = replace(self.spec, name=f"liar?base={base}", changes=base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("rover_towr", "can be made; found: unknown environment 'rover_towr'"),
        (
            "berlin",
            "found: expected observations that mean 'berlin46, all loads seen', found nothing in",
        ),
        ("rover_tower", "found: type 'rover': expected observation_dim 13, found 11"),
    ],
)
def test_what_is_changed_must_be_there_and_fit(
    base: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = EntryPoint("liar", f"{__name__}:Liar", registry.GROUP)
    real = registry.entry_points
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), point])
    assert message in refused(capsys, "check-environment", f"liar?base={base}")
    assert main(["check-environment", "liar?base=rover_tower?pairs=2"]) == 0
    assert "a change of rover_tower?pairs=2, 25 steps played" in capsys.readouterr().out
