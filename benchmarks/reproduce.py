"""`make reproduce`: the studies behind docs/figures.md, and its figures; with QUICK=1 the same shapes, small.

benchmarks/reproduce.yaml says what there is to do. The rows in benchmarks/studies/results are taken as done; without
them all is trained anew. It goes on after any stop. What QUICK makes lies in runs/quick, and nowhere else.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import yaml
from figures import Described, Drawn, draw, section

from bm3il.launch.cli import main as bm3il
from bm3il.launch.config import flattened
from bm3il.launch.outcome import FINISHED, INPUT_ERROR, INTERRUPTED
from bm3il.launch.studies.file import Study
from bm3il.launch.studies.rows import Rows
from bm3il.protocol.demonstrations import resolve
from bm3il.protocol.errors import InputError

HERE = Path(__file__).resolve().parent
STUDIES, PLAN = HERE / "studies", HERE / "reproduce.yaml"
QUICK, DEMONSTRATIONS = Path("runs/quick"), Path("runs/demonstrations")
PLACES = {False: (Path("runs"), Path("docs/figures.md")), True: (QUICK, QUICK / "figures.md")}
"""Of runs, and of the page with the figures: whole, and quick."""
EPISODES = 100
"""Of demonstrations that are recorded."""
HEAD = """# Figures of the studies

`make reproduce` makes this page from the rows in `benchmarks/studies/results/`, of which each is a run;
[studies.md](studies.md) tells what they cost and how settings were chosen, [results.md](results.md) what they say.
"""


def plan() -> dict[str, Any]:
    """What the file says."""
    told: dict[str, Any] = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    return told


def described(values: Mapping[str, Any]) -> Described:
    """A figure of the file."""
    return Described(**{**values, "beside": tuple(values.get("beside", ()))})


def claimed(values: Mapping[str, Any]) -> claims.Claim:
    """A claim of the file."""
    lists = {key: tuple(values[key]) for key in ("better", "than", "at") if key in values}
    return claims.Claim(**{**values, **lists})


def smaller(name: str, change: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a study's file as `quick` changes them: of the grids only some values are left, and only those that
    have any of them."""
    values = yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
    only = flattened(change.get("only", {}))
    grids = values["grid"] if isinstance(values["grid"], list) else [values["grid"]]
    kept = [{key: [v for v in of if v in only.get(key, of)] for key, of in flattened(grid).items()} for grid in grids]
    values |= {"name": name, "grid": [grid for grid in kept if all(grid.values())]}
    values["settings"] = flattened(values["settings"]) | flattened(change.get("settings", {}))
    values |= {key: value for key, value in change.items() if key not in ("settings", "only")}
    values["core_seconds"] = change.get("core_seconds", 20)
    return values


def prepare(demonstrations: Mapping[str, Mapping[str, str]], authors: Path) -> None:
    """Make the demonstrations that the studies name and that are not there yet. Raises InputError if that fails."""
    DEMONSTRATIONS.mkdir(parents=True, exist_ok=True)
    for name, how in demonstrations.items():
        path = DEMONSTRATIONS / f"{name}.safetensors"
        if path.exists():
            continue
        if "record" in how:
            command = ["demonstrations", "record", how["record"], "--episodes", str(EPISODES), "--output", str(path)]
        elif (authors / how["authors"]).exists():
            command = ["demonstrations", "import", str(authors / how["authors"]), "--output", str(path)]
        else:
            print(
                f"{name}: {authors / how['authors']} is not there (--authors FOLDER); {how['shipped']}, ours, instead"
            )
            shutil.copyfile(resolve(how["shipped"]), path)
            continue
        if bm3il(command):
            raise InputError(f"{path} could not be made")


def studies(told: Mapping[str, Any], names: Sequence[str], quick: bool) -> dict[str, Study]:
    """The studies of these names; the small ones are written where their runs will lie."""
    if not quick:
        return {name: Study.read(STUDIES / f"{name}.yaml") for name in names}
    QUICK.mkdir(parents=True, exist_ok=True)
    names = [name for name in names if name in told["quick"]]
    for name in names:
        text = yaml.safe_dump(smaller(name, told["quick"][name]), sort_keys=False)
        (QUICK / f"{name}.yaml").write_text(text, encoding="utf-8")
    return {name: Study.read(QUICK / f"{name}.yaml") for name in names}


def estimate(found: Mapping[str, Study], runs: Path, jobs: int) -> None:
    """Say what is left to do."""
    total = 0.0
    for name, study in found.items():
        assert study.results is not None
        rows, trials = Rows.read(study.results), study.trials(runs / name)
        left = sum(rows.find(trial.config) is None for trial in trials)
        hours = left * (study.core_seconds or 0) / 3600
        total += hours
        print(f"{name}: {left} of {len(trials)} runs to do, about {hours:.1f} core-hours")
    print(f"all: about {total:.1f} core-hours, {total / jobs:.1f} hours with {jobs} at once", flush=True)


def show(told: Mapping[str, Any], found: Mapping[str, Study], quick: bool, authors: Path) -> None:
    """Draw the figures of studies that have rows, and write the page with them, the claims before all."""
    parts, runs, page = [], *PLACES[quick]
    known: dict[str, Drawn] = {}
    for figure in map(described, told["figures"]):
        study = found.get(figure.study)
        if study is None or study.results is None or not study.results.exists():
            continue
        command = "make reproduce QUICK=1" if quick else f"bm3il study benchmarks/studies/{figure.study}.yaml"
        drawn = Drawn.read(figure, study, runs / figure.study, command)
        if drawn.panels:
            path = draw(drawn, page.parent / page.stem, authors / "paper_curves")
            parts.append(section(drawn, f"{page.stem}/{path.name}"))
            known[figure.name] = drawn
            print(path)
    every = [claim for claim in map(claimed, told.get("claims", [])) if claim.figure in known]
    held = [(claim, found) for claim in every if (found := claims.compared(claim, known[claim.figure]))]
    if held:
        print(path := claims.draw(held, page.parent / page.stem / "claims.png"))
        parts.insert(0, claims.section(held, f"{page.stem}/{path.name}"))
    page.write_text("\n\n".join([HEAD, *parts]) + "\n", encoding="utf-8")
    print(page)


def main(arguments: Sequence[str]) -> int:
    told = plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, in twenty minutes of two cores")
    names = ", ".join(told["studies"])
    parser.add_argument(
        "--only", nargs="+", choices=told["studies"], default=told["studies"], metavar="STUDY", help=names
    )
    parser.add_argument("--figures", action="store_true", help="train nothing: draw what there is")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: say what is left to do, and how long")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--authors", type=Path, default=Path("../shared/data"), help="data of the paper's authors")
    given = parser.parse_args(arguments)
    runs, _ = PLACES[given.quick]
    worst = FINISHED
    try:
        prepare(told["demonstrations"], given.authors)
        found = studies(told, given.only, given.quick)
        if not given.figures:
            estimate(found, runs, given.jobs)
        if given.dry_run:
            return 0
        for study in () if given.figures else found.values():
            code = bm3il(["study", study.source, "--jobs", str(given.jobs), "--runs-folder", str(runs)])
            if code in (INTERRUPTED, INPUT_ERROR):
                return code
            worst = max(worst, code)  # what failed in one study keeps no other from its figures
        # A page holds all figures, those of studies that were not asked for, too.
        show(told, studies(told, told["studies"], given.quick), given.quick, given.authors)
    except InputError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return INPUT_ERROR
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
