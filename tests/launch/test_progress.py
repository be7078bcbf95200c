from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.progress import Progress


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"status": "finished", "wall_seconds": 61.0}, "finished after 1:01\n"),
        ({"status": "failed"}, "failed\n"),
        ({"status": "finished", "wall_seconds": 1.0, "return_mean": 2.5}, "finished after 0:01\nreturn per agent and "),
    ],
)
def test_the_summary_says_what_is_known(tmp_path: Path, result: dict[str, object], expected: str) -> None:
    text = io.StringIO()
    Progress(Console(file=text)).summary(tmp_path, result)
    assert text.getvalue().startswith(expected)
