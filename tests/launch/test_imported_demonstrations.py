"""`bm3il demonstrations`: what others recorded comes in, and can be looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("polars")

from bm3il.actors.experts.recording import record
from bm3il.actors.experts.scripted import RoverTowerExpert
from bm3il.launch.cli import main
from bm3il.launch.inspection import print_types
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.recordings.columns import part_columns
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.launch.test_cli import fails
from tests.protocol.recordings.written import assert_same, rows_of, write

ROVERS = "rover_tower?pairs=2"


@pytest.fixture
def recorded() -> Demonstrations:
    return record(make_environment(ROVERS, 3), RoverTowerExpert(), 3, seed=1, origin="")


def imported(file: str | Path, output: Path, *options: str) -> Demonstrations:
    where = () if "--environment" in options else ("--environment", ROVERS)
    assert main(["demonstrations", "import", str(file), "--output", str(output), *where, *options]) == 0
    return Demonstrations.load(output)


def test_recordings_in_another_unit_are_told_on_import_at_the_check_and_at_the_start_of_a_run(
    tmp_path: Path, recorded: Demonstrations, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "hint: for 'rover' the recordings begin with other numbers than the environment: "
    parts = [part for t in recorded.spec.types for part in t.parts if part.kind == "own"]
    own = {column for part in parts for column in part_columns(part)}

    def hints() -> list[bool]:
        return [line.startswith(hint) for line in capsys.readouterr().out.splitlines() if line.startswith("hint")]

    for name, far in (("alike", 0), ("apart", 100)):
        seen = [{k: v + far if k in own and v is not None else v for k, v in row.items()} for row in rows_of(recorded)]
        imported(write(tmp_path / f"{name}.csv", seen), tmp_path / f"{name}.safetensors")
        assert hints()[:1] == [True] * bool(far)
        assert main(["check-environment", ROVERS, "--demonstrations", f"{name}.safetensors"]) == 0
        assert hints()[:1] == [True] * bool(far)
        train = ["train", "--preset", "own", "--environment", ROVERS, "--demonstrations", f"{name}.safetensors"]
        brief = ["--mode", "serial", "--algorithm", "bc", "--cloning.iterations", "1", "--cloning.updates", "1"]
        few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
        assert main([*train, *brief, *few, "--run", name]) == 0
        assert hints()[:1] == [True] * bool(far)


def test_a_table_is_imported_and_trains(
    tmp_path: Path, recorded: Demonstrations, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"vehicle" if name == "agent" else name: value for name, value in row.items()} for row in rows_of(recorded)]
    table = write(tmp_path / "mine.csv", [row | {"note": "x"} for row in rows])
    (tmp_path / "names.yaml").write_text("columns: {agent: vehicle}")
    output = tmp_path / "mine.safetensors"
    assert_same(imported(table, output, "--mapping", str(tmp_path / "names.yaml")), recorded)
    assert "columns that were not read: note" in capsys.readouterr().out
    tiny = [
        "--steps",
        "100",
        "--actor.steps-per-iteration",
        "50",
        "--learner.updates",
        "1",
        "--learner.batch-size",
        "8",
    ]
    few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
    some = [
        "--reward.updates",
        "1",
        "--reward.batch-size",
        "8",
        "--learner.start",
        "random",
        "--learner.policy",
        "actor",
    ]
    place = ["--runs-folder", str(tmp_path), "--run", "mine", "--mode", "serial"]
    assert main(["train", "--environment", ROVERS, "--demonstrations", str(output), *tiny, *few, *some, *place]) == 0
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert (result["status"], result["iterations"]) == ("finished", 2)


def test_an_npz_is_what_its_arrays_are_called(tmp_path: Path, recorded: Demonstrations) -> None:
    arrays = {"episode_lengths": recorded.episode_lengths, "returns": recorded.returns}
    for m, t in enumerate(recorded.spec.types):
        arrays |= {f"{t.name}.observations": recorded.observations[m], f"{t.name}.actions": recorded.actions[m]}
    np.savez(tmp_path / "mine.npz", **arrays)
    assert_same(imported(tmp_path / "mine.npz", tmp_path / "a.safetensors"), recorded)


def test_what_cannot_be_imported_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(file: str, *options: str) -> str:
        return fails(capsys, "demonstrations", "import", file, "--output", str(tmp_path / "x"), *options)

    assert "name the environment it was recorded in with --environment" in error("mine.csv")
    assert "expected a file that ends with .csv" in error("mine.xls", "--environment", ROVERS)
    assert "--mapping names the columns of a table" in error("a.npz", "--mapping", "b", "--environment", ROVERS)
    two = fails(capsys, "demonstrations", "import", "a.npz", "not_there.npz", "--output", str(tmp_path / "x"))
    assert "expected one file, or routes of SUMO" in two
    assert "cannot be read as a table" in error(str(tmp_path / "absent.csv"), "--environment", ROVERS)
    assert "expected an npz" in error(str(tmp_path / "absent.npz"), "--environment", ROVERS)
    assert "are of one agent" in error("minari:corridor/test-v0", "--environment", ROVERS)


def test_inspect_tells_of_each_type_when_it_takes_part_and_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = EnvironmentSpec("town", (TypeSpec("bus", 2, 1, 3), TypeSpec("tram", 1, 1, 2, discrete=False)), 9)
    active = np.ones((9, 2), bool)
    active[[0, 1, 3, 4, 6, 7], 1] = False  # the second bus comes in the third step
    demonstrations = Demonstrations.of_types(
        spec=spec,
        origin="",
        observations=[
            np.tile(np.arange(9.0)[:, None, None] % 3, (1, 2, 1)).astype(np.float32),
            np.zeros((9, 1, 1), np.float32),
        ],
        actions=[np.array([[2, 0]] * 6 + [[1, 0]] * 3), np.full((9, 1, 2), [0.5, -1], np.float32)],
        action_masks=[np.ones((9, 2, 3), bool), np.ones((9, 1, 2), bool)],
        active=[active, np.ones((9, 1), bool)],
        episode_lengths=np.array([3, 3, 3]),
        returns=np.zeros((3, 3), np.float32),
        groups=np.arange(3),
    )
    print_types(demonstrations)
    told = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert told["bus"] == ["6 of 6", "1–2–3", "0–1–2", "2", "2: 50%, 0: 25%, 1: 25%", "1 of 3 episodes"]
    assert told["tram"] == ["3 of 3", "3", "0", "2", "0.50 ± 0.00, -1.00 ± 0.00", "2 of 3 episodes"]
    bracketed = replace(spec, types=(replace(spec.types[0], name="[bus]"), spec.types[1]))
    replace(demonstrations, spec=bracketed).save(tmp_path / "bracketed.safetensors")
    assert main(["demonstrations", "inspect", str(tmp_path / "bracketed.safetensors")]) == 0
    assert capsys.readouterr().out.count("[bus]") == 2
    print_types(replace(demonstrations, arrays={**demonstrations.arrays, "0.active": np.zeros_like(active)}))
    assert "0 of 6" in capsys.readouterr().out


def test_returns_are_told_of_each_type_and_only_where_they_are_known(
    tmp_path: Path, recorded: Demonstrations, capsys: pytest.CaptureFixture[str]
) -> None:
    returns = np.tile(np.float32([2, 4, -7, -8]), (3, 1))
    returns[0] += 99
    returns[0, 3] = np.nan  # so the first episode of towers is not known
    replace(recorded, returns=returns).save(tmp_path / "a.safetensors")
    assert main(["demonstrations", "inspect", str(tmp_path / "a.safetensors")]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if "discrete" in line]
    assert [(words[1], words[-2]) for words in shown] == [("rover", "36.0"), ("tower", "-7.5")]


def test_inspect_tells_of_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demonstrations", "inspect", "berlin46"]) == 0
    assert "500 of 500" in capsys.readouterr().out


@pytest.mark.parametrize(("masked", "told"), [("", False), ("some", True)])
def test_masks_that_nobody_wrote_down_are_told_where_the_environment_has_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, masked: str, told: bool
) -> None:
    pytest.importorskip("gymnasium")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "protocol")
    name = "gymnasium:small_worlds:Small-v0" + f"?arguments=masked:{masked}" * bool(masked)
    row = {"episode": 0, "observation.0": 0.5, "observation.1": 0, "action": 2}
    masks = {"mask.0": 1, "mask.1": 0, "mask.2": 1}
    without = write(tmp_path / "without.csv", [row | {"step": step} for step in range(3)])
    having = write(tmp_path / "having.csv", [row | {"step": step} | masks for step in range(3)])
    for table, expected in ((without, told), (having, False)):
        imported(table, table.with_suffix(".safetensors"), "--environment", name)
        assert ("masks of 'agent' were not written down" in capsys.readouterr().out) == expected
