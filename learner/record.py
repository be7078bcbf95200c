"""The record of a run: curve, log, TensorBoard events, result and picture, in the run's folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from bm3il.actors.evaluation import ReturnEstimate
from bm3il.learner.figures import merged
from bm3il.learner.picture import draw_curve
from bm3il.protocol.files import naming, write_whole

COLUMNS = ("iteration", "env_steps", "wall_seconds", "return_mean", "return_stderr", "normalized_return", "episodes")

OF_TYPES = ("return_mean", "return_stderr", "normalized_return")
"""Of each type beside those of all agents."""


@dataclass(frozen=True)
class Forgotten:
    """What of a record comes again: whether the restored iteration was evaluated, how many iterations after it were
    logged, and the training's seconds until the last of them, which are not forgotten.

    everything: no evaluation is left, not even that of the start.
    """

    evaluated: bool
    everything: bool
    iterations: int
    wall_seconds: float


class RunRecord:
    """Writes what can be looked at. Every file survives a resume: rows of iterations that will come again are cut.

    Returns are true returns per agent and episode.
    Raises OSError, naming the file, when the disk is full or not writable.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._curve = run_folder / "curve.csv"
        self._log = run_folder / "log.jsonl"
        self._events: SummaryWriter | None = None
        self._purge_step: int | None = None

    def log_iteration(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Append the figures of an iteration to `log.jsonl`, and to the TensorBoard events."""
        line = {name: _plain(value) for name, value in merged({"iteration": iteration}, figures).items()}
        _append(self._log, json.dumps(line) + "\n")
        self._add_scalars("training", iteration, figures)

    def add_evaluation(
        self,
        iteration: int,
        env_steps: int,
        wall_seconds: float,
        estimate: ReturnEstimate,
        normalized_return: float | None,
        types: Mapping[str, Mapping[str, float | None]],
        figures: Mapping[str, float],
    ) -> None:
        """Add a row to `curve.csv`, in the order of iterations: the fixed columns, of each type `return_mean.TYPE` and
        the like, and the figures; the first row's name the columns."""
        stderr, normalized = ("" if value is None else value for value in (estimate.stderr, normalized_return))
        fixed = (iteration, env_steps, round(wall_seconds, 3), estimate.mean, stderr, normalized)
        of_types = {f"{key}.{name}": told[key] for name, told in types.items() for key in OF_TYPES}
        told = {name: "" if value is None else value for name, value in of_types.items()}
        row: dict[str, Any] = dict(zip(COLUMNS, (*fixed, estimate.episodes), strict=True)) | told | dict(figures)
        rows = self._rows()
        names = list(rows[0]) if rows else list(row)
        # Figures may come later than the first row, as those of updates do: then the header is written anew.
        is_next = not rows or int(rows[-1]["iteration"]) < iteration
        if is_next and set(row) <= set(names):
            _append(self._curve, _csv(names, [row], header=not rows))
        else:
            names += [name for name in row if name not in names]
            # The first policy may be evaluated after a later one that overtook it.
            ordered = sorted([*rows, row], key=lambda each: int(each["iteration"]))
            write_whole(self._curve, _csv(names, ordered, header=True))
        means = {"return_mean": estimate.mean, "return_stderr": estimate.stderr, **of_types}
        known = {name.replace(".", "/"): value for name, value in means.items() if value is not None}
        self._add_scalars("evaluation", iteration, known)

    def go_on_from(self, iteration: int) -> Forgotten:
        """Forget what comes again after `iteration` was restored: its evaluation, and everything of later ones."""
        rows = self._rows()
        evaluated = any(int(row["iteration"]) == iteration for row in rows)
        kept = [row for row in rows if int(row["iteration"]) < iteration]
        if rows:
            write_whole(self._curve, _csv(list(rows[0]), kept, header=bool(kept)))
        iterations, wall_seconds = 0, 0.0
        if self._log.exists():
            logged = [(_logged(line), line) for line in self._log.read_text(encoding="utf-8").splitlines()]
            # A line that a crash cut short has no iteration: it goes, and is not counted.
            lines = [line for told, line in logged if told.get("iteration", math.inf) <= iteration]
            write_whole(self._log, "".join(f"{line}\n" for line in lines))
            iterations = sum(told.get("iteration", -1) > iteration for told, _ in logged)
            wall_seconds = max((told.get("wall_seconds", 0.0) for told, _ in logged), default=0.0)
        if self._events is not None:
            self._events.close()
        # TensorBoard then hides what older event files say of these iterations, which are done again.
        self._events, self._purge_step = None, iteration + 1
        return Forgotten(evaluated, not kept, iterations, wall_seconds)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, whole or not at all."""
        plain = {name: _plain(value) for name, value in result.items()}
        write_whole(self._folder / "result.json", json.dumps(plain, indent=1) + "\n")

    def draw(self) -> Path:
        """Draw `curve.png` from `curve.csv` and `result.json`; returns its path."""
        path = self._folder / "curve.png"
        result = json.loads((self._folder / "result.json").read_text(encoding="utf-8"))
        draw_curve(self._rows(), result, path)
        if self._events is not None:
            self._events.flush()
        return path

    def returns(self) -> dict[int, float]:
        """The mean returns of the curve, by iteration."""
        return {int(row["iteration"]): float(row["return_mean"]) for row in self._rows()}

    def _rows(self) -> list[dict[str, str]]:
        if not self._curve.exists():
            return []
        with self._curve.open(newline="", encoding="utf-8") as file:
            # A row cut short by a crash has no value in its last columns.
            return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]

    def _add_scalars(self, group: str, iteration: int, figures: Mapping[str, float]) -> None:
        if self._events is None:
            self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._purge_step)
        for name, value in figures.items():
            self._events.add_scalar(f"{group}/{name}", value, iteration)


def _logged(line: str) -> dict[str, float]:
    """The numbers of a line of the log; none of one that was cut short by a crash."""
    try:
        return {name: value for name, value in json.loads(line).items() if isinstance(value, int | float)}
    except (ValueError, AttributeError):
        return {}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no such number."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(names: list[str], rows: list[dict[str, Any]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    with naming(path), path.open("a", newline="", encoding="utf-8") as file:
        file.write(text)
