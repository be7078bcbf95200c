"""Rows of finished runs, which outlive the runs' folders."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bm3il.launch.cli import main
from bm3il.launch.config import Config, configured
from bm3il.launch.studies import pool
from bm3il.launch.studies import rows as study_rows
from bm3il.launch.studies.compared import Result, read_results
from bm3il.launch.studies.file import Study
from bm3il.launch.studies.rows import Rows, identity
from bm3il.launch.studies.study import Record
from bm3il.protocol.demonstrations import resolve
from bm3il.protocol.errors import InputError

TINY = {
    "preset": "rover_tower_4",
    "demonstration_episodes": 2,
    "steps": 100,
    "actor": {"hidden": [16], "steps_per_iteration": 50},
    "learner": {"hidden": 16, "clipped": {"epochs": 1, "parts": 2}, "checkpoint_interval": 5},
    "cloning": {"iterations": 1, "updates": 2},
    "reward": {"hidden": [16], "updates": 1, "batch-size": 8, "window-steps": 100},
    "evaluation": {"starts": "fresh", "episodes": 1, "final_episodes": 2, "interval": 1},
}
KEPT = "results/tiny.json"


def written(folder: Path, **values: object) -> Path:
    """The file of a study that keeps rows."""
    path = folder / "tiny.yaml"
    told = {"settings": TINY, "grid": {"algorithm": ["ma-gail"]}, "results": KEPT, "core_seconds": 1800, **values}
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    return path


def study(path: Path, runs: str, *args: str) -> int:
    return main(["study", str(path), "--runs-folder", str(path.parent / runs), "--jobs", "1", *args])


def test_where_a_run_keeps_its_clone_makes_it_no_other_run() -> None:
    here, there = (configured({"cloning": {"kept_in": folder}}, "settings") for folder in ("", "clones"))
    assert here != there
    assert identity(here) == identity(there)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)


def config(**settings: object) -> Config:
    named = {"preset": "rover_tower_4", **{key.replace("__", "."): value for key, value in settings.items()}}
    return configured(named, "").checked()


def row_of(config: Config, **values: Any) -> study_rows.Row:
    curve = {name: [0, 1] for name in study_rows.CURVE}
    fields = {"run": "a", "settings": {}, "seed": config.seed, "commit": "c", "episodes": 3, "core_seconds": 7.5}
    told = fields | {"wall_seconds": 9, "evaluations": {"as trained": {"return_mean": 1.5}}, "curve": curve} | values
    return study_rows.Row(config=identity(config), **told)


def test_a_run_is_the_same_wherever_it_lies_and_whatever_it_is_called() -> None:
    known = identity(config(seed=3))
    assert identity(replace(config(seed=3), run="x", runs_folder="/y", metrics_port=9, network="eth0")) == known
    for other in (config(seed=4), config(seed=3, reward__particles=2), config(seed=3, steps=7)):
        assert identity(other) != known


def test_a_file_is_its_name_and_its_content() -> None:
    here = replace(config(), demonstrations="/here/tower.safetensors", files={"/here/tower.safetensors": "ab" * 32})
    there = replace(here, demonstrations="/there/tower.safetensors", files={"/there/tower.safetensors": "ab" * 32})
    assert identity(here) == identity(there)
    assert identity(replace(there, files={"/there/tower.safetensors": "cd" * 32})) != identity(here)


def test_a_row_is_found_by_all_settings(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", [])
    rows.add([row_of(config(seed=seed, reward__particles=2), run=f"s{seed}") for seed in (1, 2)])
    again = Rows.read(rows.path)
    assert again.rows == rows.rows
    assert (found := again.find(config(seed=2, reward__particles=2))) is not None
    assert found.run == "s2"
    assert again.find(config(seed=3, reward__particles=2)) is None
    assert again.find(config(seed=2)) is None
    assert rows.path.read_text().count('"reward.particles"') == 1  # what is common is said once
    again.add([row_of(config(seed=2, reward__particles=2), run="anew")])
    assert [row.run for row in Rows.read(rows.path).rows] == ["anew", "s1"]


def test_a_setting_that_was_none_when_the_run_was_made_was_as_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    known = identity(config())
    row = row_of(config())
    del row.config["learner.discount"]
    assert not row.is_of(known)  # the preset says 0.9, and the default is 0.95
    assert row.is_of(known | {"learner.discount": study_rows.DEFAULTS["learner.discount"]})
    row.config["learner.of_old"] = 1
    assert not row.is_of(known | {"learner.discount": study_rows.DEFAULTS["learner.discount"]})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "does not hold the results of a study"),
        ('<<<<<<< ours\n{"version": 1}', "does not hold the results of a study"),
        ("[]", "does not hold the results of a study"),
        ('{"version": 2, "common": {}, "runs": []}', "has version 2, and this release reads version 1"),
        ('{"version": 1, "runs": []}', "no 'common'"),
        ('{"version": 1, "common": {}, "runs": [{"run": "a"}]}', "no 'settings'"),
        ('{"version": 1, "common": {}, "runs": [5]}', "does not hold the results of a study"),
    ],
)
def test_a_broken_file_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, answer: str
) -> None:
    path = written(tmp_path)
    kept = tmp_path / KEPT
    kept.parent.mkdir()
    kept.write_text(text)
    assert study(path, "runs") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line
    assert str(kept) in line
    assert kept.read_text() == text
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=str(kept)):
        Rows.read(kept)


def test_a_row_with_a_cut_curve_is_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.json", [row_of(config())])
    told = json.loads(rows.text())
    told["runs"][0]["curve"]["env_steps"].pop()
    rows.path.write_text(json.dumps(told))
    with pytest.raises(InputError, match="the run 'a' has no whole curve"):
        Rows.read(rows.path)


@pytest.mark.parametrize("values", [{"results": 3}, {"results": "rows.csv"}, {"core_seconds": 0}])
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object]
) -> None:
    assert study(written(tmp_path, **values), "runs", "--dry-run") == 2
    assert f"{next(iter(values))} must be" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").write_text("in the way")
    assert study(written(tmp_path), "runs") == 2
    assert f"cannot create {tmp_path / 'results'}" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("tiny/*/log.jsonl"))


@pytest.mark.timeout(300)  # two starts of processes
def test_what_a_file_of_results_holds_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the study's folder to the rows, and, when that is gone, back to tables."""
    demonstrations = tmp_path / "here.safetensors"
    shutil.copyfile(resolve("rover_tower_4"), demonstrations)
    settings = TINY | {"demonstrations": str(demonstrations)}
    path = written(tmp_path, settings=settings, seeds=[1], worlds=["own"], episodes=3)
    assert study(path, "runs", "--dry-run") == 0
    assert "1 to do, about 0.5 core-hours" in capsys.readouterr().out
    assert study(path, "runs") == 0
    (row,) = Rows.read(tmp_path / KEPT).rows
    assert (row.run, row.seed, row.settings) == ("ma-gail_seed-1", 1, {"algorithm": "ma-gail"})
    assert row.core_seconds is not None
    assert row.core_seconds > 1
    assert row.curve["env_steps"] == [0, 50, 100]
    assert set(row.evaluations) == {"as trained", "own"}
    assert row.evaluations["own"]["episodes"] == row.episodes == 3
    assert row.evaluations["own"]["expert_return"] is not None  # of the expert who has planned there
    assert str(tmp_path) not in (tmp_path / KEPT).read_text()

    (tmp_path / KEPT).unlink()
    folder, again = tmp_path / "runs" / "tiny", Study.read(path)
    record = Record(again, folder, again.trials(folder))
    record.write({folder / row.run})
    assert not (tmp_path / KEPT).exists()  # its process has not ended
    record.write(())
    assert Rows.read(tmp_path / KEPT).rows == [row]

    shutil.rmtree(tmp_path / "runs")
    text = (tmp_path / KEPT).read_text()
    capsys.readouterr()
    assert study(path, "elsewhere") == 0
    assert "0 to do" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere" / "tiny" / "ma-gail_seed-1").exists()
    assert (tmp_path / KEPT).read_text() == text
    for place in (tmp_path / "elsewhere" / "tiny", tmp_path / KEPT):
        assert main(["compare", str(place), "--output", str(tmp_path / "out")]) == 0
        assert "ma-gail" not in capsys.readouterr().err
    # Another seed, another world, or other episodes of it: these are to do.
    for more in ({"seeds": [1, 2]}, {"worlds": ["own", "slip=0.1"]}, {"episodes": 4}):
        told = {"settings": settings, "seeds": [1], "worlds": ["own"], "episodes": 3} | more
        assert study(written(tmp_path, **told), "third", "--dry-run") == 0
        assert "1 to do" in capsys.readouterr().out


def test_what_others_write_into_a_file_of_results_stays(tmp_path: Path) -> None:
    """Another study, or version control: a file is read again before it is written."""
    mine, theirs = Rows.read(tmp_path / "rows.json"), Rows.read(tmp_path / "rows.json")
    mine.add([row_of(config(seed=1), run="mine")])
    theirs.add([row_of(config(seed=2), run="theirs")])
    assert [row.run for row in Rows.read(mine.path).rows] == [row.run for row in theirs.rows] == ["mine", "theirs"]
    mine.path.write_text(Rows(mine.path, [row_of(config(seed=3), run="pulled")]).text())
    mine.add([row_of(config(seed=4), run="new")])
    assert [row.run for row in Rows.read(mine.path).rows] == ["new", "pulled"]


def test_two_studies_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study_rows.write_atomically

    def slowly(path: Path, text: str) -> None:
        time.sleep(0.2)
        whole(path, text)

    monkeypatch.setattr(study_rows, "write_atomically", slowly)
    rows = [row_of(config(seed=seed), run=f"s{seed}") for seed in range(3)]
    with ThreadPoolExecutor() as pool_of_threads:
        list(pool_of_threads.map(lambda row: Rows.read(tmp_path / "rows.json").add([row]), rows))
    assert [row.run for row in Rows.read(tmp_path / "rows.json").rows] == ["s0", "s1", "s2"]


def test_a_link_to_a_file_of_results_stays_one(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "shared.json")
    Rows.read(link).add([row_of(config())])
    assert link.is_symlink()
    assert len(Rows.read(tmp_path / "shared.json").rows) == 1


def test_evaluations_of_one_run_in_several_studies_are_joined(tmp_path: Path) -> None:
    """If it is one and the same: of one trained anew, or at another commit, the old ones would be of another policy."""
    path, trained = tmp_path / "rows.json", {"as trained": {"return_mean": 1.5}}
    for world, commit in (("slip=0.1", "c"), ("slip=0.2", "c"), ("slip=0.3", "d")):
        told = {world: {"return_mean": 1.0, "episodes": 3}}
        Rows.read(path).add([row_of(config(), evaluations=trained | told, commit=commit)])
        (row,) = Rows.read(path).rows
        if world == "slip=0.2":
            assert set(row.evaluations) == {"as trained", "slip=0.1", "slip=0.2"}
    assert set(row.evaluations) == {"as trained", "slip=0.3"}


def test_worlds_of_other_episodes_do_not_count(tmp_path: Path) -> None:
    """Of each world by its own: a row may have some from another study."""
    path = written(tmp_path, worlds=["own"], episodes=3)
    (trial,) = Study.read(path).trials(tmp_path / "runs")
    own, other = {"return_mean": 1.0, "episodes": 3}, {"return_mean": 2.0, "episodes": 4}
    for worlds, done in (({"own": own, "slip=0.1": other}, True), ({"own": other, "slip=0.1": own}, False)):
        (tmp_path / KEPT).unlink(missing_ok=True)
        Rows.read(tmp_path / KEPT).add([row_of(trial.config, evaluations=worlds, episodes=4 if done else 3)])
        record = Record(Study.read(path), tmp_path / "runs", [trial])
        assert record.is_done(record.place(trial)) is done


def test_a_study_is_compared_by_the_runs_that_it_describes(tmp_path: Path) -> None:
    """Whatever they are called: rows of a learning rate of before are none of an edited study."""
    path, folder = written(tmp_path, seeds=[1, 2]), tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (first, second) = Study.read(path).trials(folder)
    edited = replace(second.config, learner=replace(second.config.learner, policy_learning_rate=0.5))
    rows = [row_of(first.config, run="called_otherwise"), row_of(edited, run=second.name)]
    Rows.read(tmp_path / KEPT).add(rows)
    record = Record(Study.read(path), folder, [first, second])
    record.write()
    assert [told["status"] for told in record.rows()] == ["finished", "waiting"]
    results, left_out, _ = read_results([folder])
    assert [result.settings for result in results] == [Result.of_row(rows[0]).settings]
    assert left_out == [folder / second.name]
    told = json.loads((folder / "study.json").read_text())
    for run in told["runs"]:
        del run["config"]  # as by a release of before
    (folder / "study.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="none of 2 runs is finished"):
        read_results([folder])
