"""Every row of the table of algorithms trains with real processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import pytest

from bm3il.learner.algorithms import ALGORITHMS
from tests.launch.test_faults import finished

TINY = [
    *("--steps", "200", "--learner.updates", "2", "--cloning.iterations", "2", "--cloning.updates", "2"),
    *("--evaluation.starts", "fresh", "--evaluation.episodes", "2", "--evaluation.final-episodes", "2"),
]
MARK = "BM3IL_TEST_RUN"
RUNS = [(name, mode) for mode in ("lockstep", "async") for name in ALGORITHMS]
KINDS = {("bc", "lockstep"), ("bc", "async"), ("maac", "lockstep"), ("bm3il", "async")}
"""The kinds of plan: who clones has no reward server, and who imitates a learned reward."""
ALWAYS = {("bm3il", "async")}


def marked(value: str) -> list[psutil.Process]:
    """The living processes that inherited this value of the variable `MARK`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def marks(run: tuple[str, str]) -> list[pytest.MarkDecorator]:
    if run in ALWAYS:
        return []
    return [pytest.mark.processes if run in KINDS else pytest.mark.slow]


@pytest.mark.parametrize(("name", "mode"), [pytest.param(*run, marks=marks(run)) for run in RUNS])
def test_every_algorithm_trains_in_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    result = finished(tmp_path, "run", "--algorithm", name, "--mode", mode, *TINY)
    assert (result["status"], result["exit_code"], result["iterations"]) == ("finished", 0, 2)
    assert math.isfinite(result["normalized_return"])
    assert marked(os.environ[MARK]) == []
