"""What `make` takes, without making anything."""

from __future__ import annotations

import os
import re
import subprocess
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
