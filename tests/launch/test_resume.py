"""Runs that go on: with another budget, after a refusal, from the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bm3il.launch.cli import main
from bm3il.launch.run_folder import open_existing

SERIAL = [
    *("train", "--preset", "rover_tower_4", "--mode", "serial", "--actor.steps-per-iteration", "100"),
    *("--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.interval", "10"),
    *("--cloning.iterations", "1", "--actor.hidden", "16", "--learner.hidden", "16", "--reward.hidden", "16"),
]


def trained(folder: Path, name: str, *args: str) -> Path:
    assert main([*SERIAL, "--runs-folder", str(folder), "--run", name, *args]) == 0
    return folder / name


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_finished_run_can_be_prolonged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "run", "--steps", "250")
    first = result_of(run)
    assert (first["iterations"], first["env_steps"], first["steps"]) == (3, 300, 250)
    assert "finished after" in (output := capsys.readouterr().out)
    assert "at iteration 3 with 300 steps played, of 250" in output

    for steps in ("300", "200", "0"):
        assert "--steps must be a" in refused(capsys, "resume", str(run), "--steps", steps)
    assert (result_of(run), open_existing(run).steps) == (first, 250)

    assert main(["resume", str(run), "--steps", "500"]) == 0
    assert "\nlearner-0 goes on from the checkpoint of iteration 3\n" in capsys.readouterr().out
    longer = result_of(run)
    assert (longer["status"], longer["iterations"], longer["env_steps"], longer["steps"]) == ("finished", 5, 500, 500)
    assert (open_existing(run).steps, (run / "config-250-steps.yaml").exists()) == (500, True)
    logged = [json.loads(line)["iteration"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5]
    curve = [line.split(",")[0] for line in (run / "curve.csv").read_text().splitlines()[1:]]
    assert curve == ["0", "3", "5"]


CHANGING = ("run_id", "started", "ended", "wall_seconds")


def test_a_run_that_is_complete_is_not_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, "run", "--steps", "100")
    result, text = result_of(run), (run / "result.json").read_text(encoding="utf-8")
    for command in (["resume", str(run)], ["train", "--resume", str(run)]):
        capsys.readouterr()
        assert main(command) == 0
        said = capsys.readouterr().out
        assert said.startswith("finished after")
        assert said.endswith(f"the run has finished; `bm3il resume {run} --steps N` prolongs it\n")
        assert (run / "result.json").read_text(encoding="utf-8") == text

    # Somebody has to do what is left: the evaluation of the final policy, or more steps.
    (run / "result.json").write_text(json.dumps(result | {"return_mean": None}), encoding="utf-8")
    assert main(["resume", str(run)]) == 0
    assert {**result_of(run), **dict.fromkeys(CHANGING)} == {**result, **dict.fromkeys(CHANGING)}
    config = (run / "config.yaml").read_text(encoding="utf-8")  # as a prolongation leaves it that was killed
    (run / "config.yaml").write_text(config.replace("\nsteps: 100\n", "\nsteps: 200\n"), encoding="utf-8")
    assert main(["resume", str(run)]) == 0
    assert result_of(run)["env_steps"] == 200


def test_a_run_of_other_settings_is_refused_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, "run", "--steps", "100")
    first, config = result_of(run), (run / "config.yaml").read_text(encoding="utf-8")
    line = refused(capsys, "train", "--resume", str(run), "--steps", "200")
    assert "steps: 100 then, steps: 200 now; `bm3il resume" in line
    (run / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"), encoding="utf-8")
    assert "was changed since its newest checkpoint: seed: 0 then, 1 now" in refused(capsys, "resume", str(run))
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert result_of(run) == first


def test_cloning_plays_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "run", "--algorithm", "bc", "--steps", "800")
    told = "'bc' plays no steps, so --steps has no effect: it learns for 1 iterations (--cloning.iterations)\n"
    assert told in capsys.readouterr().out
    assert "'bc', which plays no steps" in refused(capsys, "resume", str(run), "--steps", "900000")


def test_the_best_checkpoint_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "run", "--steps", "100")
    (run / "checkpoints" / "best").unlink()
    line = refused(capsys, "evaluate", str(run), "--episodes", "1", "--best")
    assert line.startswith(f"bm3il: {run} has no best checkpoint")
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0


@pytest.mark.processes
def test_nodes_prolong_a_run_whose_result_lies_there(tmp_path: Path) -> None:
    run = trained(tmp_path, "run", "--steps", "200", "--mode", "lockstep", "--nodes", "2")
    first = result_of(run)
    assert main(["resume", str(run), "--steps", "400"]) == 0
    assert (first["env_steps"], result_of(run)["env_steps"]) == (200, 400)
