"""What `make` takes, without making anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make` would do; these tests may themselves be run by one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("ALGORTHM=bc", "unknown variable 'ALGORTHM'; did you mean ALGORITHM?"),
        ("SEEDS=3", "unknown variable 'SEEDS'; did you mean SEED"),
        ("FLAGS=--seed 3", "unknown variable 'FLAGS'; did you mean ARGS"),
        ("actors=2", "known: ACTORS, ALGORITHM"),
    ],
)
def test_a_misspelt_variable_is_refused(given: str, answer: str) -> None:
    ended = make("launch", "SEED=1", given)
    assert ended.returncode == 2
    assert answer in ended.stderr
    assert ended.stdout == ""


TARGETS = re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_a_misspelt_variable_is_refused_by_every_target_before_and_after_it(target: str) -> None:
    assert len(TARGETS) >= 8
    for arguments in ([target, "ALGORTHM=bc"], ["ALGORTHM=bc", target], [target, "ALGORTHM="]):
        ended = make(*arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "did you mean ALGORITHM?" in ended.stderr


@pytest.mark.parametrize("python3", [True, False])
def test_a_misspelt_variable_is_refused_on_a_fresh_machine(tmp_path: Path, python3: bool) -> None:
    """With no virtual environment, and no package beside Python's own."""
    (tmp_path / "bm3il" / "protocol").mkdir(parents=True)
    for name in ("Makefile", "bm3il/__init__.py", "bm3il/protocol/__init__.py", "bm3il/protocol/errors.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "sh"):
        (programs / name).symlink_to(shutil.which(name) or name)
    if python3:
        (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
        (programs / "python3").chmod(0o700)
    command = [str(programs / "make"), "ALGORTHM=bc", "launch"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PATH": str(programs)}, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"unknown variable 'ALGORTHM'; {'did you mean ALGORITHM?' if python3 else 'known: NODES'}" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_variable_of_launch_is_passed_on() -> None:
    flags = dict(re.findall(r"\$\(call flag,([A-Z]+),([a-z]+)\)", MAKEFILE))
    assert len(flags) == 11
    ended = make("launch", *(f"{name}=of-{flag}" for name, flag in flags.items()), "ARGS=--learner.heads 2")
    assert ended.returncode == 0, ended.stderr
    assert all(f"--{flag} 'of-{flag}'" in ended.stdout for flag in flags.values())
    assert "--learner.heads 2" in ended.stdout


def test_what_other_targets_take_is_known() -> None:
    for arguments in (["chaos", "SECONDS=5", "SEED=1", "MODE=async"], ["test", "ARGS=-x"], ["lint", "PYTHON=python3"]):
        assert make(*arguments).returncode == 0
    assert "chaos.py --seconds 5" in (said := make("chaos", "SECONDS=5", "KIND=simulator").stdout)
    assert "--kind 'simulator'" in said
