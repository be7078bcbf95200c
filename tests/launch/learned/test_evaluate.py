"""What `bm3il evaluate` says while somebody waits, and its table."""

from __future__ import annotations

from typing import Any

import pytest

from bm3il.launch.learned import evaluate


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_long_evaluation_tells_how_far_it_is_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(evaluate, "time", clock)
    told, when = evaluate._Told("policy, drawn"), []
    for second in range(400):
        clock.now = float(second)
        told(second // 4, 100)
        if line := capsys.readouterr().err:
            when.append((second, line))
    assert [second for second, _ in when] == [5, 10, 20, 40, 80, 140, 200, 260, 320, 380]
    assert when[1][1] == "policy, drawn: 2 of 100 episodes, left 8:10 (--episodes says how many)\n"
    told = evaluate._Told("random")
    clock.now += 6
    told(0, 100)  # before the first has ended
    assert capsys.readouterr().err == "random: 0 of 100 episodes (--episodes says how many)\n"


def test_a_narrow_terminal_shows_every_letter(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    returns = {"return_mean": -1234.5, "return_stderr": 10.2, "random_return": -9876.5, "expert_return": 1234.5}
    row: dict[str, Any] = {
        "starts": "paired",
        "actions": "greedy",
        "episodes": 2000,
        **returns,
        "normalized_return": 0.5,
    }
    row["types"] = {"[bus]": row | {"return_stderr": None}, "home0-work7": row}
    evaluate._print("a run in a world with a long name", [row])
    shown = capsys.readouterr().out
    assert "…" not in shown
    heading = "starts actions episodes of return ± s.e. random expert normalised"
    assert heading.split() == next(line for line in shown.splitlines() if "starts" in line).split()
    assert "home0-work7" in shown
    assert next(line for line in shown.splitlines() if "[bus]" in line).split()[:3] == ["[bus]", "-1234.5", "–"]
    assert max(map(len, shown.splitlines())) <= 80
