"""Runs beside each other: groups by what differs, figures of them, tables, CSV and picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import pytest

from bm3il.launch import run_folder
from bm3il.launch.cli import main
from bm3il.launch.config import configured
from bm3il.launch.studies.compared import Grouping, Result, read_results
from bm3il.launch.studies.rows import CURVE, DEFAULTS, Row, Rows, identity
from bm3il.protocol.errors import InputError


def run_of(folder: Path, score: float | None, seed: int = 1, clones: bool = False, **settings: object) -> Path:
    """The folder of a finished run: its curve rises to the score in 1,000 steps, at 0, 500 and 1,000."""
    named = {"preset": "rover_tower_4", **{key.replace("__", "."): value for key, value in settings.items()}}
    config = configured(named | {"seed": seed}, "").checked()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    result = {"status": "finished", "return_mean": 100 * (score or 0.1), "normalized_return": score, "wall_seconds": 8}
    (folder / "result.json").write_text(json.dumps(result | {"return_episodes": 5, "policy_sha256": folder.name}))
    rows = [
        f"{n},{0 if clones else 500 * n},{4 * n},{50 * n * (score or 0.1)},{(score or 0) * n / 2}" for n in range(3)
    ]
    text = "\n".join(["iteration,env_steps,wall_seconds,return_mean,normalized_return", *rows])
    (folder / "curve.csv").write_text(text + "\n")
    return folder


def compared(folder: Path, *args: object) -> list[dict[str, str]]:
    """The lines of `compare.csv`."""
    assert main(["compare", *map(str, args), "--output", str(folder)]) == 0
    with (folder / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def grouping_of(runs: Sequence[Path], by: str = "") -> Grouping:
    return Grouping.of(read_results(runs)[0], by)


def test_figures_are_of_the_runs_of_a_group(tmp_path: Path, terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(tmp_path / f"a{seed}", seed / 10, seed, algorithm="ma-gail") for seed in (1, 2, 3, 4)]
    runs += [run_of(tmp_path / f"b{seed}", seed / 10 + 0.5, seed, algorithm="mtmfil") for seed in (1, 2)]
    a, b = compared(tmp_path / "out", *runs)
    assert (a["world"], a["algorithm"], a["group"], a["runs"], a["score"]) == (
        *("as trained", "ma-gail", "ma-gail", "4"),
        "normalized_return",
    )
    assert [float(a[key]) for key in ("iqm", "mean", "least", "most", "return_mean", "wall_seconds")] == pytest.approx(
        [0.25, 0.25, 0.1, 0.4, 25, 8]
    )
    assert float(a["iqm_low"]) < 0.25 < float(a["iqm_high"])
    assert (a["improvement"], float(b["improvement"]), float(b["improvement_low"])) == ("", 1, 1)
    assert [float(row["area"]) for row in (a, b)] == pytest.approx([0.125, 0.325])
    assert float(a["area_low"]) < 0.125 < float(a["area_high"])
    assert (a["area_improvement"], float(b["area_improvement"]), float(b["area_improvement_low"])) == ("", 1, 1)
    assert (a["steps_to_0.5"], a["reached_0.5"], b["steps_to_0.5"], b["seconds_to_0.5"]) == ("", "0", "1000.0", "8.0")
    assert (b["steps_to_0.8"], b["reached_0.8"]) == ("", "0")
    assert matplotlib.image.imread(tmp_path / "out" / "compare.png").std() > 0.05  # something is on it
    said = capsys.readouterr().out
    assert "better than one of ma-gail" in said
    assert "0 of 4 runs" in said
    assert "area under the curve: normalised return" in said
    assert max(map(len, said.splitlines()[:-2])) <= 80  # the last two are paths


def test_settings_that_go_with_others_make_no_groups(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / "a", 0.1, algorithm="ma-gail"),
        run_of(tmp_path / "b", 0.2, algorithm="bm3il"),
        run_of(tmp_path / "c", 0.3, algorithm="bm3il", learner__batch_size=7),
        run_of(tmp_path / "d", 0.4, seed=2, algorithm="bm3il", learner__batch_size=7),
    ]
    grouping = grouping_of(runs)
    assert grouping.keys == ("algorithm", "learner.batch_size")
    assert [len(group.results) for group in grouping.groups] == [1, 1, 2]
    assert grouping.also["reward.particles"] == ("1", "4")


def test_by_a_setting_the_others_are_tasks(tmp_path: Path) -> None:
    """On each of two tasks the second method is better by a little; runs of both tasks together overlap."""
    runs = []
    for episodes, level in ((5, 0.1), (50, 0.8)):
        for method, more in (("ma-gail", 0.0), ("mtmfil", 0.05)):
            for seed in (1, 2):
                name = f"{method}-{episodes}-{seed}"
                score = level + more + seed / 100
                runs.append(run_of(tmp_path / name, score, seed, algorithm=method, demonstration_episodes=episodes))
    grouping = grouping_of(runs, "algorithm")
    assert (grouping.keys, grouping.tasks) == (("algorithm",), ("demonstration_episodes",))
    first, second = compared(tmp_path / "out", *runs, "--by", "algorithm")
    assert (first["runs"], second["runs"], float(second["improvement"])) == ("4", "4", 1)
    (other, against) = compared(tmp_path / "again", *runs, "--by", "algorithm", "--baseline", "mtmfil")
    assert (float(other["improvement"]), against["improvement"]) == (0, "")
    with pytest.raises(InputError, match=r"--by seeed|unknown setting 'algoritm'; did you mean algorithm"):
        grouping_of(runs, "algoritm")
    with pytest.raises(InputError, match="is 60000 in all of these runs; they differ in demonstration_episodes"):
        grouping_of(runs, "steps")


def test_clones_have_no_way_to_go(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", 0.9, algorithm="bc", clones=True), run_of(tmp_path / "b", 0.6, algorithm="ma-gail")]
    clone, imitator = compared(tmp_path / "out", *runs)
    assert (clone["area"], clone["iqm"], clone["iqm_low"], imitator["area"]) == ("", "0.9", "", "0.3")
    assert (tmp_path / "out" / "compare.png").exists()
    compared(tmp_path / "clones", runs[0])
    assert not (tmp_path / "clones" / "compare.png").exists()


def test_returns_are_compared_where_nobody_knows_the_expert(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", 0.5, algorithm="ma-gail"), run_of(tmp_path / "b", None, algorithm="mtmfil")]
    first, second = compared(tmp_path / "out", *runs)
    assert (first["score"], first["iqm"], second["iqm"], first["area"]) == ("return_mean", "50.0", "10.0", "25.0")
    assert "steps_to_0.5" not in first


def test_one_group_is_held_against_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "a", 0.5)
    assert main(["compare", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "as trained: normalised return"  # and no word of P, nor of intervals that one run has not
    assert said[2].split() == ["┃", "group", "┃", "runs", "┃", "IQM", "┃", "mean", "┃"]
    assert "area under the curve: normalised return" in said
    assert not any(" P " in line for line in said)
    compared(tmp_path / "out", run, run_of(tmp_path / "b", 0.6, seed=2))
    assert capsys.readouterr().out.startswith("in brackets: 95% intervals\n")


def test_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder of what is looked at, if that is one; else into one of its own."""
    monkeypatch.chdir(tmp_path)
    runs = [str(run_of(tmp_path / f"run{seed}", 0.5, seed).name) for seed in (1, 2)]
    assert main(["compare", runs[0]]) == 0
    assert (tmp_path / "run1" / "compare.csv").exists()
    assert not (tmp_path / "comparison").exists()
    assert main(["compare", *runs]) == 0
    assert (tmp_path / "comparison" / "compare.csv").exists()


def test_worlds_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study"
    for name, algorithm, score in (("a", "ma-gail", 0.4), ("b", "mtmfil", 0.3)):
        run_of(study / name, 0.9, algorithm=algorithm)
        told = {"slip=0.1": {"return_mean": 1.0, "normalized_return": score, "greedy_return_mean": 2.0}}
        (study / name / "worlds.json").write_text(json.dumps({"policy_sha256": name, "worlds": told}))
    (study / "c").mkdir()
    (study / "c" / "config.yaml").write_text((study / "a" / "config.yaml").read_text())
    runs = [{"run": name} for name in ("a", "b", "c")]
    (study / "study.json").write_text(json.dumps({"version": 1, "name": "study", "runs": runs}))
    assert main(["compare", str(study)]) == 0
    said = capsys.readouterr().out
    assert "left out, since it is not finished: c" in said
    assert "slip=0.1: normalised return" in said
    with (study / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["world"], row["iqm"]) for row in rows] == [
        *(("as trained", "0.9"), ("as trained", "0.9"), ("slip=0.1", "0.4"), ("slip=0.1", "0.3"))
    ]
    assert (rows[2]["greedy_return_mean"], rows[0]["improvement"], rows[1]["improvement"]) == ("2.0", "", "0.5")
    only = compared(tmp_path / "out", study, "--world", "slip=0.1")
    assert [row["world"] for row in only] == ["slip=0.1", "slip=0.1"]

    capsys.readouterr()
    assert main(["compare", str(study), "--world", "slip=0.2"]) == 2
    assert "unknown world 'slip=0.2'; did you mean slip=0.1" in capsys.readouterr().err
    (study / "a" / "worlds.json").write_text(json.dumps({"policy_sha256": "another", "worlds": told}))
    assert list(Result.of(study / "a").evaluations) == ["as trained"]  # it was of a policy before
    for broken in ("", "[]", '{"policy_sha256": "a", "worlds": [1]}', '{"policy_sha256": "a", "worlds": {"x": 1}}'):
        (study / "a" / "worlds.json").write_text(broken)
        assert list(Result.of(study / "a").evaluations) == ["as trained"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "is neither the folder of a run nor of a study" in capsys.readouterr().err
    run = run_of(tmp_path / "a", 0.5)
    (run / "result.json").unlink()
    assert main(["compare", str(run)]) == 2
    assert "none of 1 runs is finished" in capsys.readouterr().err


def test_a_world_without_a_true_reward_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(tmp_path / f"zero{seed}", 0.5, seed) for seed in (1, 2)]
    compared(tmp_path / "out", *runs)
    assert "no true reward" not in " ".join(capsys.readouterr().out.split())
    for run in runs:
        told = json.loads((run / "result.json").read_text()) | {"return_mean": 0.0, "normalized_return": None}
        (run / "result.json").write_text(json.dumps(told))
    compared(tmp_path / "out", *runs)
    assert "no true reward" in " ".join(capsys.readouterr().out.split())


def row_of(score: float = 0.5, seed: int = 1, run: str = "", **settings: object) -> Row:
    """Of such a run as `run_of` makes."""
    named = {"preset": "rover_tower_4", **{key.replace("__", "."): value for key, value in settings.items()}}
    config = configured(named | {"seed": seed}, "").checked()
    curve: dict[str, list[float | None]] = {name: [0.0, score] for name in CURVE}
    told = {"as trained": {"return_mean": 100 * score, "normalized_return": score, "episodes": 5}}
    return Row(run or f"run_seed-{seed}", {}, identity(config), seed, "c", 5, 1.0, 8.0, told, curve)


@pytest.mark.parametrize("old_first", [True, False])
def test_rows_of_different_commits_are_compared_by_all_settings_of_each(tmp_path: Path, old_first: bool) -> None:
    """What a row lacks was as the default is; what only a row of old has differs from none."""
    old = [row_of(seed=seed, run=f"old-{seed}", algorithm="ma-gail") for seed in (1, 2)]
    for row in old:
        del row.config["learner.batch_size"]
    new = [row_of(0.9, seed, f"new-{seed}", algorithm="ma-gail", learner__batch_size=999) for seed in (1, 2)]
    new[0].config["learner.of_old"] = new[1].config["learner.of_old"] = 3
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, rows in zip(paths, (old, new), strict=True):
        path.write_text(Rows(path, rows).text())
    grouping = grouping_of(paths if old_first else paths[::-1])
    assert grouping.keys == ("learner.batch_size",)
    names = [str(DEFAULTS["learner.batch_size"]), "999"]
    assert [group.name for group in grouping.groups] == (names if old_first else names[::-1])
    assert set(grouping.also["learner.of_old"]) == {"–", "3"}
    assert [len(group.results) for group in grouping.groups] == [2, 2]


def test_a_run_that_shall_play_more_steps_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bm3il resume RUN --steps MORE`, killed on its way: the result is that of fewer steps."""
    done, extended = (run_of(tmp_path / name, 0.5, seed) for seed, name in enumerate(("a", "b")))
    result = json.loads((extended / "result.json").read_text()) | {"steps": 500}
    (extended / "result.json").write_text(json.dumps(result))
    assert [line["runs"] for line in compared(tmp_path / "out", done, extended)] == ["1"]
    assert "left out, since it is not finished: b" in capsys.readouterr().out


def test_a_run_that_is_given_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its folder and its row, or from a file and its copy; another of the same name is another run."""
    run = run_of(tmp_path / "a", 1 / 3, algorithm="ma-gail")
    config = run_folder.read_config(run)
    rows = [Row.of(run, {}, config, 5), row_of(0.7, 1, "a", algorithm="mtmfil"), row_of(0.8, 2, "a")]
    for name in ("rows.json", "copy.json"):
        (tmp_path / name).write_text(Rows(tmp_path / name, rows).text())
    paths = [run, tmp_path / "rows.json", tmp_path / "copy.json"]
    lines = compared(tmp_path / "out", *paths)
    assert [(line["group"], line["runs"]) for line in lines] == [("ma-gail", "1"), ("mtmfil", "1"), ("bm3il", "1")]
    said = capsys.readouterr().out
    assert said.count("left out, since it is given twice: a") == 4
    # Of the same settings and seed, and yet no copy: an asynchronous run comes out otherwise each time.
    other = run_of(tmp_path / "b", 0.4, algorithm="ma-gail")
    assert [line["runs"] for line in compared(tmp_path / "again", run, other)] == ["2"]


def test_by_a_setting_groups_are_compared_on_tasks_that_all_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second method is better where both were, and was also where it is hard."""
    levels = {("bc", 5): 0.9, ("bm3il", 5): 0.95, ("bm3il", 20): 0.3, ("bm3il", 50): 0.2}
    runs = []
    for (method, episodes), level in levels.items():
        for seed in (1, 2):
            folder = tmp_path / f"{method}-{episodes}-{seed}"
            runs.append(run_of(folder, level + seed / 100, seed, algorithm=method, demonstration_episodes=episodes))
    clone, imitator = compared(tmp_path / "out", *runs, "--by", "algorithm")
    assert [(row["runs"], round(float(row["mean"]), 3)) for row in (clone, imitator)] == [("2", 0.915), ("2", 0.965)]
    said = capsys.readouterr().out
    assert [f"left out, since not all groups have it: the task {n} (2 runs)" in said for n in (5, 20, 50)] == [
        *(False, True, True)
    ]
    apart = [run for run in runs if "bm3il-5-" not in run.name]
    clone, imitator = compared(tmp_path / "apart", *apart, "--by", "algorithm")
    assert (clone["runs"], imitator["runs"], "improvement" in imitator) == ("2", "4", False)
    said = capsys.readouterr().out
    assert "no task is shared by all groups: their figures are not of the same tasks" in said
    assert "on the same tasks" not in said
