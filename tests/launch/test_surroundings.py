"""Real processes in odd places: files of everyday names, closed terminals, full disks, other locales."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bm3il.launch.cli import main
from bm3il.launch.processes.supervisor import StopRequests

CONSOLE = "import sys; sys.path.pop(0); from bm3il.launch.cli import main; sys.exit(main())"
"""As the console script does it, whose folder is searched first."""
TINY = [
    *("train", "--preset", "rover_tower_4", "--steps", "200", "--actor.steps-per-iteration", "100"),
    *("--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--cloning.iterations", "1"),
    *("--actor.hidden", "16", "--learner.hidden", "16", "--reward.hidden", "16"),
]
SERIAL = [*TINY, "--mode", "serial"]
LONG = "a" * 95
DEADLINE_SECONDS = 100.0


def bm3il(folder: Path, *args: str, env: Mapping[str, str] | None = None, **kinds: Any) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kinds
    command = [sys.executable, "-c", CONSOLE, *args]
    return subprocess.Popen(command, cwd=folder, env=os.environ | (env or {}), text=True, **streams)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, output or "", errors or ""


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.processes
def test_names_of_every_day_in_the_working_folder_and_beside_the_package_hide_nothing(tmp_path: Path) -> None:
    """ROS 2, whose PYTHONPATH comes before what is installed, has a package `launch`."""
    ros = tmp_path / "ros"
    for name in ("queue", "random", "launch", "learner", "runpy", "protocol", "actors/__init__", "ros/launch/__init__"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')", encoding="utf-8")
    code, _, errors = ended(bm3il(tmp_path, *TINY, "--run", "mine", env={"PYTHONPATH": str(ros)}))
    assert (code, errors) == (0, "")
    assert result_of(tmp_path / "runs" / "mine")["status"] == "finished"


MINE = """
from mpe2 import simple_spread_v3
parallel_env = simple_spread_v3.parallel_env
"""


def test_an_environment_in_the_working_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine_v0.py").write_text(MINE, encoding="utf-8")
    code, output, errors = ended(bm3il(tmp_path, "check-environment", "pettingzoo:mine_v0?arguments=max_cycles:3"))
    assert (code, "all checks passed" in output) == (0, True), errors


EDITABLE = """
import importlib.util
import sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {file!r}) if name == "mine_v0" else None

sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("options", ["", "&processes=2"])
def test_an_environment_in_the_working_folder_does_not_hide_one_that_is_installed_by_a_link(
    tmp_path: Path, options: str
) -> None:
    """pip's finders of what is installed with -e are asked after all of sys.path."""
    site, linked, working = tmp_path / "site", tmp_path / "linked", tmp_path / "working"
    for folder, name, text in (
        (site, "sitecustomize", EDITABLE.format(file=str(linked / "mine_v0.py"))),
        (linked, "mine_v0", MINE),
        (working, "mine_v0", "raise RuntimeError('an old copy')"),
    ):
        folder.mkdir()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    name = "pettingzoo:mine_v0?arguments=max_cycles:3" + options
    code, output, errors = ended(bm3il(working, "check-environment", name, env={"PYTHONPATH": path}))
    assert (code, "all checks passed" in output) == (0, True), errors


@pytest.mark.processes
def test_a_closed_terminal_is_a_request_to_stop(tmp_path: Path) -> None:
    process = bm3il(tmp_path, *SERIAL, "--run", "long", "--steps", "1000000")
    log = tmp_path / "runs" / "long" / "log.jsonl"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not log.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    code, output, _ = ended(process)
    result = result_of(tmp_path / "runs" / "long")
    assert (code, result["status"]) == (130, "interrupted")
    assert (tmp_path / "runs" / "long" / "checkpoints" / f"{result['iterations']:08d}").is_dir()
    assert f"at iteration {result['iterations']:,} with {result['env_steps']:,} steps played, of 1,000,000" in output
    assert result["resume"] == f"bm3il resume {tmp_path}/runs/long"
    assert output.splitlines()[-1] == f"go on with: {result['resume']}"


@pytest.mark.parametrize(("before", "heard"), [(signal.SIG_DFL, 1), (signal.SIG_IGN, 0)])
def test_a_hangup_that_nohup_ignores_stays_ignored(before: signal.Handlers, heard: int) -> None:
    old = signal.signal(signal.SIGHUP, before)
    try:
        stopped = StopRequests()
        with stopped.heard():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopped.count == heard
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.processes
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_nobody_need_read_what_a_run_prints(tmp_path: Path, nodes: str) -> None:
    process = bm3il(tmp_path, *TINY, "--run", "pipe", "--nodes", nodes)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("memory: about ")
    process.stdout.close()
    process.stdout = None
    assert ended(process) == (0, "", "")
    assert result_of(tmp_path / "runs" / "pipe")["status"] == "finished"


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@full
def test_a_run_goes_on_without_its_output(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as disk:
        code, _, errors = ended(bm3il(tmp_path, *SERIAL, "--run", "full", stdout=disk))
    assert code == 0
    assert errors == "bm3il: cannot write to the standard output: No space left on device; it goes on\n"
    assert result_of(tmp_path / "runs" / "full")["status"] == "finished"


@full
def test_what_only_prints_fails_in_one_line_where_it_cannot(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as disk:
        code, _, errors = ended(bm3il(tmp_path, "demonstrations", "inspect", "rover_tower_4", stdout=disk))
    assert (code, errors) == (2, "bm3il: cannot write the output: No space left on device\n")


@pytest.mark.processes
def test_a_full_temporary_folder_is_one_line_and_takes_no_name(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    mount = "mount -t tmpfs -o size=4k,nr_inodes=4 none tiny"
    alone = ["unshare", "-m", "bash", "-c"]
    if subprocess.run([*alone, mount], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("needs a mount of its own")
    command = f'{mount} && TMPDIR=$PWD/tiny exec "$@"'
    run = [*alone, command, "bash", sys.executable, "-c", CONSOLE, *TINY, "--run", "mine"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:7], done.stdout.count("\n")) == (2, "memory:", 1)
    assert done.stderr == (
        f"bm3il: cannot write to {tmp_path}/tiny: No space left on device; set TMPDIR to a folder with room\n"
    )
    assert not list((tmp_path / "runs").glob("*"))


def test_a_refused_start_takes_no_name_and_a_refused_resume_no_result(tmp_path: Path) -> None:
    (tmp_path / LONG).mkdir()
    tmpdir = {"TMPDIR": str(tmp_path / LONG)}
    code, _, errors = ended(bm3il(tmp_path, *TINY, "--run", "mine", env=tmpdir))
    assert (code, errors.count("\n"), "too long a path for sockets" in errors) == (2, 1, True)
    assert list((tmp_path / "runs").glob("*")) == []
    run = tmp_path / "runs" / "mine"
    assert main([*SERIAL, "--run", "mine", "--runs-folder", str(tmp_path / "runs")]) == 0
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("mode: serial", "mode: lockstep"), encoding="utf-8")
    before = (run / "result.json").read_text(encoding="utf-8")
    assert main(["resume", str(run)]) == 2  # the mode was changed
    (run / "config.yaml").write_text(config, encoding="utf-8")
    assert (run / "result.json").read_text(encoding="utf-8") == before


def test_letters_that_a_locale_does_not_have_end_nothing(tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for args in (["train", "--help"], ["demonstrations", "inspect", "rover_tower_4"], ["--help"]):
        code, output, errors = ended(bm3il(tmp_path, *args, env=ascii_only))
        assert (code, errors) == (0, ""), args
        assert output.isascii()
        assert "?" in output


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """Python tells of files that are opened in the encoding of the locale."""
    warned = {"PYTHONWARNDEFAULTENCODING": "1"}
    code, _, errors = ended(bm3il(tmp_path, *SERIAL, "--run", "mine", env=warned))
    root = str(Path(__file__).parents[2])
    lines = [line for line in errors.splitlines() if "EncodingWarning" in line and line.startswith(root)]
    assert (code, [line for line in lines if "site-packages" not in line]) == (0, [])
