from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bm3il.launch import run, run_folder
from bm3il.launch.config import Config, load_preset
from bm3il.launch.locks import locked
from bm3il.launch.outcome import Outcome
from bm3il.launch.result import Start, conclude
from bm3il.protocol.errors import InputError

START = Start("r", 0.0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(load_preset("rover_tower_8"), run="mine", runs_folder=str(tmp_path / "runs"))


def test_a_new_folder_holds_the_configuration(config: Config) -> None:
    folder = run_folder.create(config)
    assert run_folder.open_existing(folder) == config


def test_runs_that_start_in_one_second_have_names_of_their_own(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    names = []
    for _ in range(3):
        named = run_folder.named(replace(config, run=""))
        run_folder.create(named)
        names.append(named.run.partition("seed0-")[2])
    assert names == ["now", "now-2", "now-3"]


def test_no_space_leaves_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(InputError, match="has 1 MiB free"):
        run_folder.create(config)
    assert not Path(config.runs_folder, "mine").exists()


def test_a_folder_that_is_no_run_yet_is_not_in_the_way(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed while it is made leaves nothing that a study or a run of this name would trip over."""
    folder, seen = Path(config.runs_folder, config.run), []
    write = run_folder.write_atomically

    def look(path: Path, text: str) -> None:
        write(path, text)
        seen.append(folder.exists())

    monkeypatch.setattr(run_folder, "write_atomically", look)
    run_folder.create(config)
    assert seen == [False]
    assert [path.name for path in folder.parent.iterdir()] == [config.run]


def test_of_two_that_make_one_folder_the_first_has_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.runs_folder, config.run)
    write = run_folder.write_atomically

    def overtaken(path: Path, text: str) -> None:
        folder.mkdir()
        (folder / "config.yaml").write_text("another's")
        write(path, text)

    monkeypatch.setattr(run_folder, "write_atomically", overtaken)
    with pytest.raises(run_folder.RunExistsError):
        run_folder.create(config)
    assert (folder / "config.yaml").read_text() == "another's"
    assert [path.name for path in folder.parent.iterdir()] == [config.run], "nothing hidden is left"


def test_a_run_that_ended_at_its_start_does_not_keep_its_name(config: Config) -> None:
    folder = run_folder.create(config)
    (folder / "logs").mkdir()
    (folder / "checkpoints" / "00000000").mkdir(parents=True)
    conclude(folder, config, Outcome(2, "no such thing"), START)
    assert run_folder.open_existing(run_folder.create(replace(config, seed=5))).seed == 5
    assert not (folder / "result.json").exists()
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("worth", ["log.jsonl", "checkpoints/00000010/checkpoint.json", "notes.txt"])
def test_what_is_worth_keeping_stays(config: Config, worth: str) -> None:
    folder = run_folder.create(config)
    (folder / worth).parent.mkdir(parents=True, exist_ok=True)
    (folder / worth).write_text("something")
    with pytest.raises(InputError, match="exists; take another --run, or `bm3il resume"):
        run_folder.create(config)
    assert (folder / worth).exists()


def test_a_run_that_has_just_begun_stays(config: Config) -> None:
    folder = run_folder.create(config)
    with locked(folder), pytest.raises(InputError, match="exists"):
        run_folder.create(config)
    assert run_folder.open_existing(folder) == config


@pytest.mark.parametrize("name", [".a", "a/b", "a\0", "a\n#SBATCH --account=b", "a\tb", "a\x1b[31m"])
def test_a_name_is_one_plain_word_of_a_path(config: Config, name: str) -> None:
    with pytest.raises(InputError, match="plain folder name") as error:
        run_folder.named(replace(config, run=name))
    assert str(error.value).isprintable()


def test_names_tell_the_runs_apart(config: Config) -> None:
    assert run_folder.named(config).run == "mine"
    assert run_folder.named(replace(config, run="", seed=3)).run.startswith("rover_tower_8-bm3il-seed3-2")


def test_another_configuration_is_refused_on_resume_and_shown(config: Config) -> None:
    folder = run_folder.create(config)
    with pytest.raises(InputError, match="steps: 60000 then, steps: 7 now"):
        run.resume(folder, replace(config, steps=7))


def test_serial_mode_has_one_node(config: Config) -> None:
    with pytest.raises(InputError, match="one process"):
        run.check(replace(config, mode="serial", nodes=2))


@pytest.mark.parametrize(("status", "looked_for"), [("finished", False), ("interrupted", False), ("failed", True)])
def test_prometheus_looks_for_a_run_until_it_has_ended_well(tmp_path: Path, status: str, looked_for: bool) -> None:
    run, link = tmp_path / "mine", tmp_path / ".targets" / "mine.json"
    run.mkdir()
    (run / "targets.json").write_text("[]")
    for _ in range(2):  # a resume is looked for again
        with run_folder.announced(run):
            assert link.read_text() == "[]"
            (run / "result.json").write_text(json.dumps({"status": status}))
        assert link.is_symlink() == looked_for


def test_a_refused_budget_leaves_the_old_one(config: Config) -> None:
    folder = run_folder.create(config)

    def refused() -> None:
        with run_folder.rewritten(folder, config, replace(config, steps=7)):
            assert run_folder.read_config(folder).steps == 7
            raise InputError("no")

    with pytest.raises(InputError, match="no"):
        refused()
    assert run_folder.read_config(folder) == config
    assert not list(folder.glob("config-*"))
