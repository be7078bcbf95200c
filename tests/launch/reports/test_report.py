"""`bm3il report`: the pages of runs and studies."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bm3il
from bm3il.launch.cli import main
from bm3il.launch.config import Config, load_preset
from bm3il.launch.learned import pictures
from bm3il.launch.locks import locked
from bm3il.launch.reports.recorded import read_curve, read_log
from bm3il.launch.reports.report import render, write_report
from bm3il.launch.reports.run_page import run_page
from bm3il.launch.reports.study_page import estimate, study_page
from bm3il.protocol.errors import InputError

HOSTILE = "<script>alert('&\"')</script>"
TYPES = {
    "rover": {"return_mean": 111.25, "return_stderr": 5.5, "random_return": -7.25, "expert_return": 134.75},
    "tower": {"return_mean": 123.5, "return_stderr": 6.5, "random_return": -8.5, "expert_return": 129.5},
}
NORMALIZED = {"rover": 0.8345, "tower": 0.9565}
TINY: dict[str, Any] = {
    "mode": "serial",
    "learner__updates": 1,
    "learner__batch_size": 16,
    "reward__updates": 1,
    "reward__batch_size": 16,
    "evaluation__starts": "fresh",
    "evaluation__episodes": 2,
    "evaluation__final_episodes": 2,
}


def lines(folder: Path, name: str, objects: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in objects))


def iteration(number: int) -> dict[str, float]:
    return {
        "iteration": number,
        "accuracy_agent": 0.7125,
        "accuracy_expert": 0.6375,
        "discriminator_loss": 0.6123,
        "discriminator_entropy": 0.6456,
        "particle_deviation": 0.0987,
        "particle_distance": 10.625,
        "repulsion_ratio": 0.0085,
        "reward": 0.5747,
        "critic_loss": 0.0042,
        "policy_entropy": 1.6 * 0.99**number,
        "something_new": 77.25,
        "env_steps": 800 * number,
        "wall_seconds": 1.5 * number,
        "seconds_update": 0.75,
        "seconds_collect": 0.125,
        "seconds_wait_for_chunks": 0.5,
    }


def event(second: float, what: str, process: str, text: str, **facts: object) -> dict[str, object]:
    minutes, seconds = divmod(second, 60)
    time = f"2026-11-27T14:{minutes:02.0f}:{seconds:06.3f}Z"
    return {"time": time, "seconds": second, "event": what, "process": process, "text": text} | facts


EVENTS = [
    event(0, "start", "supervisor-0", "bm3il 0.1.0 started", command="bm3il train --preset rover_tower_4 --run night"),
    event(15, "checkpoint", "learner-0", "checkpoint of iteration 0"),
    event(65, "restart", "reward-server-0", "was killed by SIGKILL; starting it again"),
    event(70, "back", "reward-server-0", "works again, 4 s after its last sign"),
    event(71, "rewind", "learner-0", "goes back from iteration 49 to the last checkpoint"),
    event(90, "state", "actor-1", "dead: has not been heard for 10 s", state="dead"),
    event(120, "state", "actor-1", "alive again for 10 s", state="alive"),
    event(130, "joined", "actor-9", "an actor of bm3il join"),
    event(300, "end", "supervisor-0", "finished", status="finished"),
]


def make_run(folder: Path, config: Config, iterations: int = 300) -> Path:
    """A run's folder as one leaves it that has everything."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    lines(folder, "log.jsonl", [iteration(number) for number in range(1, iterations + 1)])
    columns = [f"{key}.{name}" for name in TYPES for key in ("return_mean", "return_stderr", "normalized_return")]
    names = ["iteration,env_steps,wall_seconds,return_mean,return_stderr,normalized_return,episodes", *columns]
    rows = [",".join(names)]
    for number in range(0, iterations + 1, 50):
        mean = 120 - 127 * 0.98**number
        rows.append(
            f"{number},{800 * number},{1.5 * number},{mean},{2.5},{(mean + 7) / 139},100" + f",{mean},2,0.9" * 2
        )
    (folder / "curve.csv").write_text("\n".join(rows) + "\n")
    result = {
        "status": "finished",
        "env_steps": 800 * iterations,
        "iterations": iterations,
        "wall_seconds": 3725.0,
        "return_mean": 117.375,
        "return_stderr": 6.125,
        "random_return": -7.875,
        "expert_return": 132.125,
        "normalized_return": 0.8946,
        "types": {name: told | {"normalized_return": NORMALIZED[name]} for name, told in TYPES.items()},
        "started": "2026-11-27T14:57:41+00:00",
        "ended": "2026-11-27T15:04:45+00:00",
        "version": "0.1.0",
        "commit": "2f11a49b9f24e16cf0ab496b2be2986f43700b48-dirty",
        "torch": "2.13.0+cpu",
        "host": "workstation",
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines(folder, "events.jsonl", EVENTS)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = replace(load_preset("rover_tower_4"), seed=17, steps=240_000, run="night").checked()
    return make_run(tmp_path / "night", replace(config, reward=replace(config.reward, particles=8)))


class _Page(HTMLParser):
    """What a browser makes of a page, as far as it matters here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.shown).split())


def page_of(folder: Path) -> _Page:
    return _Page(write_report(folder).read_text(encoding="utf-8"))


def test_every_section_tells_its_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    text = _Page((folder / "report.html").read_text(encoding="utf-8")).text
    head = ("bm3il on rover_tower?pairs=2", "finished", "Seed17", "2.13.0+cpu", "workstation", "2f11a49b9f24-dirty")
    times = ("1 h 2 min", "Started, UTC2026-11-27 14:57:41", "bm3il train --preset rover_tower_4 --run night")
    returns = ("117.4", "± 6.1 s.e.", "0.895", "−7.9", "132.1", "111.2", "0.835", "123.5", "0.957")
    stages = ("update225.00", "54.5 %", "wait_for_chunks150.00", "500.0")
    health = ("0.7125", "0.6375", "0.6123", "0.6456", "0.0987", "10.62", "0.0085", "0.6931")
    others = ("0.5747", "0.0042", "something_new 77.25")
    happened = (
        "1:05",
        "was killed by SIGKILL; starting it again",
        "rewind",
        "an actor of bm3il join",
        "checkpoints and evaluations (1)",
    )
    for told in (*head, *times, *returns, *stages, *health, *others, *happened):
        assert told in text, told


def test_a_page_needs_nothing_but_itself(folder: Path) -> None:
    for tag, attributes in page_of(folder).tags:
        assert tag not in ("script", "iframe", "object", "base", "form")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    text = (folder / "report.html").read_text()
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text


def test_what_files_hold_is_text_and_no_markup(folder: Path) -> None:
    config = Config.from_yaml((folder / "config.yaml").read_text(), "")
    (folder / "config.yaml").write_text(replace(config, environment=HOSTILE, hostfile=HOSTILE).to_yaml())
    (folder / "log.jsonl").write_text(json.dumps(iteration(1) | {HOSTILE: 3, f"seconds_{HOSTILE}": 4}) + "\n")
    result = json.loads((folder / "result.json").read_text())
    result |= dict.fromkeys(("status", "error", "host", "version", "commit", "policy_sha256"), HOSTILE)
    result["types"] = {HOSTILE: TYPES["rover"], "tower": TYPES["tower"]}
    (folder / "result.json").write_text(json.dumps(result))
    lines(folder, "events.jsonl", [event(1, HOSTILE, HOSTILE, HOSTILE, command=HOSTILE), *EVENTS])
    page = page_of(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) > 10
    assert {attributes["class"] for tag, attributes in page.tags if tag == "table" and "class" in attributes} == set()


def test_lines_that_are_damaged_are_left_out_and_told(folder: Path) -> None:
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"iteration": 301, "cut\n[1, 2]\n{"critic_loss": 4}\n\xff\xfe\n' + b"[" * 100_000 + b"\n{}")
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"time": "soon", "event": "a", "process": "b", "text": "c"}\n')
    with (folder / "curve.csv").open("a") as file:
        file.write("351,abc\n")
    text = page_of(folder).text
    assert "5 damaged lines of log.jsonl left out" in text
    assert "1 damaged line of events.jsonl left out" in text
    assert "1 damaged line of curve.csv left out" in text
    assert len(read_log(folder).rows) == 300


def test_returns_of_an_expert_in_another_world_are_told_as_such(folder: Path) -> None:
    assert "may be out of reach" not in page_of(folder).text
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"changes": "rover_tower?pairs=2"}))
    assert (
        "are as demonstrated, in 'rover_tower?pairs=2': in this world they may be out of reach" in page_of(folder).text
    )


def test_numbers_that_no_chart_can_hold_are_none(folder: Path) -> None:
    odd = [1e308, math.nan, math.inf, 10**400, True, [1], {"a": 1}, "1e999", None, -5e200, "7.5"]
    lines(folder, "log.jsonl", [{"iteration": i, "reward": value} for i, value in enumerate(odd)])
    assert read_log(folder)["reward"] == [None] * 10 + [7.5]
    assert "7.5" in page_of(folder).text
    text = (folder / "report.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_clone_has_neither_particles_nor_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "clone", replace(load_preset("rover_tower_4"), algorithm="bc").checked())
    lines(folder, "log.jsonl", [{"iteration": 1, "cloning_loss": 1.25, "held_out_loss": 1.375, "env_steps": 0}])
    (folder / "curve.csv").write_text("iteration,env_steps,return_mean,return_stderr\n0,0,1,2\n30,0,90,2\n")
    text = page_of(folder).text
    assert "episodes held out 1.375" in text
    assert "over iterations" in (folder / "report.html").read_text()
    for title in ("Discriminators", "Particles", "Where the time went", "Attention", "Days in town"):
        assert title not in text


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_preset("rover_tower_4").to_yaml())
    text = page_of(tmp_path).text
    assert "killed" in text
    assert "As the preset has it." in text
    for title in ("Learning curve", "Where the time went", "What happened", "Note"):
        assert title not in text


def test_settings_that_are_not_the_presets_are_marked(folder: Path) -> None:
    changed = {setting.key: (setting.value, setting.preset) for setting in run_page(folder).changed}
    preset = load_preset("rover_tower_4")
    assert changed == {
        "seed": ("17", "0"),
        "steps": ("240000", str(preset.steps)),
        "reward.particles": ("8", str(preset.reward.particles)),
    }


def test_the_last_evaluation_counts_until_there_is_a_result(folder: Path) -> None:
    (folder / "result.json").unlink()
    all_, *types = run_page(folder).returns
    assert all_.learned == read_curve(folder).rows[-1]["return_mean"]
    assert [(row.name, row.normalized, row.expert) for row in types] == [("rover", 0.9, None), ("tower", 0.9, None)]


def test_of_many_types_those_at_both_ends_are_drawn(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    result["types"] = {f"type {n}": TYPES["rover"] | {"normalized_return": n / 100} for n in range(100)}
    (folder / "result.json").write_text(json.dumps(result))
    names = [f"{key}.type {n}" for n in range(100) for key in ("return_mean", "normalized_return")]
    values = [str(value) for n in range(100) for value in (n, n / 100)]
    (folder / "curve.csv").write_text(
        f"iteration,env_steps,return_mean,{','.join(names)}\n1,800,5,{','.join(values)}\n"
    )
    page = run_page(folder)
    assert [chart.title for chart in page.of_types] == [f"type {n}" for n in (*range(6), *range(94, 100))]
    assert page.types_left_out == 88
    assert len(page.returns) == 101


@pytest.mark.parametrize(
    ("output", "message"),
    [("page.txt", "must be a file that ends in .html"), ("nowhere/page.html", "there is no folder")],
)
def test_pages_that_cannot_be_written_are_refused(folder: Path, output: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_report(folder, folder / output)


def test_what_is_neither_run_nor_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is the folder of no run and of no study" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_seen_at_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DAYS", 2)
    monkeypatch.setattr(pictures, "ATTENTION_EPISODES", 1)
    for name in ("_draw_maps", "_draw_loads", "_draw_places"):  # they take seconds, and have a test of their own
        monkeypatch.setattr(pictures, name, lambda *drawn, name=name: drawn[-1].write_bytes(name.encode()))
    tiny = TINY | {"actor__steps_per_iteration": 180, "learner__start": "random", "demonstration_episodes": 1}
    bm3il.train("berlin", steps=180, run="town", runs_folder=tmp_path, **tiny)
    page = run_page(tmp_path / "town")
    seen = page.seen
    assert len(seen.types) == 10
    np.testing.assert_allclose(np.sum(seen.attention, axis=1), 1, atol=1e-5)
    title, address = seen.pictures[1]
    assert title == "Loads of the roads over the day"
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == b"_draw_loads"
    text = _Page(render("run.html.jinja", run=page)).text
    for title in ("Where the time went", "Attention", "Days in town"):
        assert title in text
    for checkpoint in (tmp_path / "town" / "checkpoints").glob("0*/checkpoint.json"):
        checkpoint.write_text("{")
    text = page_of(tmp_path / "town").text
    assert "Note: the policy was not seen at play" in text
    assert "Attention" not in text


def study_run(number: int, algorithm: str, mean: float, **others: object) -> dict[str, object]:
    evaluations = {world: {"return_mean": mean, "normalized_return": mean / 100} for world in ("as trained", "slip")}
    run = {"run": f"{algorithm}-{number}", "settings": {"algorithm": algorithm, "steps": 9}, "seed": number}
    return run | {"status": "finished", "reason": "", "evaluations": evaluations} | others


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    config = load_preset("rover_tower_4")
    for name in ("bm3il-0", "bm3il-1", "bm3il-2", "bc-0"):
        make_run(folder / name, config, 300 if name == "bm3il-0" else 250)
    (folder / "bm3il-0" / "report.html").write_text("")
    (tmp_path / "outside").mkdir()
    runs = [
        study_run(0, "bm3il", 80.0),
        study_run(1, "bm3il", 90.0),
        study_run(2, "bm3il", 85.0),
        study_run(0, "bc", 60.0),
        study_run(1, "bc", 60.0, status="failed", reason=f"actor-0 died: {HOSTILE}", evaluations={}),
        study_run(2, "bc", 60.0, run="../outside", status="waiting", evaluations={}),
        study_run(3, "bc", 60.0, run="javascript:alert(1)", status="waiting", evaluations={}),
    ]
    (folder / "study.json").write_text(json.dumps({"version": 1, "name": "two algorithms", "runs": runs}))
    return folder


def test_a_study_tells_what_its_groups_come_to(study: Path) -> None:
    page = page_of(study)
    for told in ("two algorithms", "7 runs, which differ in algorithm and seed", "steps9", "0.850", "0.800 … 0.900"):
        assert told in page.text, told
    assert f"actor-0 died: {HOSTILE}" in page.text
    found = study_page(study, study)
    assert [world.name for world in found.worlds] == ["as trained", "slip"]
    clone = found.worlds[0].rows[1]
    assert (clone.group, clone.runs, clone.mean, clone.low) == (("bc",), 1, 0.6, None)
    assert clone.at == pytest.approx(60), "of an axis from random to the expert"
    (chart,) = found.curves
    assert [line.name for line in chart.lines] == ["bm3il (3)", "bc (1)"]
    assert max(chart.lines[0].x) == 800 * 250, "as far as all of them have come"


def test_worlds_without_a_true_reward_are_told_from_bad_policies(folder: Path, study: Path) -> None:
    hint = "all returns are 0"
    assert hint not in page_of(folder).text
    head, *rows = (folder / "curve.csv").read_text().splitlines()
    zeros = [",".join([*row.split(",")[:3], "0", "0", "", *row.split(",")[6:]]) for row in rows]
    (folder / "curve.csv").write_text("\n".join([head, *zeros]))
    assert hint not in page_of(folder).text  # the expert has earned something
    told = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(told | {"random_return": 0.0, "expert_return": 0.0}))
    assert hint in page_of(folder).text
    assert hint not in page_of(study).text
    runs = [study_run(seed, "bm3il", 0.0) for seed in range(2)]
    (study / "study.json").write_text(json.dumps({"version": 1, "name": "zeros", "runs": runs}))
    assert hint in page_of(study).text


def test_who_plays_no_steps_is_held_against_those_who_do(study: Path) -> None:
    (study / "bc-0" / "curve.csv").write_text("iteration,env_steps,return_mean\n0,0,-7\n30,0,90\n")
    (chart,) = study_page(study, study).curves
    assert [line.name for line in chart.lines] == ["bm3il (3)"]
    assert [(reference.name, reference.value) for reference in chart.references] == [("bc (1)", 90.0)]


def test_links_of_a_study_lead_to_its_runs_alone(study: Path, tmp_path: Path) -> None:
    links = [attributes["href"] for tag, attributes in page_of(study).tags if tag == "a"]
    assert links == ["./bm3il-0/report.html", "./bm3il-1/", "./bm3il-2/", "./bc-0/"]
    elsewhere = study_page(study, tmp_path).runs[0].link
    assert (tmp_path / elsewhere).samefile(study / "bm3il-0" / "report.html")


def test_an_estimate_is_that_of_the_middle_half() -> None:
    scores = np.array([0.0, 10.0, 20.0, 30.0, 1000.0, -500.0, 15.0, 25.0])
    mean, low, high = estimate(scores)
    assert mean == np.mean([10, 15, 20, 25])
    assert low < mean < high
    assert np.isnan(estimate(scores[:1])[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"version": 1}', "expected 'runs'"),
        ('{"version": 1, "runs": [3]}', "expected 'runs'"),
        ('{"version": 2, "runs": [{"run": "a"}]}', "has version 2"),
    ],
)
def test_what_is_no_record_of_a_study_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--hide-scrollbars"),
)
FRAMES = """<!doctype html><meta charset="utf-8"><body>{frames}<script>
onload = () => {{ document.body.innerHTML = JSON.stringify([...document.querySelectorAll("iframe")].map(
  frame => [frame.clientWidth, frame.contentDocument.documentElement.scrollWidth,
            frame.contentDocument.querySelectorAll("svg.plot").length])) }}
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium: Debian's package of that name has it")
@pytest.mark.parametrize("kind", ["run", "study"])
def test_a_browser_shows_pages_at_both_widths(tmp_path: Path, folder: Path, study: Path, kind: str) -> None:
    """Nothing is wider than the window, which tables scroll in, and the console has nothing to say."""
    text = html.escape(write_report(folder if kind == "run" else study).read_text(encoding="utf-8"))
    frames = [f'<iframe style="border: 0; width: {w}px; height: 900px" srcdoc="{text}"></iframe>' for w in (1280, 400)]
    page = tmp_path / "frames.html"
    page.write_text(FRAMES.format(frames="".join(frames)), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *FLAGS, profile, "--window-size=1400,1000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    shown = json.loads(_Page(done.stdout).text)
    assert [(width, scrolled) for width, scrolled, _ in shown] == [(1280, 1280), (400, 400)]
    assert all(plots > 0 for _, _, plots in shown)
    assert "CONSOLE" not in done.stderr


def test_the_page_of_a_run_that_is_running_again_tells_nothing_of_how_it_ended_before(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "failed", "error": "no chunk", "iterations": 7}))
    assert run_page(folder).error == "no chunk"
    with locked(folder):
        page = run_page(folder)
    assert (page.state, page.error, dict(page.facts)["Iterations"]) == ("running", "", "300")
    assert page.returns[0].learned == read_curve(folder).rows[-1]["return_mean"]
