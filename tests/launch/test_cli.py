from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bm3il.launch import cli, config, run
from bm3il.launch.cli import main
from bm3il.learner.algorithms import ALGORITHMS
from bm3il.protocol.errors import InputError
from bm3il.protocol.version import version


def fails(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """The one line of a command that must exit with this code."""
    assert main(list(args)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_unknown_names_are_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train" in fails(capsys, "trian")
    assert "did you mean --seed" in fails(capsys, "train", "--sed", "1")
    assert "did you mean bm3il" in fails(capsys, "train", "--algorithm", "bm3li")
    assert "did you mean rover_tower" in fails(capsys, "check-environment", "rover_towr")
    assert "neither a file nor" in fails(capsys, "demonstrations", "inspect", "nothing")
    assert "required: run" in fails(capsys, "resume")
    assert "unknown option '--enviroment'; did you mean --environment" in fails(
        capsys, "evaluate", "runs/a", "--enviroment", "x"
    )
    assert "did you mean --steps" in fails(capsys, "resume", "runs/a", "--step", "3")
    assert "did you mean --episodes" in fails(capsys, "demonstrations", "record", "rover_tower", "--episode=3")


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("train", "submit")])
def test_every_option_says_what_it_is(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those two have the settings' docstrings, and a test of their own."""
    seen: list[argparse.ArgumentParser] = []

    def kept(parser: argparse.ArgumentParser, args: object) -> None:
        seen.append(parser)
        raise InputError("seen")

    monkeypatch.setattr(cli._Parser, "parse_args", kept)
    with pytest.raises(InputError, match="seen"):
        cli.COMMANDS[command]([])
    for parser in seen:
        for action in parser._actions:
            seen.extend(action.choices.values() if isinstance(action, argparse._SubParsersAction) else [])
            name = action.option_strings or action.dest
            assert action.help or isinstance(action, argparse._SubParsersAction), f"{parser.prog}: {name}"


def test_numbers_are_asked_for_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps: expected a whole number, got '8e3'" in fails(capsys, "resume", "runs/a", "--steps", "8e3")
    assert "--hour: expected a number, got 'late'" in fails(capsys, "evaluate", "runs/a", "--hour", "late")
    assert "--episodes: expected a whole" in fails(capsys, "demonstrations", "record", "--episodes=x", "--output", "a")


def test_the_command_line_tells_its_release(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bm3il {version()}\n"


def test_the_help_names_every_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = "".join(capsys.readouterr().out.replace("│", "").split())  # a narrow box breaks lines at hyphens
    assert [name for name in ALGORITHMS if name not in words] == []


def test_demonstrations_that_do_not_fit_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = fails(capsys, "train", "--demonstrations", "rover_tower_4", "--runs-folder", str(tmp_path / "runs"))
    assert "do not fit" in error
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in fails(capsys, "train", "--device", "cuda", "--runs-folder", str(tmp_path / "runs"))


def test_help_may_be_cut_short() -> None:
    command = f"set -o pipefail; {sys.executable} -m bm3il.launch.cli train --help | head -n 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_run_folder_that_exists_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert "exists" in fails(capsys, "train", "--run", "a", "--runs-folder", str(tmp_path))
    assert list((tmp_path / "a").iterdir()) == []
    assert "plain folder name" in fails(capsys, "train", "--run", "../a", "--runs-folder", str(tmp_path))


def interrupt(*_: object) -> int:
    raise KeyboardInterrupt


def test_ctrl_c_before_a_run_begins_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "train", "--preset", "rover_tower_4", "--runs-folder", str(tmp_path / "runs"), "--run", "a"
    monkeypatch.setattr(run, "_run", interrupt)
    assert fails(capsys, *train, code=130) == "bm3il: interrupted\n"
    assert not (tmp_path / "runs" / "a").exists()
    monkeypatch.setattr(config, "parse_config", interrupt)  # as if modules were still being imported
    assert fails(capsys, *train, code=130) == "bm3il: interrupted\n"


def test_a_folder_that_cannot_be_made_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot create" in fails(capsys, "train", "--runs-folder", str(tmp_path / "file"))


def test_what_is_no_run_cannot_be_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in OF_A_RUN:
        assert "is not the folder of a run: it has no config.yaml\n" in fails(capsys, *command, str(tmp_path))
    assert "--episodes must be at least 1" in fails(capsys, "evaluate", str(tmp_path), "--episodes", "0")


OF_A_RUN = (
    *(["status"], ["resume"], ["train", "--resume"], ["evaluate"], ["play"], ["export", "--output", "o"]),
    ["whatif", "--environment", "rover_tower?slip=0.1"],
)


@pytest.mark.parametrize("command", [*OF_A_RUN, ["report"], ["compare"]], ids=" ".join)
def test_a_folder_that_is_not_there_is_told_with_what_was_meant(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tower-seed1", "tower-seed2"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").touch()
    Path("runs", "no-run").mkdir()
    begin = "bm3il: there is no folder"
    assert fails(capsys, *command, "tower-seed2") == f"{begin} tower-seed2; did you mean runs/tower-seed2?\n"
    assert fails(capsys, *command, "runs/towr-seed1") == f"{begin} runs/towr-seed1; did you mean runs/tower-seed1?\n"
    assert fails(capsys, *command, "runs/no_run") == f"{begin} runs/no_run\n"
    if command[0] not in ("report", "compare"):
        assert fails(capsys, *command, "runs").endswith("name one of the runs in it (`bm3il list runs`)\n")


def test_the_environment_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-environment", "rover_tower?pairs=2"]) == 0
    assert "all checks passed" in capsys.readouterr().out


def test_missing_demonstrations_are_told_with_the_command_that_makes_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the world as it is to be demonstrated, not of its change."""
    flags = ("--environment", "rover_tower?pairs=2&slip=0.1", "--demonstration-episodes", "3")
    error = fails(capsys, "train", *flags, "--demonstrations", "my", "--runs-folder", str(tmp_path))
    assert error.endswith('bm3il demonstrations record "rover_tower?pairs=2" --output my.safetensors --episodes 3\n'), (
        error
    )
    file = str(tmp_path / "my.safetensors")
    assert main(["demonstrations", "record", "rover_tower?pairs=2", "--output", file, "--episodes", "3"]) == 0


def test_recorded_demonstrations_can_be_inspected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(tmp_path / "mine.safetensors")
    assert main(["demonstrations", "record", "rover_tower?pairs=2", "--episodes", "3", "--output", file]) == 0
    capsys.readouterr()
    assert main(["demonstrations", "inspect", file]) == 0
    assert "3, from 3 independent starts" in capsys.readouterr().out
    error = fails(capsys, "demonstrations", "record", "rover_tower?pairs=2", "--output", file)
    assert "exists" in error
