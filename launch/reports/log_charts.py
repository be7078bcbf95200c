"""Charts of a run's log: where the time of its iterations went, and the figures of its updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bm3il.launch.reports.charts import Chart, Line, Reference, chart, stacked
from bm3il.launch.reports.recorded import CLOCK, SECONDS_OF, Columns

STYLES = {
    **{"update": 0, "collect": 1, "observe": 2, "query": 3, "publish": 4, "checkpoint": 5},
    **{"wait_for_chunks": 8, "wait_for_particles": 9, "wait_for_rewards": 10},
}
OTHER_STYLE = 6
"""Of the page: stages in which the learner works are coloured, its waits for others are grey."""
GUESSING = Reference("guessing", math.log(2), "even")


@dataclass(frozen=True)
class Figure:
    """A chart of some columns of the log, by what they are called there."""

    title: str
    unit: str
    columns: Mapping[str, str]
    references: tuple[Reference, ...] = ()
    fixed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """Charts that belong together."""

    title: str
    text: str
    charts: Sequence[Chart]


GROUPS = (
    (
        "Discriminators",
        "Half of what they see is the agents’ and half the expert’s. As long as they tell them apart something is left "
        "to imitate; where all is guessed, at one half, agents and expert look alike.",
        (
            Figure(
                "Accuracy",
                "part of rows recognised",
                {"accuracy_agent": "agents", "accuracy_expert": "expert"},
                (replace(GUESSING, value=0.5),),
                (0.0, 1.0),
            ),
            Figure("Loss", "nats per row and agent", {"discriminator_loss": "loss"}, (GUESSING,)),
            Figure("Entropy", "nats per row and agent", {"discriminator_entropy": "entropy"}, (GUESSING,)),
        ),
    ),
    (
        "Particles",
        "How far the particles of a discriminator are from each other: particles that agree in everything are one.",
        (
            Figure("Distance", "Euclidean, of the parameters", {"particle_distance": "mean over pairs"}),
            Figure("Deviation", "of the reward, over particles", {"particle_deviation": "mean over rows"}),
            Figure("Repulsion", "part of the attraction", {"repulsion_ratio": "mean over groups"}),
        ),
    ),
    (
        "Policies and critics",
        "Means over the updates of an iteration.",
        (
            Figure("Policy entropy", "nats per agent", {"policy_entropy": "entropy"}),
            Figure("Temperature", "weight of the entropy", {"temperature": "temperature"}),
            Figure("Critic loss", "", {"critic_loss": "loss"}),
            Figure("Policy loss", "", {"policy_loss": "loss"}),
            Figure("Reward", "per agent and step", {"reward": "as learned from"}),
            Figure("Value", "what critics are to answer", {"value": "mean"}),
        ),
    ),
    (
        "Cloning",
        "Sums over networks of the mean −log π of what the expert did.",
        (
            Figure(
                "Loss",
                "nats",
                {"cloning_loss": "episodes learned from", "held_out_loss": "episodes held out"},
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Stage:
    """What the learner spent in a stage, in seconds: in all, as a part of all stages, per iteration, at most."""

    name: str
    style: int
    total: float
    part: float
    mean: float
    most: float


def stages(log: Columns) -> tuple[Chart | None, list[Stage]]:
    """The seconds of each stage per iteration, those that took longest first; None, [] of a log that does not tell."""
    names = [name for name in log.names if name.startswith(SECONDS_OF)]
    if not names:
        return None, []
    x = log.all_of("iteration")
    # The log may hold anything, and areas can only be stacked if none is negative.
    spent = {name.removeprefix(SECONDS_OF): [max(0.0, value) for value in log.all_of(name)] for name in names}
    whole = max(sum(map(sum, spent.values())), 1e-9)
    rows = [
        Stage(name, STYLES.get(name, OTHER_STYLE), sum(of), sum(of) / whole, sum(of) / len(of), max(of))
        for name, of in sorted(spent.items(), key=lambda part: -sum(part[1]))
    ]
    parts = [Line(row.name, x, spent[row.name], style=row.style) for row in rows]
    return stacked("Time of an iteration", parts, "iteration", "seconds"), rows


def groups(log: Columns) -> Iterator[Group]:
    """The figures that we know, in their groups, and then those that we do not."""
    x = log.all_of("iteration")
    for title, text, figures in GROUPS:
        drawn = [_drawn(figure, log, x) for figure in figures if set(figure.columns) & set(log.names)]
        if drawn:
            yield Group(title, text, drawn)
    known = {*CLOCK, *(column for _, _, figures in GROUPS for figure in figures for column in figure.columns)}
    others = [name for name in log.names if name not in known and not name.startswith(SECONDS_OF)]
    if others:
        charts = [chart(name, [Line(name, x, log[name])], "iteration") for name in others]
        yield Group("Other figures", "As the log has them.", charts)


def _drawn(figure: Figure, log: Columns, x: Sequence[float]) -> Chart:
    there = [column for column in figure.columns if column in log.names]
    lines = [Line(figure.columns[name], x, log[name], style=style) for style, name in enumerate(there)]
    return chart(figure.title, lines, "iteration", figure.unit, figure.references, fixed=figure.fixed)
