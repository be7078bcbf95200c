"""The batch script: bash that begins a run, goes on with it, and comes back when it was stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bm3il.launch.cli import main
from bm3il.launch.config import parse_config
from bm3il.launch.nodes.slurm import script
from bm3il.launch.surroundings import module_command

PROGRAM = " ".join(module_command("bm3il.launch.cli")[1:])
ARGS = ["--preset", "rover_tower_4", "--nodes", "2", "--run", "night"]


def fake(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def played(tmp_path: Path, python: str, signal: str = "") -> tuple[int, list[str]]:
    """Run the script with a stand-in for the launcher; returns its exit code and what was called."""
    text = script(parse_config([*ARGS, "--runs-folder", str(tmp_path)]), ARGS, "1:00:00", [])
    calls = tmp_path / "calls"
    fake(tmp_path, "python", f'echo "python $*" >> {calls}; {python}')
    fake(tmp_path, "scontrol", f'echo "scontrol $*" >> {calls}')
    fake(tmp_path, "sleep", f'echo "sleep $*" >> {calls}')
    lines = [line for line in text.splitlines() if not line.startswith("cd ")]
    body = "\n".join(lines).replace(sys.executable, str(tmp_path / "python"))
    (tmp_path / "job").write_text(body)
    process = subprocess.Popen(
        ["bash", str(tmp_path / "job")], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    )
    if signal:
        while not (tmp_path / "up").exists():
            assert process.poll() is None
        subprocess.run(["kill", f"-{signal}", str(process.pid)], check=True)
    code = process.wait(timeout=20)
    return code, calls.read_text().splitlines()


STOPPABLE = 'trap "exit 130" TERM; touch "$(dirname "$0")/up"; while :; do /bin/sleep 0.05; done'


def test_it_begins_and_then_goes_on(tmp_path: Path) -> None:
    code, calls = played(tmp_path, "exit 0")
    assert (code, calls) == (0, [f"python {PROGRAM} train --preset rover_tower_4 --nodes 2 --run night"])
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "config.yaml").touch()
    assert played(tmp_path, "exit 4")[1][1] == f"python {PROGRAM} resume {tmp_path}/night"
    assert played(tmp_path, "exit 4")[0] == 4


def test_when_time_is_nearly_over_it_requeues_itself(tmp_path: Path) -> None:
    code, calls = played(tmp_path, STOPPABLE, "USR1")
    assert (code, calls[1:]) == (130, ["scontrol requeue 7", "sleep 600"])


def test_when_preempted_it_waits_to_be_requeued(tmp_path: Path) -> None:
    code, calls = played(tmp_path, STOPPABLE, "TERM")
    assert (code, calls[1:]) == (130, ["sleep 600"])


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--runs-folder", str(tmp_path / "runs"), "--sbatch", "partition=gpu"]
    assert main(["submit", "--dry-run", *ARGS, *place]) == 0
    assert "#SBATCH --partition=gpu" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_names_and_paths_stay_what_they_are(tmp_path: Path) -> None:
    folder, name = tmp_path / "my 100% work", 'a "b" c%j'
    given = [*ARGS[:-1], name, "--runs-folder", str(folder)]
    text = script(parse_config(given), given, "1:00:00", [])
    assert '#SBATCH --job-name="bm3il-a \\"b\\" c%j"\n' in text
    log = f'{tmp_path}/my 100%% work/a \\"b\\" c%%j.slurm.log'
    assert f'#SBATCH --output="{log}"\n' in text


@pytest.mark.parametrize("flag", ["--run", "--time", "--sbatch", "--runs-folder"])
def test_no_value_adds_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    given = dict(zip(ARGS[::2], ARGS[1::2], strict=True)) | {"--runs-folder": str(tmp_path)}
    given[flag] = given.get(flag, "") + "\n#SBATCH --account=other"
    assert main(["submit", "--dry-run", *(word for pair in given.items() for word in pair)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_without_slurm_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *ARGS, "--runs-folder", str(tmp_path / "runs")]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
