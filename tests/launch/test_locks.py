from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bm3il.launch import run_folder
from bm3il.launch.config import Config, load_preset
from bm3il.launch.locks import is_running, locked
from bm3il.protocol.errors import InputError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(load_preset("rover_tower_8"), run="mine", runs_folder=str(tmp_path / "runs"))


def test_two_launchers_cannot_have_one_run(config: Config) -> None:
    folder = run_folder.create(config)
    assert not is_running(folder)
    assert not (folder / ".lock").exists(), "who only looks leaves nothing behind"
    with locked(folder):
        assert is_running(folder)
        with pytest.raises(InputError, match="being run by another process"), locked(folder):
            pass
    assert not is_running(folder)
