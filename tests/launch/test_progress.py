from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bm3il.launch.progress import Progress
from bm3il.protocol.messages import Status
from bm3il.protocol.telemetry import OF_TYPE


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"status": "finished", "wall_seconds": 61.0}, "finished after 1:01\n"),
        ({"status": "failed"}, "failed\n"),
        ({"status": "finished", "wall_seconds": 1.0}, "finished after 0:01\nthe final policy was not evaluated"),
        ({"status": "finished", "wall_seconds": 1.0, "return_mean": 2.5}, "finished after 0:01\nreturn per agent and "),
    ],
)
def test_the_summary_says_what_is_known(tmp_path: Path, result: dict[str, object], expected: str) -> None:
    text = io.StringIO()
    Progress(Console(file=text)).summary(tmp_path, result)
    assert text.getvalue().startswith(expected)
    assert "bm3il report" not in text.getvalue()


def test_the_summary_of_a_run_that_has_trained_names_what_there_is_to_look_at(tmp_path: Path) -> None:
    for name in ("curve.png", "log.jsonl"):
        (tmp_path / name).touch()
    text = io.StringIO()
    Progress(Console(file=text, width=1000)).summary(tmp_path, {"status": "finished", "return_mean": 1.0})
    assert text.getvalue().endswith(f"{tmp_path / 'curve.png'}\n`bm3il report {tmp_path}` makes a page of it\n")


def test_the_last_evaluation_shows_how_far_it_is() -> None:
    text = io.StringIO()
    values = {"iteration": 9.0, "iterations": 9.0, "evaluated_episodes": 250.0, "episodes_to_evaluate": 1000.0}
    Progress(Console(file=text, soft_wrap=True)).show(Status("learner", 0, 0, 1, "final_evaluation", "", values))
    assert text.getvalue() == "final evaluation 250/1,000 episodes\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"stage_seconds": 3.2}, "stage update (3 s)\n"),
        ({"cloning_iteration": 0.0, "cloning_iterations": 40.0}, "cloning 0/40\n"),
        ({"stage_seconds": 0.0, "cloning_iterations": 40.0}, "stage update (0 s)\n"),
        (
            {"cloning_iteration": 3.0, "cloning_iterations": 40.0, "cloning_left_seconds": 61.0},
            "cloning 3/40  left 1:01\n",
        ),
        (
            {"iteration": 2.0, "iterations": 9.0, "steps": 900.0, "env_steps": 200.0, "steps_per_second": 50.0}
            | {"policy_lag": 0.5, "wall_seconds": 4.0},
            "iteration 2/9  env steps 200/900  return –  policy lag 0.5  steps/s 50  stages, ms   left 0:14\n",
        ),
        (  # cloning plays no steps
            {"iteration": 2.0, "iterations": 9.0, "steps": 0.0, "env_steps": 0.0, "steps_per_second": 0.0}
            | {"held_out_loss": 0.41, "wall_seconds": 4.0},
            "iteration 2/9  return –  held-out loss 0.410  stages, ms   left 0:14\n",
        ),
        (
            {"iteration": 2.0, "iterations": 9.0, "accuracy_agent": 0.5, "accuracy_expert": 0.62}
            | {"return_mean": 0.0, "random_return": 0.0, "clone_return": 0.0},
            "iteration 2/9  return unknown (no reward but 0 was seen)  told apart 56% (50%: alike)  stages, ms \n",
        ),
        (
            {"iteration": 8.0, "iterations": 9.0, "return_mean": -10.5, "evaluated_iteration": 5.0}
            | {"random_return": -20.0, "expert_return": -10.0},
            "iteration 8/9  return -10.5 (of iteration 5, random -20.0, expert -10.0, normalised 0.950)  stages, ms \n",
        ),
        (
            {"iteration": 5.0, "iterations": 9.0, "return_mean": -10.5, "evaluated_iteration": 5.0},
            "iteration 5/9  return -10.5  stages, ms \n",
        ),
    ],
)
def test_a_line_says_how_far_it_is(values: dict[str, float], expected: str) -> None:
    text = io.StringIO()
    Progress(Console(file=text, soft_wrap=True)).show(Status("learner", 0, 0, 1, "update", "", values))
    assert text.getvalue() == expected


def test_a_budget_that_is_overrun_leaves_nothing_and_not_less() -> None:
    text = io.StringIO()
    values = {"iteration": 9.0, "iterations": 9.0, "steps": 100.0, "env_steps": 120.0, "wall_seconds": 60.0}
    Progress(Console(file=text, soft_wrap=True)).show(Status("learner", 0, 0, 1, "update", "", values))
    assert "left 0:00\n" in text.getvalue()


def test_types_are_told_apart_and_of_many_the_lowest_and_the_highest() -> None:
    text = io.StringIO()
    progress = Progress(Console(file=text, soft_wrap=True))
    few = {"iteration": 1.0, f"{OF_TYPE}rover": 0.5, f"{OF_TYPE}tower": -0.25}
    progress.show(Status("learner", 0, 0, 1, "update", "", few))
    assert "of types rover 0.500, tower -0.250  " in text.getvalue()
    types = {f"t{number}": {"normalized_return": number / 10} for number in range(9)}
    progress.summary(Path("none"), {"status": "finished", "return_mean": 1.0, "types": types})
    assert "normalised, of types: 0.000 (t0) to 0.800 (t8)\n" in text.getvalue()
    progress.summary(Path("none"), {"status": "finished", "types": {"rover": {"normalized_return": None}}})
    assert "of types: not known\n" in text.getvalue()


def test_the_summary_of_a_run_without_a_true_reward_shows_no_returns() -> None:
    text = io.StringIO()
    types = {"rover": {"normalized_return": None}}
    result = {"status": "finished", "return_mean": 0.0, "random_return": 0.0, "types": types}
    Progress(Console(file=text, width=1000)).summary(Path("none"), result)
    assert "no reward but 0 was seen" in text.getvalue()
    assert "normalised" not in text.getvalue()
    assert "0.0" not in text.getvalue()


def test_an_expert_of_another_world_is_told_as_one() -> None:
    text = io.StringIO()
    progress, told = Progress(Console(file=text, soft_wrap=True)), {"return_mean": 1.0, "expert_return": 9.0}
    values = {"iteration": 1.0, "changed_world": 1.0, **told}
    progress.show(Status("learner", 0, 0, 1, "update", "", values))
    assert "return 1.0 (expert as demonstrated 9.0)" in text.getvalue()
    progress.summary(Path("none"), {"status": "finished", "changes": "town", **told})
    assert "learned 1.0, expert as demonstrated 9.0\n" in text.getvalue()
    progress.summary(Path("none"), {"status": "finished", "changes": "", **told})
    assert "learned 1.0, expert 9.0\n" in text.getvalue()
