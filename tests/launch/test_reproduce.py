"""`make reproduce`: from a plan to rows, pictures and a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import claims
import figures
import matplotlib.image
import pytest
import reproduce
import yaml

from bm3il.launch.studies import pool
from bm3il.launch.studies.file import Study
from bm3il.launch.studies.rows import CURVE, Row, Rows, identity

GRID = {
    "environment": ["rover_tower?pairs=2", "rover_tower?pairs=2&slip=0.1"],
    "algorithm": ["bc", "ma-gail", "bm3il"],
}
SETTINGS = {"preset": "rover_tower_4", "evaluation.starts": "fresh"}
FIGURE: dict[str, Any] = {
    "name": "tiny",
    "title": "A title",
    "study": "tiny",
    "panel": "environment",
    "x": "env_steps",
    "baseline": "ma-gail",
    "labels": {"rover_tower?pairs=2&slip=0.1": "slipping"},
}


def study_of(folder: Path, **values: object) -> Study:
    path = folder / "tiny.yaml"
    told = {"settings": SETTINGS, "grid": GRID, "seeds": [1, 2, 3, 4], "results": "tiny.json", **values}
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    return Study.read(path)


def filled(study: Study, seeds: int = 4) -> None:
    """Rows of the runs of the first seeds: clones are good as demonstrated and bad where moves slip."""
    rows = []
    for trial in study.trials(Path("runs")):
        if trial.seed > seeds:
            continue
        slips, algorithm = "slip" in trial.settings["environment"], trial.settings.get("algorithm", "bm3il")
        end = {"bc": 0.5 if slips else 1.0, "ma-gail": 0.8, "bm3il": 0.9}[algorithm] + trial.seed / 100
        steps = [0, 0] if algorithm == "bc" else [0, 1000]
        curve: dict[str, list[float | None]] = {name: [0.0, end] for name in CURVE} | {"env_steps": steps}
        told = {"normalized_return": end, "return_mean": 100 * end, "episodes": 5}
        rows.append(
            Row(
                *(trial.name, trial.settings, identity(trial.config), trial.seed, "0123456789", 5, 1800.0, 60.0),
                {"as trained": told, "own": told},
                curve,
            )
        )
    assert study.results is not None
    Rows(study.results, []).add(rows)


def drawn_of(study: Study, **values: object) -> figures.Drawn:
    return figures.Drawn.read(reproduce.described(FIGURE | values), study, Path("runs"), "bm3il study tiny.yaml")


def test_panels_lines_and_caption_come_from_the_description(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study, 3)
    drawn = drawn_of(study)
    assert list(drawn.panels) == ["rover_tower?pairs=2", "slipping"]
    assert drawn.lines == ["bc", "ma-gail", "bm3il"]
    assert (len(drawn.rows), drawn.missing) == (18, 6)
    words = figures.caption(drawn)
    assert "18 runs, commit 0123456, seeds 1 to 3, 9.0 core-hours; 6 of 24 runs are still to come" in words
    assert "better than one of *ma-gail*" in words
    assert words.startswith("`bm3il study tiny.yaml`; ")


def test_tables_hold_every_line_against_the_baseline(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study)
    text = figures.section(drawn_of(study), "tiny.png")
    assert "**slipping**" in text
    assert "**All together**" in text
    rows = {
        cells[0]: cells[1:]
        for cells in map(_cells, text.partition("**slipping**")[2].partition("**All")[0].splitlines())
        if cells
    }
    assert rows["bc"][:2] == ["4", "0.525 [0.510, 0.540]"]
    assert rows["bc"][3:5] == ["0.00 [0.00, 0.00]", "–"]
    assert rows["bm3il"][3] == rows["bm3il"][5] == "1.00 [1.00, 1.00]"
    assert rows["bm3il"][4].startswith("0.46")  # half of the end
    assert rows["bm3il"][6:] == ["1 k", "1 k", "1 k"]
    assert rows["ma-gail"][6:] == ["1 k", "1 k", "0 of 4 runs"]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def test_of_single_runs_no_probability_is_told(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study, 1)
    drawn = drawn_of(study, panel="", x="environment", world="own", baseline="bc")
    returns, better = figures.section(drawn, "tiny.png").partition("**P**")[::2]
    assert "| slipping | 0.510 | 0.810 | 0.910 |" in returns
    assert "| slipping | – | – | – |" in better
    assert ", seed 1, 3.0 core-hours" in returns


def test_values_side_by_side_and_probabilities(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study)
    drawn = drawn_of(study, panel="", x="environment", world="own", baseline="bc")
    text = figures.section(drawn, "tiny.png")
    returns, better = text.partition("**P**")[::2]
    assert "| slipping | 0.525 [0.510, 0.540] | 0.825 [0.810, 0.840] | 0.925 [0.910, 0.940] |" in returns
    assert "| slipping | – | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in better
    assert "| rover_tower?pairs=2 | – | 0.00 [0.00, 0.00] | 0.00 [0.00, 0.00] |" in better
    assert "| all together | – | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in better  # by task, and not over all runs
    by_panel = figures.section(drawn_of(study, x="", world="own", baseline="bc"), "tiny.png").partition("**P**")[2]
    assert "| slipping | – | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in by_panel
    alone = figures.section(drawn_of(study, x="", world="own", baseline=""), "tiny.png")
    assert "| slipping | 0.525" in alone
    assert not [word for word in ("**P**", "probability", "**Areas", "of two runs") if word in alone]


def test_areas_are_told_where_they_are_asked_for_and_intervals_of_two_runs_are_called_so(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study, 2)
    text = figures.section(drawn_of(study, x="", world="own", baseline="", areas=True), "tiny.png")
    assert "95% bootstrap intervals (of two runs: the lesser and the greater)." in text
    areas = text.partition("**Areas under the curves**")[2]
    assert "| slipping | – | 0.408 [0.405, 0.410] | 0.458 [0.455, 0.460] |" in areas


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"panel": "", "x": "environment", "world": "own"},
        {"x": "", "world": "own"},
        {"paper": {"rover_tower?pairs=2": "paper.csv", "rover_tower?pairs=2&slip=0.1": "none.csv"}},
    ],
)
def test_every_kind_of_picture_has_something_on_it(tmp_path: Path, values: dict[str, object]) -> None:
    study = study_of(tmp_path)
    filled(study)
    names = ("BM3IL", "MTMFIL", "MA-DAAC", "MA-GAIL")
    columns = ["epoch", *(f"{name}_{part}" for name in names for part in ("mean", "low", "high"))]
    lines = [",".join(columns), *(",".join([str(epoch), *["", "1", "2"] * 4]) for epoch in range(3))]
    (tmp_path / "paper.csv").write_text("\n".join(lines))
    path = figures.draw(drawn_of(study, **values), tmp_path / "out", tmp_path)
    assert path == tmp_path / "out" / "tiny.png"
    assert matplotlib.image.imread(path).std() > 0.05


def test_an_algorithm_looks_the_same_whatever_is_beside_it() -> None:
    one = figures._looks(["bc", "bm3il", "maac (true reward)"])
    other = figures._looks(["L = 1", "bm3il", "bc", *(f"L = {number}" for number in range(2, 9))])
    assert one["bm3il"] == other["bm3il"]
    assert one["bc"] == other["bc"]
    assert len({tuple(look.items()) for look in other.values()}) == len(other)


def test_a_row_far_from_all_others_is_told_at_the_edge() -> None:
    """Else the others, of which the figure is, would lie in one line."""
    near = {-float(n): 0.9 + n / 1000 for n in range(8)} | {-8.0: 0.83}
    assert figures._far(near | {-9.0: 0.01, -10.0: 2.0}) == {-9.0: 0.01, -10.0: 2.0}
    assert figures._far({0.0: 0.9, -1.0: 0.01, -2.0: 0.89, -3.0: 0.91}) == {-1.0: 0.01}, "also of few"
    assert figures._far({-float(n): n / 8 for n in range(8)}) == figures._far({}) == {}


def test_panels_of_rows_lie_below_each_other_and_rows_are_equally_high(tmp_path: Path) -> None:
    first = {"environment": ["rover_tower?pairs=2"], "algorithm": ["bc"]}
    study = study_of(tmp_path, grid=[first, GRID | {"environment": ["rover_tower?pairs=2&slip=0.1"]}])
    filled(study)
    figure, grid = figures._axes(drawn_of(study, x="", world="own"), 1)
    figure.draw_without_rendering()
    one, three = (axes.get_position() for axes in grid[0])
    assert (one.x0, one.x1) == (three.x0, three.x1)
    assert one.y0 > three.y1
    assert three.height == pytest.approx(3 * one.height, rel=0.01)


def test_from_a_plan_to_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs are trained, and the page says so; the next time nothing is."""
    tiny = {
        "demonstration_episodes": 2,
        "steps": 100,
        "actor": {"hidden": [16], "steps_per_iteration": 50},
        "learner": {"hidden": 16, "clipped": {"epochs": 1, "parts": 2}},
        "reward": {"hidden": [16], "updates": 1, "batch-size": 8},
        "evaluation": {"starts": "fresh", "episodes": 1, "final_episodes": 2, "interval": 1},
    }
    demonstrations = "runs/demonstrations/tower.safetensors"
    settings = {"preset": "rover_tower_4", "demonstrations": demonstrations, **tiny}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    study_of(tmp_path, settings=settings, grid={"algorithm": ["ma-gail", "mtmfil"]}, seeds=[1], core_seconds=1800)
    plan = {
        "demonstrations": {"tower": {"authors": "not_there.npz", "shipped": "rover_tower_4"}},
        "studies": ["tiny"],
        "figures": [FIGURE],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(reproduce, "STUDIES", tmp_path)
    monkeypatch.setattr(reproduce, "PLAN", tmp_path / "plan.yaml")
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)
    assert reproduce.main(["--dry-run"]) == 0
    assert "tiny: 2 of 2 runs to do, about 1.0 core-hours" in capsys.readouterr().out
    assert not (tmp_path / "docs" / "figures.md").exists()
    assert reproduce.main(["--jobs", "2"]) == 0
    page = (tmp_path / "docs" / "figures.md").read_text()
    assert "![A title](figures/tiny.png)" in page
    assert "2 runs" in page
    assert (tmp_path / "docs" / "figures" / "tiny.png").exists()
    assert (tmp_path / demonstrations).exists()
    assert len(Rows.read(tmp_path / "tiny.json").rows) == 2
    log = tmp_path / "runs" / "tiny" / "ma-gail_seed-1" / "log.jsonl"
    log.unlink()
    assert reproduce.main([]) == 0
    assert not log.exists()


def test_an_unreadable_file_of_results_ends_it_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(tmp_path)
    (tmp_path / "tiny.json").write_text("{")
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"demonstrations": {}, "studies": ["tiny"], "figures": [FIGURE]})
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "STUDIES", tmp_path)
    monkeypatch.setattr(reproduce, "PLAN", tmp_path / "plan.yaml")
    assert reproduce.main([]) == 2
    assert f"reproduce: {tmp_path / 'tiny.json'} does not hold" in capsys.readouterr().err


@pytest.mark.timeout(300)  # half a minute of a free core
def test_all_studies_can_be_trained_and_are_what_quick_ones_and_claims_are_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "EPISODES", 1)
    plan = reproduce.plan()
    reproduce.prepare(plan["demonstrations"], tmp_path / "no_authors")
    whole = {name: study.trials(tmp_path) for name, study in reproduce.studies(plan, plan["studies"], False).items()}
    sizes = {name: len(trials) for name, trials in whole.items()}
    assert sizes == {
        "worlds": 280,
        "figure4": 150,
        "figure3": 140,
        "few": 340,
        "imitation": 300,
        "ablations": 290,
        "attempts": 112,
        "tuning": 256,
        "tuning_few": 158,
    }
    quick = reproduce.studies(plan, plan["studies"], True)
    assert list(quick) == [name for name in whole if name not in ("attempts", "tuning", "tuning_few")]
    for name, study in quick.items():
        trials = study.trials(tmp_path)
        assert study.results == Path("runs/quick/results") / f"{name}.json"  # and not what is kept with the studies
        assert {trial.seed for trial in trials} == {1, 2}
        assert max(trial.config.steps for trial in trials) < min(trial.config.steps for trial in whole[name])
        assert {trial.config.environment for trial in trials} <= {trial.config.environment for trial in whole[name]}
    described = {values["name"]: reproduce.described(values) for values in plan["figures"]}
    for claim in map(reproduce.claimed, plan["claims"]):
        of = described[claim.figure]
        every = [trial.settings for trial in whole[of.study]]
        assert {*claim.better, *claim.than} <= {of.line(settings) for settings in every}, claim
        assert {*claim.at} <= {of.word(key, told.get(key, "")) for told in every for key in (of.panel, of.x)}, claim


def test_every_study_has_a_figure_and_every_label_is_of_something() -> None:
    plan = reproduce.plan()
    described = [reproduce.described(values) for values in plan["figures"]]
    assert {figure.study for figure in described} == set(plan["studies"])
    for figure in described:
        text = (reproduce.STUDIES / f"{figure.study}.yaml").read_text()
        for key in filter(None, (figure.panel, *figure.beside, *(() if figure.x == figures.STEPS else (figure.x,)))):
            assert f"{key}:" in text, (figure.name, key)


def test_values_that_quick_leaves_nothing_of_leave_no_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study_of(tmp_path, grid=[GRID, {"algorithm": ["mtmfil"], "steps": [100, 200]}])
    monkeypatch.setattr(reproduce, "STUDIES", tmp_path)
    values = reproduce.smaller("tiny", {"only": {"algorithm": ["bc"]}, "settings": {"steps": 7}, "seeds": [5]})
    assert values["grid"] == [{"environment": GRID["environment"], "algorithm": ["bc"]}]
    assert (values["settings"], values["seeds"], values["name"]) == (SETTINGS | {"steps": 7}, [5], "tiny")


def test_a_claim_is_held_against_runs_of_the_same_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study)
    drawn = drawn_of(study)
    claim = reproduce.claimed({"says": "a claim", "figure": "tiny", "better": ["bm3il"], "than": ["bc", "bm3il"]})
    told = claims.compared(claim, drawn)
    assert [one.where for one in told] == ["rover_tower?pairs=2", "slipping", "all together"]
    assert [one.verdict for one in told] == ["the reverse", "shown", "shown"]
    assert [one.pairs for one in told] == [4, 4, 8]
    # What a seed has in common falls out: the interval is a point, where that of each line is not.
    assert [told[1].figures[f"difference{end}"] for end in ("_low", "", "_high")] == pytest.approx([0.4] * 3)
    assert "of 2 comparisons shown 1, the reverse 1. bm3il − bc 0.150 [0.150, 0.150]" in claims.sentence(claim, told)
    assert [one.where for one in claims.in_all(told)] == ["all together"]
    assert claims.in_all(told[:1]) == told[:1]
    text = claims.section([(claim, told)], "claims.png")
    assert "| bm3il − bc | slipping | 4 | 0.400 [0.400, 0.400] | 1.00 [1.00, 1.00] | shown |" in text
    picture = claims.draw([(claim, told)], tmp_path / "claims.png")
    assert matplotlib.image.imread(picture).std() > 0.05


def test_a_claim_of_areas_and_of_places(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study)
    values = {"says": "", "figure": "tiny", "better": ["bm3il"], "than": ["ma-gail"], "by": "area", "at": ["slipping"]}
    (one,) = claims.compared(reproduce.claimed(values), drawn_of(study))
    assert one.where == "slipping"
    assert one.figures["difference"] == pytest.approx(0.05)  # of the end it is 0.1
    clones = reproduce.claimed(values | {"than": ["bc"]})
    assert claims.compared(clones, drawn_of(study)) == []  # a clone takes no steps


def test_seeds_without_a_partner_and_single_ones_are_left_out(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    filled(study, 1)
    values = {"says": "", "figure": "tiny", "better": ["bm3il"], "than": ["ma-gail"]}
    assert claims.compared(reproduce.claimed(values), drawn_of(study)) == []
    filled(study, 3)
    assert {one.pairs for one in claims.compared(reproduce.claimed(values), drawn_of(study))} == {3, 6}


def test_runs_are_called_what_the_study_calls_them(tmp_path: Path) -> None:
    """And not what that of the row did: one that was trained as part of another grid would be on no line."""
    study = study_of(tmp_path)
    filled(study)
    assert study.results is not None
    rows = Rows.read(study.results)
    rows.add([replace(row, settings={"environment": "another"}, run=f"other-{n}") for n, row in enumerate(rows.rows)])
    drawn = drawn_of(study)
    assert (list(drawn.panels), drawn.lines) == (["rover_tower?pairs=2", "slipping"], ["bc", "ma-gail", "bm3il"])


@pytest.mark.parametrize(
    ("codes", "ends", "begun"), [((1, 0), 1, 2), ((0, 1), 1, 2), ((130, 0), 130, 1), ((2, 0), 2, 1)]
)
def test_a_study_in_which_runs_failed_does_not_keep_others_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], ends: int, begun: int
) -> None:
    """Nor the page from being drawn; what was stopped, or cannot be meant, ends it at once."""
    study = study_of(tmp_path)
    filled(study)
    (tmp_path / "other.yaml").write_text((tmp_path / "tiny.yaml").read_text())
    plan = {"demonstrations": {}, "studies": ["tiny", "other"], "figures": [FIGURE]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "STUDIES", tmp_path)
    monkeypatch.setattr(reproduce, "PLAN", tmp_path / "plan.yaml")
    told: list[str] = []
    monkeypatch.setattr(reproduce, "bm3il", lambda command: (told.append(command[1]), codes[len(told) - 1])[1])
    assert reproduce.main([]) == ends
    assert len(told) == begun
    assert (tmp_path / "docs" / "figures.md").exists() is (begun == 2)
