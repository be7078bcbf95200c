from __future__ import annotations

import csv
import errno
import json
import math
from itertools import combinations
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bm3il.actors.evaluation import ReturnEstimate
from bm3il.learner.picture import curve_figure
from bm3il.learner.record import Forgotten, RunRecord

TYPES = {
    "rover": {"return_mean": 1.5, "return_stderr": 0.1, "random_return": 0.0, "normalized_return": 0.5},
    "tower": {"return_mean": 2.0, "return_stderr": 0.1, "random_return": 0.0, "normalized_return": None},
}


def write(record: RunRecord, iterations: list[int]) -> None:
    for iteration in iterations:
        figures = {"critic_loss": 1.0 / iteration} if iteration else {}
        if iteration:
            record.log_iteration(iteration, figures)
        estimate = ReturnEstimate(2.0 * iteration, 0.1, 20)
        record.add_evaluation(iteration, 100 * iteration, 0.5 * iteration, estimate, None, TYPES, figures)


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_columns_that_come_later_are_added(tmp_path: Path) -> None:
    write(RunRecord(tmp_path), [0, 1, 2])
    rows = curve(tmp_path)
    assert list(rows[0])[:5] == ["iteration", "env_steps", "wall_seconds", "return_mean", "return_stderr"]
    assert [row["critic_loss"] for row in rows] == ["", "1.0", "0.5"]
    assert [row["normalized_return"] for row in rows] == ["", "", ""]
    assert [row["episodes"] for row in rows] == ["20", "20", "20"]
    assert [row["return_mean.rover"] for row in rows] == ["1.5"] * 3
    assert [row["return_stderr.rover"] for row in rows] == ["0.1"] * 3
    assert {row["normalized_return.rover"] for row in rows} == {"0.5"}
    assert {row["normalized_return.tower"] for row in rows} == {""}


def test_of_one_episode_the_error_is_left_empty(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.add_evaluation(0, 0, 0.0, ReturnEstimate(4.0, None, 1), None, {}, {})
    (row,) = curve(tmp_path)
    assert (row["return_mean"], row["return_stderr"], row["episodes"]) == ("4.0", "", "1")
    (axes,) = curve_figure([row], {}).axes
    assert [label.get_text() for label in axes.texts] == ["learned 4.0"]


def test_a_resumed_run_leaves_the_same_record(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    write(RunRecord(whole), [0, 1, 2, 3, 4])
    write(RunRecord(resumed), [0, 1, 2, 3])
    with (resumed / "log.jsonl").open("a") as file:
        file.write('{"iteration": 4, "cut sho')
    again = RunRecord(resumed)
    assert again.go_on_from(2) == Forgotten(True, False, 1, 0.0), "the line of iteration 4 was cut short"
    again.add_evaluation(2, 200, 1.0, ReturnEstimate(4.0, 0.1, 20), None, TYPES, {"critic_loss": 0.5})
    write(again, [3, 4])
    for name in ("curve.csv", "log.jsonl"):
        assert (resumed / name).read_text() == (whole / name).read_text()


def test_going_back_to_the_start_leaves_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    write(record, [0, 1])
    record.go_on_from(0)
    assert curve(tmp_path) == []
    write(record, [0, 1])
    assert [row["iteration"] for row in curve(tmp_path)] == ["0", "1"]


def test_results_are_plain_json(tmp_path: Path) -> None:
    RunRecord(tmp_path).write_result({"return_mean": math.nan, "steps": 3})
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"return_mean": None, "steps": 3}
    assert "NaN" not in text


def test_the_picture_is_drawn_with_and_without_an_expert(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    write(record, [0, 1])
    for expert_return in (None, 9.0):
        record.write_result({"algorithm": "bm3il", "random_return": -7.0, "expert_return": expert_return})
        path = record.draw()
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


@pytest.mark.parametrize("clone", [None, 124.0])
@pytest.mark.parametrize("learned", [[124.1], [-7.0, 124.6, 123.9], [float(10**6), -7.3]])
@pytest.mark.parametrize(("expert", "changes"), [(None, ""), (124.1, ""), (124.1, "town"), (300.0, "town")])
def test_labels_of_the_picture_lie_on_nothing(
    clone: float | None, learned: list[float], expert: float | None, changes: str
) -> None:
    rows = [{"iteration": n, "env_steps": 100 * n, "return_mean": x, "return_stderr": 3} for n, x in enumerate(learned)]
    result = {"expert_return": expert, "random_return": -7.3, "clone_return": clone, "changes": changes}
    figure = curve_figure(rows, result)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 2 + (expert is not None)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for box in boxes:
        assert box.x0 > axes.get_window_extent().x1
        assert box.x1 < figure.bbox.x1
        assert 0 < box.y0 < box.y1 <= axes.get_window_extent().y1
    ordered = sorted(axes.texts, key=lambda label: label.xy[1])
    heights = [label.get_window_extent().y0 for label in ordered]
    assert heights == sorted(heights), "who is better stands higher"


def test_tensorboard_shows_the_same_figures(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    write(record, [0, 1, 2])
    record.write_result({})
    record.draw()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("evaluation/return_mean")] == [0.0, 2.0, 4.0]
    assert [e.step for e in events.Scalars("training/critic_loss")] == [1, 2]


def test_a_file_that_cannot_be_written_is_named() -> None:
    record = RunRecord(Path("/dev/full"))
    with pytest.raises(OSError, match=r"log\.jsonl"):
        record.log_iteration(1, {})


def test_errors_keep_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"result\.json") as error:
        RunRecord(tmp_path).write_result({})
    assert error.value.errno == errno.ENOSPC
