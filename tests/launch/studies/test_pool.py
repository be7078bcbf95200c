"""Runs at once on this machine: what they tell on the way is taken in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.studies import pool
from bm3il.launch.studies.pool import Work, run_all
from bm3il.protocol.telemetry import DONE_FD

MORE_THAN_A_PIPE_HOLDS = 30_000
TELL = f"""
import os, pathlib, sys
for number in range(1, {MORE_THAN_A_PIPE_HOLDS}):
    os.write(int(os.environ["{DONE_FD}"]), b"%d\\n" % number)
pathlib.Path(sys.argv[1], "done").touch()
"""


@pytest.mark.timeout(60)
def test_a_run_of_many_iterations_is_listened_to(tmp_path: Path) -> None:
    """It tells of each one through a pipe, and would wait for ever for room in it."""
    work = Work(lambda folder: [sys.executable, "-c", TELL, str(folder)], lambda folder: (folder / "done").exists())
    assert run_all([tmp_path], 1, StopRequests(), lambda *_: None, work) == {}
    assert (tmp_path / "done").exists()


FAILS = """
import json, pathlib, sys
pathlib.Path(sys.argv[1], "result.json").write_text(json.dumps({"status": "failed", "run_id": "2", "error": "NaN"}))
"""
REFUSED = "import sys; sys.exit('bm3il: town.xml has changed')"


@pytest.mark.parametrize(("program", "why"), [(REFUSED, "town.xml has changed"), (FAILS, "NaN")])
def test_a_run_that_is_refused_does_not_tell_why_it_failed_before(tmp_path: Path, program: str, why: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "failed", "run_id": "1", "error": "of an old start"}))
    work = Work(lambda folder: [sys.executable, "-c", program, str(folder)])
    assert run_all([tmp_path], 1, StopRequests(), lambda *_: None, work) == {tmp_path: why}


def test_who_was_stopped_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.05)
    stopped = StopRequests()
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    work = Work(lambda folder: [sys.executable, "-c", "import time; time.sleep(60)"], lambda folder: False)

    def watch(running: Any, failed: Any) -> None:
        if running and not stopped.count:
            stopped.add()

    assert run_all(folders, 1, stopped, watch, work) == {}
    assert not (folders[1] / "run.log").exists(), "nothing is begun any more"
