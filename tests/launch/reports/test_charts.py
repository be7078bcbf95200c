"""Where the marks of a chart lie."""

from __future__ import annotations

import re

import pytest

from bm3il.launch.reports.charts import Line, Moment, Reference, chart, clock, number, stacked, timeline, told


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def test_a_line_goes_through_its_points_from_left_to_right() -> None:
    (plot,) = chart("", [Line("a", [0, 10, 20], [1.0, 3.0, 2.0])], "x").plots.values()
    (mark,) = plot.marks
    (x0, y0), (x1, y1), (x2, y2) = points(mark.path)
    assert (x0, x2) == (plot.left, plot.right)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0 < plot.bottom, "up is where values are high"
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert [text for _, _, text in mark.dots] == ["a: 1.000 at 0", "a: 3.000 at 10", "a: 2.000 at 20"]


def test_where_nothing_is_known_a_line_is_broken() -> None:
    (plot,) = chart("", [Line("a", [0, 1, 2, 3], [1.0, None, 2.0, 3.0])], "x").plots.values()
    assert plot.marks[0].path.count("M") == 2


def test_many_points_are_drawn_as_their_means_within_their_ends() -> None:
    y = [float(i % 2) for i in range(10_000)]
    (plot,) = chart("", [Line("a", list(range(10_000)), y)], "x", fixed=(0.0, 1.0)).plots.values()
    (mark,) = plot.marks
    assert len(points(mark.path)) == 240
    heights = {y for _, y in points(mark.band)}
    middle = {y for _, y in points(mark.path)}
    assert max(heights) == plot.bottom
    assert min(heights) < min(middle) <= max(middle) < max(heights)


def test_what_is_compared_with_is_inside_the_chart() -> None:
    drawn = chart(
        "", [Line("a", [0, 1], [1.0, 2.0])], "x", references=[Reference("expert", 100.0, "expert")], wide=True
    )
    for plot in drawn.plots.values():
        ((_, y),) = plot.references
        assert 0 < y < plot.marks[0].dots[0][1]
    assert set(drawn.plots) == {"narrow", "wide"}


def test_areas_lie_on_each_other() -> None:
    parts = [Line("a", [1, 2], [1.0, 3.0], style=4), Line("b", [1, 2], [2.0, 1.0], style=2)]
    plot = stacked("", parts, "x", "y").plots["wide"]
    first, second = (points(mark.band) for mark in plot.marks)
    assert [mark.style for mark in plot.marks] == [4, 2]
    assert first[2:] != first[:2]
    assert second[2:] == first[1::-1], "the second begins where the first ends"
    assert {y for _, y in first[2:]} == {next(t.at for t in plot.y_ticks if t.label == "0")}


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [None, None], [-1e90, 1e90], [1e-30, 2e-30]])
def test_every_range_has_an_axis(values: list[float | None]) -> None:
    (plot,) = chart("", [Line("a", list(range(len(values))), values)], "x").plots.values()
    text = f"{plot}"
    assert "nan" not in text
    assert "inf" not in text


def test_a_span_lasts_and_a_moment_does_not() -> None:
    moments = [Moment("a", 0, "life", "start"), Moment("b", 60, "trouble", "dead", 90), Moment("c", 120, "fault", "")]
    shown = timeline(moments, ["a", "b"], wide=True)
    assert [name for name, _ in shown.lanes] == ["a", "b"]
    assert [moment.text for _, _, moment in shown.points] == ["start"]
    ((x, _, width, _),) = shown.spans
    assert (x - shown.left) / 2 == pytest.approx(width, abs=0.1), "half as long as what was before"
    assert [tick.label for tick in shown.ticks][:3] == ["0:00", "0:20", "0:40"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (-7.254, "−7.254"),
        (132.125, "132.1"),
        (240_000.0, "240,000"),
        (0.008512, "0.008512"),
        (3e-7, "3.000e−7"),
    ],
)
def test_numbers_are_told_with_four_digits(value: float | None, text: str) -> None:
    assert told(value) == text


def test_what_is_no_number_is_none() -> None:
    assert number("3.5") == 3.5
    assert [number(value) for value in ("", "x", None, True, [1], "inf", 10**999)] == [None] * 7


def test_long_times_are_told_in_hours() -> None:
    assert [clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1 h 02"]
