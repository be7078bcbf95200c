"""What a run starts from is the same whether its clone is made or found."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import rollout
from bm3il.learner.cloning import clone
from bm3il.learner.kept_clones import KeptClone
from bm3il.learner.settings import CloningSettings
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.telemetry import Telemetry

TOWN = make_environment("berlin?agents=4&types=2", 2)


@pytest.fixture(scope="module")
def recorded() -> Demonstrations:
    return Demonstrations.from_trajectories(rollout(TOWN, untrained(), 6), TOWN.spec, "")


def untrained(seed: int = 0) -> Policy:
    return Policy(Layout.of(TOWN.spec, "type"), (8,), torch.Generator().manual_seed(seed))


def settings(folder: Path | str) -> CloningSettings:
    return CloningSettings(updates=2, iterations=3, batch_size=4, kept_in=str(folder))


def made(recorded: Demonstrations, told: CloningSettings, seed: int = 0, policy_seed: int = 0) -> tuple[str, int]:
    """The clone's fingerprint, and how many iterations it took."""
    policy, telemetry, iterations = untrained(policy_seed), Telemetry("learner", 0, Sender("run", "learner-0")), []
    clone(policy, recorded, told, seed, telemetry, lambda: iterations.append(1))
    telemetry.close()
    return policy.sha256(), len(iterations)


def test_the_second_finds_what_the_first_has_made(recorded: Demonstrations, tmp_path: Path) -> None:
    without, effort = made(recorded, settings(""))
    assert effort > 0
    assert made(recorded, settings(tmp_path / "clones")) == (without, effort)
    assert made(recorded, settings(tmp_path / "clones")) == (without, 0)
    assert len(list((tmp_path / "clones").iterdir())) == 1  # and nothing half written


def test_another_start_is_another_clone(recorded: Demonstrations, tmp_path: Path) -> None:
    told = settings(tmp_path)
    _, effort = made(recorded, told)
    grouped = replace(recorded, groups=np.zeros_like(recorded.groups))
    played = Demonstrations.from_trajectories(rollout(TOWN, untrained(2), 6), TOWN.spec, "")
    others = [
        made(recorded, told, seed=1),
        made(recorded, told, policy_seed=1),
        made(recorded, replace(told, learning_rate=1e-3)),
        made(grouped, told),
    ]
    assert [iterations for _, iterations in others] == [effort] * 4
    keys = {KeptClone(untrained(), these, told, 0)._path for these in (recorded, grouped, played)}
    assert len(keys) == 3


@pytest.mark.parametrize("content", ["nothing", "words", "another policy", "not finite"])
def test_what_holds_no_such_policy_is_made_anew(
    recorded: Demonstrations, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = settings(tmp_path)
    sha256, effort = made(recorded, told)
    (file,) = tmp_path.iterdir()
    if content in ("nothing", "words"):
        file.write_text("" if content == "nothing" else "no tensors at all")
    else:
        arrays = untrained().to_arrays()
        name = next(iter(arrays))
        arrays[name] = arrays[name][..., :1].copy() if content == "another policy" else arrays[name] * np.nan
        save_file(arrays, file)
    with caplog.at_level(logging.WARNING):
        assert made(recorded, told) == (sha256, effort)
    assert "made anew" in caplog.text
    assert made(recorded, told) == (sha256, 0)


def test_a_clone_that_cannot_be_kept_is_used_all_the_same(
    recorded: Demonstrations, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert made(recorded, settings(tmp_path / "file"))[1] > 0
    assert "cannot be kept" in caplog.text or "cannot be read" in caplog.text
