"""What people see of a run: a live table in a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bm3il.launch.topology import Plan
from bm3il.protocol.messages import Status
from bm3il.protocol.telemetry import OF_TYPE

PLAIN_LINE_SECONDS = 5.0
LIVE_UPDATES_PER_SECOND = 4.0
NORMALIZED, MOST_TYPES_SHOWN = "normalized_return", 8
STAGES = ("collect", "observe", "query", "update", "publish", "checkpoint")


class Progress:
    """Shows the learner's status as it changes. Times are wall seconds, returns per agent and episode."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_line = 0.0
        self._last_worries: list[str] = []

    def plan(self, plan: Plan) -> None:
        """Print which process runs where."""
        self.note(plan.run_folder)
        for line in plan.lines():
            self.note(line)

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False)

    def show(self, learner: Status | None, worries: Sequence[str] = ()) -> None:
        """The newest status of the learner, and what is wrong with others."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=LIVE_UPDATES_PER_SECOND)
                self._live.start()
            self._live.update(_table(learner, worries))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.note(_line(learner))
            for worry in worries:
                self.note(f"  {worry}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, folder: Path, result: Mapping[str, Any]) -> None:
        """How the run ended."""
        self.close()
        returns = [
            f"{_whose(name, result.get('changes'))} {result[key]:.1f}"
            for name, key in (
                ("random", "random_return"),
                ("clone", "clone_return"),
                ("learned", "return_mean"),
                ("expert", "expert_return"),
            )
            if result.get(key) is not None
        ]
        if result.get("normalized_return") is not None:
            returns.append(f"normalised {result['normalized_return']:.3f}")
        words, seconds = [result["status"]], result.get("wall_seconds")  # unknown if the learner had no time to tell it
        if seconds is not None:
            words.append(f"after {duration(seconds)}")
        if result.get("iterations") is not None:
            words.append(f"at iteration {result['iterations']:,}")
        if result.get("env_steps") and result.get("steps"):
            words.append(f"with {result['env_steps']:,} steps played, of {result['steps']:,}")
        self.note(" ".join(words))
        if _all_zero(result):
            self.note(
                "no reward but 0 was seen: what the policy does tells how good it is, returns do not (docs/faq.md)"
            )
        elif returns:
            self.note("return per agent and episode: " + ", ".join(returns))
        if result.get("types") and not _all_zero(result):
            self.note(f"normalised, of types: {_of_types(result['types'])}")
        if result["status"] == "finished" and result.get("return_mean") is None:
            self.note(f"the final policy was not evaluated; `bm3il evaluate {folder}` does it")
        for name in ("curve.png", "result.json"):
            if (folder / name).exists():
                self.note(str(folder / name))
        if (folder / "log.jsonl").exists():
            self.note(f"`bm3il report {folder}` makes a page of it")
        if result.get("resume"):
            self.note(f"go on with: {result['resume']}")


def _table(learner: Status | None, worries: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(learner):
        # `Text`: what a process says of itself may look like markup, which once ended the run.
        table.add_row(Text(name, "dim"), Text(value))
    for worry in worries:
        table.add_row(Text("waiting", "yellow"), Text(worry))
    return table


def _line(learner: Status | None) -> str:
    return "  ".join(f"{name} {value}" for name, value in _rows(learner))


def _rows(learner: Status | None) -> list[tuple[str, str]]:
    """Names and values of what is known so far."""
    if learner is None:
        return [("stage", "starting the processes")]
    values = learner.values
    if {"cloning_iteration", "cloning_iterations"} <= values.keys():  # they come and go one by one
        rows = [("cloning", f"{values['cloning_iteration']:.0f}/{values['cloning_iterations']:.0f}")]
        still = values.get("cloning_left_seconds")
        return rows if still is None else [*rows, ("left", duration(still))]
    if learner.stage in ("final_evaluation", "wait_for_evaluation") and "evaluated_episodes" in values:
        played, wanted = values["evaluated_episodes"], values.get("episodes_to_evaluate", 0.0)
        return [("final evaluation", f"{played:,.0f}/{wanted:,.0f} episodes")]
    if "iteration" not in values:
        return [("stage", f"{learner.stage} ({values.get('stage_seconds', 0.0):.0f} s)")]
    rows = [("iteration", f"{values['iteration']:.0f}/{values.get('iterations', 0):.0f}")]
    if values.get("steps"):
        rows.append(("env steps", f"{values.get('env_steps', 0):,.0f}/{values['steps']:,.0f}"))
    rows.append(("return", _return(values)))
    if of_types := {n.removeprefix(OF_TYPE): {NORMALIZED: v} for n, v in values.items() if n.startswith(OF_TYPE)}:
        rows.append(("of types", _of_types(of_types)))
    if "held_out_loss" in values:
        rows.append(("held-out loss", f"{values['held_out_loss']:.3f}"))
    if {"accuracy_agent", "accuracy_expert"} <= values.keys():
        apart = (values["accuracy_agent"] + values["accuracy_expert"]) / 2
        rows.append(("told apart", f"{apart:.0%} (50%: alike)"))
    if values.get("steps"):  # cloning plays none, so that nobody can lag behind
        rows.append(("policy lag", f"{values.get('policy_lag', 0.0):.1f}"))
        rows.append(("steps/s", f"{values.get('steps_per_second', 0.0):,.0f}"))
    stages = [f"{s} {1000 * values[f'seconds_{s}']:.0f}" for s in STAGES if f"seconds_{s}" in values]
    rows.append(("stages, ms", " ".join(stages)))
    if (left := _seconds_left(values)) is not None:
        rows.append(("left", duration(left)))
    return rows


def _all_zero(values: Mapping[str, Any]) -> bool:
    """Whether neither the policy nor random actions were ever paid: returns then tell nothing."""
    return values.get("return_mean") == values.get("random_return") == 0


def _return(values: Mapping[str, float]) -> str:
    if _all_zero(values):
        return "unknown (no reward but 0 was seen)"
    text = f"{values['return_mean']:.1f}" if "return_mean" in values else "–"
    evaluated = values.get("evaluated_iteration")
    bounds = [] if evaluated in (None, values["iteration"]) else [f"of iteration {evaluated:.0f}"]
    bounds += [
        f"{_whose(name, values.get('changed_world'))} {values[f'{name}_return']:.1f}"
        for name in ("random", "clone", "expert")
        if f"{name}_return" in values
    ]
    if {"return_mean", "random_return", "expert_return"} <= set(values):
        span = values["expert_return"] - values["random_return"]
        if span:
            bounds.append(f"normalised {(values['return_mean'] - values['random_return']) / span:.3f}")
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _whose(who: str, changed: object) -> str:
    """In a changed world the demonstrations' expert may be out of reach."""
    return "expert as demonstrated" if who == "expert" and changed else who


def _of_types(types: Mapping[str, Mapping[str, float | None]]) -> str:
    """Normalised returns of types; of many, the lowest and the highest."""
    known = {name: value for name, told in types.items() if (value := told[NORMALIZED]) is not None}
    if len(known) > MOST_TYPES_SHOWN:
        known = {name: known[name] for name in (min(known, key=known.__getitem__), max(known, key=known.__getitem__))}
        return " to ".join(f"{value:.3f} ({name})" for name, value in known.items())
    return ", ".join(f"{name} {value:.3f}" for name, value in known.items()) or "not known"


def _seconds_left(values: Mapping[str, float]) -> float | None:
    """If what is left goes on as all that was done: steps, or iterations of a run that plays none."""
    counted = ("env_steps", "steps") if values.get("steps") else ("iteration", "iterations")
    done, wanted = (values.get(name, 0.0) for name in counted)
    if done <= 0 or "wall_seconds" not in values:
        return None
    left = values["wall_seconds"] * (wanted - done) / done
    return max(0.0, left) if math.isfinite(left) else None  # the last iteration may play more than was left


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meanwhile:
    """Tells on standard error what is done while somebody waits: a line that changes in a terminal, elsewhere one now
    and then."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("")
        self._last_line = -math.inf

    def __enter__(self) -> Meanwhile:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def tell(self, what: str, done: int, of: int) -> None:
        """What is done now, and how far it is."""
        text = f"{what} {done:,} of {of:,}"
        if self._console.is_terminal:
            self._status.update(Text(text))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False)
