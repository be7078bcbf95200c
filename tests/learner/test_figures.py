"""Figures of updates, read once an iteration."""

from __future__ import annotations

import pytest
import torch

from bm3il.learner.figures import MUST_BE_FINITE, Figures, merged
from bm3il.protocol.errors import NumericalError


def test_means_are_over_updates() -> None:
    figures = Figures()
    for value in (1.0, 2.0, 6.0):
        figures.add({"critic_loss": torch.tensor(value), "reward": 10 * value})
    assert figures.means() == {"critic_loss": 3.0, "reward": 30.0}


def test_no_update_has_no_figures() -> None:
    assert Figures().means() == {}


@pytest.mark.parametrize("name", MUST_BE_FINITE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_was_not_finite_once_is_told(name: str, bad: float) -> None:
    figures = Figures()
    for value in (1.0, bad, 1.0):
        figures.add({name: torch.tensor(value)})
    with pytest.raises(NumericalError, match=f"{name} is"):
        figures.means()


def test_two_figures_of_one_name_cannot_be_merged() -> None:
    assert merged({"a": 1.0}, {"b": 2.0}, {}) == {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match="two figures are called 'entropy'"):
        merged({"loss": 1.0, "entropy": 0.5}, {"entropy": 0.6})
