"""How long several runs will take, and what is shown of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bm3il.launch.studies.board import Board, Pace, seconds_left


def test_what_is_left_follows_from_others_of_the_kind() -> None:
    assert seconds_left([Pace("a", 0.0, 0.0)], 1) is None
    assert seconds_left([Pace("a", 0.25, 10.0)], 4) == 30
    slow, fast = Pace("slow", 1.0, 100.0), Pace("fast", 0.5, 5.0)
    assert seconds_left([slow, fast], 1) == 5
    assert seconds_left([slow, fast, Pace("slow", 0.0, 0.0)], 1) == 105
    assert seconds_left([slow, fast, Pace("slow", 0.0, 0.0), Pace("fast", 0.0, 0.0)], 2) == 100  # one takes so long
    assert seconds_left([slow, fast, Pace("new", 0.0, 0.0)], 1) == pytest.approx(5 + 55)


def test_a_line_tells_of_those_under_way(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder, iteration in zip(folders, (10, 5, 0), strict=True):
        folder.mkdir()
        (folder / "log.jsonl").write_text(json.dumps({"iteration": iteration, "wall_seconds": 2.0 * iteration}) + "\n")
    (folders[0] / "result.json").write_text('{"status": "finished"}')
    text = io.StringIO()
    with Board(dict.fromkeys(folders, 10), dict.fromkeys(folders, ""), 1, Console(file=text, width=200)) as board:
        board.show([folders[1]], {})
        board.show([folders[1]], {})  # a line is enough for a while
    assert text.getvalue() == "second 5/10 waiting; all 1/3; left 0:30\n"


def test_a_run_of_short_episodes_has_more_iterations_than_were_expected(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"iteration": 7, "wall_seconds": 14.0}\n')
    text = io.StringIO()
    with Board({tmp_path: 6}, {tmp_path: ""}, 1, Console(file=text, width=200)) as board:
        board.show([tmp_path], {})
    assert f"{tmp_path.name} 7/7 waiting" in text.getvalue()
