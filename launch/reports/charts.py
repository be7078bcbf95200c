"""Small charts for a page: where everything of them lies, in units of an SVG's view box. Templates make the marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

NARROW, WIDE = (360, 200), (1040, 300)
"""Width and height. Text has the same size in both: a wide one is for screens that have the room."""
TOP, RIGHT, BOTTOM, CHARACTER = 10, 12, 32, 6.4
"""Margins, and how wide a character of a label is."""
MOST_POINTS = 240
"""Of a line: more of them are drawn as their means and, behind, from the lowest to the highest of each."""
MOST_DOTS = 30
LARGEST = 1e100
"""Beyond it a number is none: widths of a chart could overflow."""
SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 4 * 3600, 8 * 3600, 86400)
LANE, LANE_TEXT = 26, 120

Points = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """What is drawn: y over x, None where it is not known; `low` and `high` are the edges of its band.

    style: which of the page's colours and dashes it has.
    """

    name: str
    x: Sequence[float]
    y: Points
    low: Points | None = None
    high: Points | None = None
    style: int = 0

    @property
    def last(self) -> float | None:
        """Of the known values."""
        return next((y for y in reversed(self.y) if y is not None), None)


@dataclass(frozen=True)
class Reference:
    """A value to compare with. style: `expert`, `clone`, `random`, or `even` for what guessing gives."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Tick:
    """On an axis, at a place in units of the view box."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A line or an area of a chart, as the `d` of SVG paths; dots have a place and what they tell."""

    style: int
    path: str
    band: str = ""
    dots: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True)
class Plot:
    """A chart of one size."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    references: list[tuple[Reference, float]]


@dataclass(frozen=True)
class Chart:
    """A chart with its title and legend, once for each size that a page may need."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    references: Sequence[Reference]
    plots: Mapping[str, Plot]

    @property
    def decimals(self) -> int:
        """Of the values in its legend."""
        return decimals([line.last for line in self.lines] + [reference.value for reference in self.references])


@dataclass(frozen=True)
class Moment:
    """Something that happened in a lane, at `x`; or that lasted until `end`."""

    lane: str
    x: float
    kind: str
    text: str
    end: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Lanes [(name, y)] with what happened: points (x, y, moment) and spans (x, y, width, moment)."""

    width: float
    height: float
    left: float
    ticks: list[Tick]
    lanes: list[tuple[str, float]]
    points: list[tuple[float, float, Moment]]
    spans: list[tuple[float, float, float, Moment]]


@dataclass(frozen=True)
class _Scale:
    """From values to the view box."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def number(value: object) -> float | None:
    """What a file says is a number, if it is one that can be drawn; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < LARGEST else None  # false for what is not finite, too


def told(value: float | None, digits: int = 4) -> str:
    """A number for people: so many significant digits, a real minus sign; `–` for none."""
    if value is None:
        return "–"
    if value and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        exponent = math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return text.replace("-", "−")


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals all of these should have alike: the largest is told with four digits."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return min(9, max(0, 3 - math.floor(math.log10(largest)))) if largest else 1


def aligned(value: float | None, places: int) -> str:
    """A number with so many decimals, to stand below others; `–` for none."""
    return "–" if value is None else f"{value:,.{places}f}".replace("-", "−")


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str = "",
    references: Sequence[Reference] = (),
    wide: bool = False,
    fixed: tuple[float, float] | None = None,
) -> Chart:
    """Lines over a common axis. wide: also in the size of the whole page. fixed: the ends of the y-axis.

    Values must be finite and within ±1e100, as `number` gives them.
    """
    sizes = {"narrow": NARROW, "wide": WIDE} if wide else {"any": NARROW}
    drawn = [_thinned(line) for line in lines]
    plots = {name: _plot(drawn, references, size, fixed) for name, size in sizes.items()}
    return Chart(title, x_label, y_label, lines, references, plots)


def stacked(title: str, parts: Sequence[Line], x_label: str, y_label: str) -> Chart:
    """Areas one upon the other, the first at the bottom. All values are known, and none is negative."""
    thinned = [_thinned(part) for part in parts]
    tops = np.cumsum([part.y for part in thinned], axis=0)
    areas = [
        replace(part, y=top.tolist(), low=(top - np.array(part.y)).tolist(), high=top.tolist())
        for part, top in zip(thinned, tops, strict=True)
    ]
    sizes = {"narrow": NARROW, "wide": WIDE}
    plots = {name: _plot(areas, (), size, None, from_zero=True) for name, size in sizes.items()}
    return Chart(title, x_label, y_label, parts, (), plots)


def timeline(moments: Sequence[Moment], lanes: Sequence[str], wide: bool) -> Timeline:
    """What happened in each lane, over the seconds since the first moment."""
    width, left = (WIDE[0], LANE_TEXT) if wide else (NARROW[0], 12)
    step = LANE if wide else LANE + 12  # a narrow one has the name above the lane
    last = max([m.x for m in moments] + [m.end for m in moments if m.end is not None], default=0.0)
    scale = _Scale(0.0, max(last, 1.0), left, width - RIGHT)
    y = {name: TOP + step * (row + 1) - LANE / 2 for row, name in enumerate(lanes)}
    apart = next((s for s in SECONDS if scale.high / s <= (10 if wide else 4)), None)
    ticks = [] if apart is None else [float(s) for s in range(0, int(scale.high) + 1, apart)]
    return Timeline(
        width,
        TOP + step * len(lanes) + BOTTOM - 10,
        left,
        [Tick(scale(second), clock(second)) for second in ticks],
        list(y.items()),
        [(scale(m.x), y[m.lane], m) for m in moments if m.end is None and m.lane in y],
        [
            (scale(m.x), y[m.lane], round(max(2.0, scale(m.end) - scale(m.x)), 1), m)
            for m in moments
            if m.end is not None and m.lane in y
        ],
    )


def clock(seconds: float) -> str:
    """Hours and minutes, and the seconds of what is shorter than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d}" if hours else f"{minutes}:{rest:02d}"


def _plot(
    lines: Sequence[Line],
    references: Sequence[Reference],
    size: tuple[int, int],
    fixed: tuple[float, float] | None,
    from_zero: bool = False,
) -> Plot:
    (width, height), bottom = size, size[1] - BOTTOM
    xs = [x for line in lines for x in line.x]
    parts = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    ys = [y for part in parts for y in part if y is not None] + [reference.value for reference in references]
    low, high = fixed or _apart(ys)
    low = 0.0 if from_zero else low
    y_values = _ticks(low, high, height // 40)
    y_labels = _labels(y_values)
    left = 14 + CHARACTER * max(map(len, y_labels), default=1)
    x_low, x_high = _apart(xs, room=0.0)
    x_scale, y_scale = _Scale(x_low, x_high, left, width - RIGHT), _Scale(low, high, bottom, TOP)
    x_values = _ticks(x_low, x_high, int((width - left) // 65), whole=True)
    return Plot(
        width,
        height,
        round(left, 1),
        width - RIGHT,
        bottom,
        [Tick(x_scale(value), label) for value, label in zip(x_values, _labels(x_values), strict=True)],
        [Tick(y_scale(value), label) for value, label in zip(y_values, y_labels, strict=True)],
        [_mark(line, x_scale, y_scale) for line in lines],
        [(reference, y_scale(reference.value)) for reference in references],
    )


def _mark(line: Line, x_scale: _Scale, y_scale: _Scale) -> Mark:
    path, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{x_scale(x)},{y_scale(y)}")
        pen = "L"
    band = ""
    if line.low is not None and line.high is not None:
        edges = [
            (x, a, b) for x, a, b in zip(line.x, line.low, line.high, strict=True) if a is not None and b is not None
        ]
        there = [f"{x_scale(x)},{y_scale(b)}" for x, _, b in edges]
        back = [f"{x_scale(x)},{y_scale(a)}" for x, a, _ in reversed(edges)]
        band = f"M{'L'.join([*there, *back])}Z" if edges else ""
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    dots = [(x_scale(x), y_scale(y), f"{line.name}: {told(y)} at {x:,.6g}") for x, y in known]
    return Mark(line.style, "".join(path), band, tuple(dots if len(dots) <= MOST_DOTS else ()))


def _thinned(line: Line) -> Line:
    """Itself, or for too many points the mean of each few, with a band from the lowest to the highest of them."""
    if len(line.x) <= MOST_POINTS or line.low is not None:
        return line
    groups = np.array_split(np.arange(len(line.x)), MOST_POINTS)
    known = [[y for i in group if (y := line.y[i]) is not None] for group in groups]

    def each(of: Callable[[Sequence[float]], float]) -> list[float | None]:
        return [float(of(values)) if values else None for values in known]

    x = [float(np.mean([line.x[i] for i in group])) for group in groups]
    return Line(line.name, x, each(lambda values: math.fsum(values) / len(values)), each(min), each(max), line.style)


def _apart(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """Ends of an axis for these values, with some room beyond them; never the same."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        span = abs(low) or 1.0
        return (low - 0.5 * span, high + 0.5 * span) if room else (low, low + span)
    return low - room * (high - low), high + room * (high - low)


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    locator = MaxNLocator(nbins=max(2, about), steps=[1, 2, 2.5, 5, 10], integer=whole)
    # + 0.0 makes 0 of −0.
    return [float(value) + 0.0 for value in locator.tick_values(low, high) if low <= value <= high]


def _labels(values: Sequence[float]) -> list[str]:
    """All with as many decimals as one of them needs."""
    largest = max(map(abs, values), default=0.0)
    if largest >= 10_000:
        form = EngFormatter(sep="")
        return [form(value) for value in values]
    # A tick at 0 may come as 1e-17.
    texts = [f"{0.0 if abs(value) < 1e-9 * largest else value:.6g}" for value in values]
    if not any("e" in text for text in texts):
        decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
        texts = [f"{float(text):,.{decimals}f}" for text in texts]
    return [text.replace("-", "−") for text in texts]
