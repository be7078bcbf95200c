"""Fixtures of the learner's tests."""

from __future__ import annotations

import pytest

from bm3il.learner import critics


@pytest.fixture(params=[critics.FEW_ACTIONS, 0], ids=["few-actions", "many-actions"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of few actions are attended to as such, and as those of many are."""
    monkeypatch.setattr(critics, "FEW_ACTIONS", request.param)
