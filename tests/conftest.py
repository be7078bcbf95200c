"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bm3il.launch.environments import speed


def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: more than there are cores, since a quarter of the tests' time they wait for others."""
    return len(os.sched_getaffinity(0)) * 3 // 2 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no reference data: ../shared is absent")
    return folder


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contracts are checked in dozens of tests, which have no use for how fast an environment is."""
    monkeypatch.setattr(speed, "SPEED_SECONDS", 0.01)
    monkeypatch.setattr(speed, "MORE_COPIES", 2)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is taken to go to a terminal, of 80 columns and without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors and networks made during the test are float64: what is right agrees in all its digits."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
