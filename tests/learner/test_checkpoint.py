"""Checkpoints are whole or not there; what is damaged is skipped, never loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from bm3il.learner.checkpoint import Checkpoint, CheckpointFolder, configuration_differences, read_checkpoint
from bm3il.protocol.errors import InputError


def checkpoint(iteration: int) -> Checkpoint:
    arrays = {"weights": np.full((3, 2), iteration, np.float32), "counter": np.array([iteration])}
    return Checkpoint(iteration, "seed: 1", {"env_steps": 10 * iteration}, arrays, {"particles": np.ones(4)})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", kept=2)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_what_was_written_comes_back(folder: CheckpointFolder) -> None:
    assert folder.newest() is None
    folder.write(checkpoint(5))
    back = folder.newest()
    assert back is not None
    assert (back.iteration, back.config, back.facts) == (5, "seed: 1", {"env_steps": 50})
    np.testing.assert_array_equal(back.learner["weights"], np.full((3, 2), 5, np.float32))
    np.testing.assert_array_equal(back.rewards["particles"], np.ones(4))


def test_the_newest_and_the_best_are_kept(folder: CheckpointFolder, tmp_path: Path) -> None:
    for iteration in range(1, 6):
        folder.write(checkpoint(iteration))
        if iteration == 2:
            folder.mark_best(2)
    assert names(tmp_path) == ["00000002", "00000004", "00000005", "best"]


def test_an_iteration_without_a_checkpoint_is_not_marked_best(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.write(checkpoint(1))
    assert not folder.mark_best(7)
    assert names(tmp_path) == ["00000001"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no header", "bad header", "missing file"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    folder: CheckpointFolder, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write(checkpoint(1))
    folder.write(checkpoint(2))
    newest = tmp_path / "checkpoints" / "00000002"
    arrays, header = newest / "learner.safetensors", newest / "checkpoint.json"
    content = arrays.read_bytes()
    match damage:
        case "truncate":
            arrays.write_bytes(content[:-3])
        case "flip":
            arrays.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "no header":
            header.unlink()
        case "bad header":
            header.write_text('{"version": 1')
        case "missing file":
            (newest / "rewards.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        back = folder.newest()
    assert back is not None
    assert back.iteration == 1
    assert "00000002" in caplog.text


def test_with_none_left_the_error_says_so(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.write(checkpoint(1))
    (tmp_path / "checkpoints" / "00000001" / "checkpoint.json").write_text("[]")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be used"):
        folder.newest()
    with pytest.raises(InputError, match="not a usable checkpoint"):
        read_checkpoint(tmp_path / "checkpoints" / "00000001")


def test_a_write_that_fails_leaves_the_previous_checkpoint(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write(checkpoint(1))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("bm3il.learner.checkpoint._write", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(checkpoint(2))
    assert names(tmp_path) == ["00000001"]
    assert folder.newest().iteration == 1  # type: ignore[union-attr]


def test_what_agents_saw_is_packed_where_that_makes_it_much_smaller(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    learner = {
        "replay/0.own": np.tile(random.normal(size=(50, 2)).astype(np.float32), (8_000, 1, 1)),
        "replay/1.own": random.normal(size=(8_000, 50, 2)).astype(np.float32),
        "policy/weights": np.zeros((1_000, 800), np.float32),
        "replay/0.masks": np.ones((30_000, 50, 2), bool),
    }
    CheckpointFolder(tmp_path, kept=2).write(Checkpoint(3, "", {}, learner, {}))
    size = (tmp_path / "00000003" / "learner.safetensors").stat().st_size
    assert size < learner["replay/1.own"].nbytes + learner["policy/weights"].nbytes + 100_000
    found = read_checkpoint(tmp_path / "00000003").learner
    assert set(found) == set(learner)
    for name, array in learner.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_an_iteration_that_is_written_twice_is_what_was_written_last(folder: CheckpointFolder) -> None:
    folder.write(checkpoint(3))
    folder.write(dataclasses.replace(checkpoint(3), facts={"env_steps": 7}))
    back = folder.newest()
    assert back is not None
    assert back.facts == {"env_steps": 7}


def test_settings_that_one_release_alone_knows_are_no_difference() -> None:
    then, now = "a: {b: 1, gone: 2}\nsteps: 3", "a: {b: 1, new: 4}\nsteps: 9"
    assert configuration_differences(then, now) == ""
    assert configuration_differences(then, now.replace("b: 1", "b: 5")) == "a.b: 1 then, 5 now"
