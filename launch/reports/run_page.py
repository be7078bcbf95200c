"""What the page of a run shows, from its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bm3il.launch.config import Config, load_preset
from bm3il.launch.locks import is_running
from bm3il.launch.reports.charts import Chart, Line, Reference, Timeline, chart, decimals, number
from bm3il.launch.reports.history import Entry, listed, timelines
from bm3il.launch.reports.log_charts import Group, Stage, groups, stages
from bm3il.launch.reports.recorded import Columns, read_all_events, read_curve, read_log
from bm3il.launch.reports.seen import Seen, look_at
from bm3il.launch.result import present_result
from bm3il.launch.run_folder import read_config
from bm3il.launch.status import ROUTINE
from bm3il.launch.studies.compared import UNREWARDED
from bm3il.protocol.errors import InputError

MOST_TYPES = 12
NAMING = ("preset", "run", "runs_folder", "files")
"""Settings that differ with every run."""
CHOSEN = ("environment", "demonstrations", "algorithm", "mode", "nodes", "threads", "device")
"""Settings that decide what others are, if these are left to themselves."""


@dataclass(frozen=True)
class Compared:
    """True returns per agent and episode of some agents, beside random and expert; None where it is not known."""

    name: str
    learned: float | None
    stderr: float | None
    random: float | None
    clone: float | None
    expert: float | None
    normalized: float | None

    @property
    def values(self) -> tuple[float | None, ...]:
        """All returns."""
        return self.learned, self.random, self.clone, self.expert

    @property
    def place(self) -> float | None:
        """Of the learned one between random, 0, and expert, 1; held to −0.2 … 1.2."""
        return None if self.normalized is None else min(1.2, max(-0.2, self.normalized))


@dataclass(frozen=True)
class Setting:
    """A key of the configuration; `preset` is the value that it has there, if it was given another."""

    key: str
    value: str
    preset: str | None


@dataclass(frozen=True)
class RunPage:
    """All of a page. Lists that are empty, and what is None, are left out of it."""

    name: str
    state: str
    what: str
    command: str
    facts: list[tuple[str, str]]
    error: str
    returns: list[Compared]
    curve: Chart | None
    of_types: list[Chart]
    types_left_out: int
    evaluations: Columns
    type_names: list[str]
    stages: Chart | None
    stage_rows: list[Stage]
    groups: list[Group]
    timelines: dict[str, Timeline]
    events: list[Entry]
    routine: int
    settings: list[Setting]
    seen: Seen
    notes: list[str]

    @property
    def changed(self) -> list[Setting]:
        """Settings that are not the preset's."""
        return [setting for setting in self.settings if setting.preset is not None]

    @property
    def decimals(self) -> int:
        """Of returns."""
        return decimals(value for row in self.returns for value in row.values)

    @property
    def has_clone(self) -> bool:
        """Whether returns of a clone are known."""
        return any(row.clone is not None for row in self.returns)


def run_page(folder: Path) -> RunPage:
    """Read a run's folder, and let its newest policy play what pictures show. Raises InputError if this is no run."""
    config = read_config(folder)
    evaluations, log, result = read_curve(folder), read_log(folder), present_result(folder, config)
    events, damaged = read_all_events(folder)
    counted = {"log.jsonl": log.damaged, "curve.csv": evaluations.damaged, "events.jsonl": damaged}
    notes = [f"{lines} damaged line{'s' * (lines > 1)} of {name} left out" for name, lines in counted.items() if lines]
    start = next((event for event in reversed(events) if event.what == "start"), None)
    types = _types(result, evaluations)
    shown = _shown(types, evaluations)
    settings, compared = _settings(config)
    seen = look_at(folder, config)
    areas, stage_rows = stages(log)
    return RunPage(
        name=folder.resolve().name,
        state=_state(folder, result),
        what=f"{config.algorithm} on {config.environment}",
        command="" if start is None else str(start.facts.get("command", "")),
        facts=_facts(config, result, log),
        error=str(result.get("error") or ""),
        returns=_returns(result, types, evaluations),
        curve=_curve(evaluations, "", result, "True return of all agents") if evaluations.rows else None,
        of_types=[_curve(evaluations, f".{name}", types[name], name) for name in shown],
        types_left_out=len(types) - len(shown),
        evaluations=evaluations,
        type_names=list(types) if len(types) <= MOST_TYPES else [],
        stages=areas,
        stage_rows=stage_rows,
        groups=list(groups(log)),
        timelines=timelines(events),
        events=listed(events),
        routine=sum(event.what in ROUTINE for event in events),
        settings=settings,
        seen=seen,
        notes=[*notes, *compared, *seen.notes, *_doubts(evaluations, result)],
    )


def _state(folder: Path, result: Mapping[str, Any]) -> str:
    return "running" if is_running(folder) else str(result.get("status", "killed"))


def _facts(config: Config, result: Mapping[str, Any], log: Columns) -> list[tuple[str, str]]:
    """What, by what and where, and how long it took."""
    last = log.rows[-1] if log.rows else {}
    seconds, steps = (number(result.get(name)) or last.get(name) for name in ("wall_seconds", "env_steps"))
    iterations = number(result.get("iterations")) or last.get("iteration")
    processes = f"{config.actors} actor{'s' * (config.actors > 1)}" + f" on {config.nodes} nodes" * (config.nodes > 1)
    found = {
        "Seed": str(config.seed),
        "Mode": config.mode if config.mode == "serial" else f"{config.mode}, {processes}",
        "Preset": config.preset,
        "Demonstrations": Path(config.demonstrations).name,
        "Iterations": "" if iterations is None else f"{iterations:,.0f}",
        "Steps": f"{steps:,.0f} of {config.steps:,}" if steps else "",
        "Training": "" if seconds is None else _lasted(seconds),
        "Started, UTC": _readable(result.get("started")),
        "Ended, UTC": _readable(result.get("ended")),
        "Host": result.get("host"),
        "bm3il": result.get("version"),
        "Commit": result.get("commit"),
        "PyTorch": result.get("torch"),
        "Python": result.get("python"),
        "Policy": result.get("policy_sha256"),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _lasted(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _readable(when: object) -> str:
    try:
        return datetime.fromisoformat(str(when).replace("Z", "+00:00")).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return ""


def _types(result: Mapping[str, Any], evaluations: Columns) -> dict[str, Mapping[str, Any]]:
    """What the result tells of each type; {} for each if only the curve has them."""
    if isinstance(told := result.get("types"), dict) and told:
        return {str(name): values for name, values in told.items() if isinstance(values, dict)}
    prefix = "return_mean."
    return {name.removeprefix(prefix): {} for name in evaluations.names if name.startswith(prefix)}


def _doubts(evaluations: Columns, result: Mapping[str, Any]) -> list[str]:
    """What keeps returns from saying what they seem to say."""
    doubts = [UNREWARDED] if _is_unrewarded(evaluations, result) else []
    if (world := result.get("changes")) and result.get("expert_return") is not None:
        doubts.append(f"the expert's returns are as demonstrated, in '{world}': in this world they may be out of reach")
    return doubts


def _is_unrewarded(evaluations: Columns, result: Mapping[str, Any]) -> bool:
    """Whether everybody's returns are 0, the expert's, too."""
    returns = evaluations["return_mean"]
    return bool(returns) and not any(returns) and not any(map(result.get, ("random_return", "expert_return")))


def _shown(types: Mapping[str, Any], evaluations: Columns) -> list[str]:
    """The types that are drawn: all, or of many those that are nearest to the expert and those farthest from him."""
    if len(types) <= MOST_TYPES:
        return list(types)
    last = evaluations.rows[-1] if evaluations.rows else {}
    order = sorted(types, key=lambda name: last.get(f"normalized_return.{name}") or 0.0)
    return [*order[: MOST_TYPES // 2], *order[-MOST_TYPES // 2 :]]


def _returns(result: Mapping[str, Any], types: Mapping[str, Any], evaluations: Columns) -> list[Compared]:
    """Of all agents and of each type: of the final policy, else of the last that was evaluated."""
    last = evaluations.rows[-1] if evaluations.rows else {}

    def compared(name: str, told: Mapping[str, Any], suffix: str) -> Compared:
        keys = ("return_mean", "return_stderr", "normalized_return")
        from_result = number(told.get("return_mean")) is not None
        learned, stderr, normalized = (number(told.get(k)) if from_result else last.get(k + suffix) for k in keys)
        random, clone, expert = (number(told.get(f"{who}_return")) for who in ("random", "clone", "expert"))
        return Compared(name, learned, stderr, random, clone, expert, normalized)

    rows = [compared("all", result, ""), *(compared(name, told, f".{name}") for name, told in types.items())]
    return [row for row in rows if row.learned is not None] if rows[0].learned is not None else []


def _curve(evaluations: Columns, suffix: str, told: Mapping[str, Any], title: str) -> Chart:
    """Returns over steps (iterations, where nothing is played), with a band of one standard error."""
    played = any(evaluations["env_steps"])
    x = evaluations.all_of("env_steps" if played else "iteration")
    means, errors = evaluations[f"return_mean{suffix}"], evaluations[f"return_stderr{suffix}"]
    low, high = (
        [None if m is None or e is None else m + sign * e for m, e in zip(means, errors, strict=True)]
        for sign in (-1, 1)
    )
    known = any(value is not None for value in low)
    line = Line("learned", x, means, low if known else None, high if known else None)
    references = [
        Reference(name, value, name)
        for name in ("expert", "clone", "random")
        if (value := number(told.get(f"{name}_return"))) is not None
    ]
    unit = "joint environment steps" if played else "iterations"
    return chart(title, [line], unit, "per agent and episode", references, wide=not suffix)


def _settings(config: Config) -> tuple[list[Setting], list[str]]:
    """All settings, and what the preset has where they differ from it by choice; notes."""
    notes = []
    try:
        preset = load_preset(config.preset)
    except InputError as error:
        preset, notes = Config(), [f"settings are compared with the defaults, since the preset is gone: {error}"]
    filled_in = preset
    with contextlib.suppress(InputError):  # as of another release
        filled_in = replace(preset, **{name: getattr(config, name) for name in CHOSEN}).checked()
    now, given, forced = (_flat(asdict(some)) for some in (config, preset, filled_in))
    differ = {
        key
        for key, value in now.items()
        if key not in NAMING and value != given[key] and (key in CHOSEN or value != forced[key])
    }
    return [Setting(key, value, given[key] if key in differ else None) for key, value in now.items()], notes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "files":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _written(value)
    return flat


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
