"""What a run begins with is known again from any working folder, and refused when it is another."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bm3il.actors.environments.berlin import scenario_file
from bm3il.launch.cli import main
from bm3il.launch.config import Config, load_preset, parse_config
from bm3il.launch.files import remembered
from bm3il.launch.processes.worker import run_role
from bm3il.launch.run import check
from bm3il.launch.run_folder import open_existing
from bm3il.launch.topology import Node, Plan
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import with_absolute_files

TINY = [
    *("--preset", "rover_tower_4", "--algorithm", "bc", "--mode", "serial", "--cloning.iterations", "1"),
    *("--cloning.updates", "2", "--evaluation.episodes", "1", "--evaluation.final-episodes", "2"),
    *("--actor.hidden", "16"),
]
MINE = "my.safetensors"


def demonstrate(path: Path, seed: int) -> None:
    """A file of a few demonstrated episodes."""
    path.unlink(missing_ok=True)
    Demonstrations.load(resolve("rover_tower_4")).select(5, seed).save(path)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that must exit with 2."""
    capsys.readouterr()
    assert main(list(args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of demonstrations that were named by a relative path; we stand elsewhere by now, beside a file of that name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    demonstrate(Path(MINE), seed=0)
    assert main(["train", *TINY, "--demonstrations", MINE, "--run", "mine"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    demonstrate(Path(MINE), seed=1)
    return tmp_path / "here" / "runs" / "mine"


def test_a_run_knows_its_demonstrations_from_anywhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, file = open_existing(run), run.parents[1] / MINE
    assert (config.demonstrations, set(config.files)) == (str(file), {str(file)})
    assert main(["resume", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--demonstrations", str(file)]) == 0
    evaluate = ["evaluate", str(run), "--episodes", "2"]
    assert main([*evaluate, "--paired"]) == 0
    asked = ["whatif", str(run), "--environment", "rover_tower?pairs=2&slip=0.1", "--seeds", "1", "--steps", "50"]
    before = (run / "result.json").read_text()
    demonstrate(file, seed=1)
    for command in (["resume", str(run)], [*evaluate, "--paired"], asked):
        line = refused(capsys, *command)
        assert line.startswith(
            f"bm3il: {file} has changed since the run began: its SHA-256 was {config.files[str(file)][:12]}"
        )
        assert line.endswith("put the file back as it was, or start a new run with what it is now")
    assert (run / "result.json").read_text() == before
    assert not (run / "whatif").exists()
    file.unlink()
    assert "which the run began with: No such file" in refused(capsys, "resume", str(run))
    assert main(evaluate) == 0  # the policy alone needs no demonstrations


def test_a_run_of_an_older_release_takes_what_lies_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote down neither hashes nor where it stood, in its checkpoints, too."""
    file = str(run.parents[1] / MINE)
    for path in (run / "config.yaml", *run.glob("checkpoints/*/checkpoint.json")):
        text = path.read_text(encoding="utf-8")
        lines = text if path.suffix == ".yaml" else json.loads(text)["config"]
        kept = [line for line in lines.splitlines() if not line.startswith(("files:", f"  {file}"))]
        old = "\n".join(kept).replace(file, MINE) + "\n"
        assert "files" not in old
        path.write_text(old if path.suffix == ".yaml" else json.dumps(json.loads(text) | {"config": old}))
    monkeypatch.chdir(run.parents[1])
    assert main(["resume", str(run)]) == 0


def test_a_process_that_starts_later_looks_again(tmp_path: Path) -> None:
    demonstrate(tmp_path / MINE, seed=0)
    config, spec = check(remembered(replace(load_preset("rover_tower_4"), demonstrations=str(tmp_path / MINE))))
    demonstrate(tmp_path / MINE, seed=1)
    plan = Plan("run", str(tmp_path), config.to_yaml(), json.dumps(spec.to_json()), (Node("here"),), (), {})
    plan.addresses["supervisor-0"] = {"control": ""}
    for role in ("learner", "reward-server", "evaluator"):
        with pytest.raises(InputError, match="has changed since the run began"):
            run_role(role, 0, plan, None)  # type: ignore[arg-type]


def test_scenarios_are_known_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Path(scenario_file.__file__).parent / "scenarios" / "berlin46.json"
    monkeypatch.chdir(tmp_path)
    shutil.copy(shipped, "town.json")
    name = "berlin?scenario=town.json-tight&types=2&agents=4"
    whole = f"berlin?scenario={tmp_path}/town.json-tight&types=2&agents=4"
    assert with_absolute_files(name) == (whole, [f"{tmp_path}/town.json"])
    unchanged = "berlin?scenario=berlin46-tight&types=2"
    (tmp_path / "berlin46").touch()
    assert with_absolute_files(unchanged) == (unchanged, [])
    assert with_absolute_files("rover_tower") == ("rover_tower", [])

    assert main(["demonstrations", "record", name, "--episodes", "3", "--output", MINE]) == 0
    world = ["--preset", "berlin", *TINY[2:], "--environment", name, "--demonstrations", MINE]
    assert main(["train", *world, "--run", "mine", "--evaluation.starts", "fresh"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate = ["evaluate", str(tmp_path / "runs" / "mine"), "--episodes", "1"]
    assert main(evaluate) == 0
    text = (tmp_path / "town.json").read_text(encoding="utf-8")
    (tmp_path / "town.json").write_text(text + "\n", encoding="utf-8")
    assert f"bm3il: {tmp_path}/town.json has changed since the run began" in refused(capsys, *evaluate)


def test_a_path_that_a_name_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a&b").mkdir()
    monkeypatch.chdir(tmp_path / "a&b")
    Path("town.json").touch()
    with pytest.raises(InputError, match=r"move .*a&b/town.json to a path without it"):
        with_absolute_files("berlin?scenario=town.json")


def test_what_comes_with_the_package_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rover_tower_4").touch()
    config = replace(load_preset("rover_tower_4"), demonstrations="rover_tower_4.safetensors")
    assert (remembered(config).demonstrations, remembered(config).files) == ("rover_tower_4", {})
    assert resolve("rover_tower_4").parent != Path()
    demonstrate(Path("rover_tower_4.safetensors"), seed=0)
    assert remembered(config).demonstrations == f"{tmp_path}/rover_tower_4.safetensors"


def test_other_files_are_known_by_their_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = remembered(replace(load_preset("rover_tower_4"), hostfile="hosts", metrics_token_file="token"))
    assert (found.hostfile, found.metrics_token_file) == (f"{tmp_path}/hosts", f"{tmp_path}/token")


def test_hashes_are_written_down_and_not_asked_for() -> None:
    config = replace(Config(), files={"/a/b.json": "0" * 64})
    assert Config.from_yaml(config.to_yaml(), "test") == config
    assert parse_config(["--seed", "3"], config).files == config.files
    with pytest.raises(InputError, match="unknown option '--files'"):
        parse_config(["--files", "a", "b"])
