"""Interquartile means, stratified intervals and probabilities of improvement, by hand and beside rliable."""

from __future__ import annotations

import numpy as np
import pytest

from bm3il.launch.studies.statistics import (
    area_under,
    first_at,
    improvement,
    improvement_interval,
    interquartile_mean,
    interquartile_mean_interval,
    mean_of_tasks,
    mean_of_tasks_interval,
    on_common_steps,
)


def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side() -> None:
    assert interquartile_mean(np.array([7.0, 0, 1, 2, 3, 4, 5, 6])) == 3.5
    assert interquartile_mean(np.array([100.0, 3, 2, 1, -50])) == 2
    assert interquartile_mean(np.array([1.0, 2, 6])) == 3  # there is no whole quarter
    np.testing.assert_array_equal(interquartile_mean(np.array([[9.0, 1], [0, 1], [2, 1], [4, 5]])), [3, 1])


def test_an_interval_is_of_what_is_drawn_again() -> None:
    """Of two runs, 0 and 1, the mean is 0 or 1 in a quarter of all draws each."""
    low, high = interquartile_mean_interval([np.array([0.0, 1])])
    assert (low, high) == (0, 1)
    assert interquartile_mean_interval([np.array([0.0, 1])]) == (low, high)
    # Of 20 runs, half of them 0: binomial, between the 2.5 % and the 97.5 % quantile of the mean of ten ordered ones.
    low, high = interquartile_mean_interval([np.repeat([0.0, 1], 10)])
    assert (low, high) == (pytest.approx(0.1, abs=0.11), pytest.approx(0.9, abs=0.11))


def test_tasks_are_drawn_from_one_by_one() -> None:
    """Runs of a task are alike, so nothing varies; drawn together, there would be more of one task or of the other."""
    strata = [np.array([0.0, 0, 0]), np.array([10.0, 10])]
    low, high = interquartile_mean_interval(strata)
    assert low == high == interquartile_mean(np.concatenate(strata))


def test_no_task_is_an_outlier_in_the_mean_of_tasks() -> None:
    strata = [np.zeros(4), np.zeros(4), np.array([9.0, 9, 9, 99])]
    assert mean_of_tasks(strata) == 3
    low, high = mean_of_tasks_interval(strata)
    assert low == 3 < high
    assert interquartile_mean(np.concatenate(strata)) == 1.5
    assert np.isnan(mean_of_tasks_interval([np.zeros(1)])).all()


def test_of_single_runs_nothing_is_known_of_how_they_differ() -> None:
    single = [np.array([1.0]), np.array([2.0])]
    assert np.isnan(interquartile_mean_interval(single)).all()
    assert np.isnan(improvement_interval(single, single)).all()
    assert np.shape(interquartile_mean_interval([np.ones((1, 5))])) == (2, 5)


def test_the_probability_of_improvement_counts_pairs() -> None:
    ours, theirs = np.array([1.0, 3]), np.array([2.0, 3])
    assert improvement([ours], [theirs]) == 1.5 / 4  # 3 beats 2, and 3 is equal to 3
    assert improvement([ours, np.array([5.0])], [theirs, np.array([4.0])]) == (1.5 / 4 + 1) / 2
    assert improvement_interval([ours + 9], [theirs]) == (1, 1)
    low, high = improvement_interval([ours], [theirs])
    assert (low, high) == (0, 1)


def test_a_curve_has_a_height_and_reaches_levels() -> None:
    steps, scores = np.array([0.0, 10, 20]), np.array([0.0, 1, 1])
    assert area_under(steps, scores) == 0.75
    assert np.isnan(area_under(steps[:1], scores[:1]))
    assert np.isnan(area_under(np.zeros(3), scores))
    assert first_at(steps, scores, 0.5) == 10
    assert np.isnan(first_at(steps, scores, 1.5))


def test_curves_meet_on_steps_that_all_cover() -> None:
    steps, scores = on_common_steps(
        [(np.array([0.0, 10, 20]), np.array([0.0, 1, 2])), (np.array([5.0, 15, 30]), np.array([0.0, 4, 4]))]
    )
    np.testing.assert_array_equal(steps, [5, 10, 15, 20])
    np.testing.assert_allclose(scores, [[0.5, 1, 1.5, 2], [0, 2, 4, 4]])


def test_figures_are_those_of_rliable() -> None:
    """The numbers are what rliable 1.2.0 tells of these scores, with 50,000 draws, of pairs with 10,000."""
    ours = np.array([[0.62, 0.35, 0.91], [0.71, 0.28, 0.85], [0.44, 0.52, 0.97], [0.58, 0.41, 0.66], [0.8, 0.3, 0.74]])
    theirs = np.array([[0.55, 0.39, 0.8], [0.6, 0.2, 0.88], [0.47, 0.33, 0.7], [0.66, 0.45, 0.79]])
    assert interquartile_mean(ours.ravel()) == pytest.approx(0.60888889)
    assert interquartile_mean(theirs.ravel()) == pytest.approx(0.57166667)
    np.testing.assert_allclose(interquartile_mean_interval(ours.T), [0.54, 0.68111111], atol=0.004)
    np.testing.assert_allclose(interquartile_mean_interval(theirs.T), [0.52166667, 0.62166667], atol=0.004)
    assert improvement(ours.T, theirs.T) == pytest.approx(0.6)
    np.testing.assert_allclose(improvement_interval(ours.T, theirs.T), [0.36666667, 0.81666667], atol=0.02)
