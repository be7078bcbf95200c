"""A short storm of hostile bytes; `benchmarks/fuzz.py` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_hostile_bytes_do_no_harm() -> None:
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "6000", "--steps", "1000", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-20_000:]
    assert "honest requests still answered" in done.stdout
