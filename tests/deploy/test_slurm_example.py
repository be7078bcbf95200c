"""The example is what `bm3il submit` writes, and bash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bm3il.launch.config import parse_config
from bm3il.launch.nodes.slurm import script

FILE = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "night.sbatch"
PLACE = Path("/shared/bm3il")
HOSTS = ["--nodes", "4", "--actors", "64"]
ARGS = ["--preset", "berlin", "--mode", "async", *HOSTS, "--steps", "2000000", "--run", "night"]


def test_the_script_is_what_submit_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bm3il submit --dry-run`, in /shared/bm3il with the environment in its .venv."""
    monkeypatch.setattr(sys, "executable", str(PLACE / ".venv/bin/python"))
    monkeypatch.setattr(Path, "cwd", lambda: PLACE)
    monkeypatch.setattr(Path, "resolve", lambda path: PLACE / path)
    assert FILE.read_text() == script(parse_config(ARGS), ARGS, "12:00:00", ["partition=long", "cpus-per-task=16"])


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(FILE)], check=True)
