"""`bm3il report`: a run or a study as one page of HTML, which needs no network and runs no script."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import jinja2

from bm3il.launch.reports.charts import aligned, clock
from bm3il.launch.reports.run_page import run_page
from bm3il.launch.reports.study_page import study_page
from bm3il.launch.run_folder import CONFIG, STUDY, missing
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically
from bm3il.protocol.version import version

NAME = "report.html"


def main(folder: Path, output: Path | None) -> int:
    """Write the page of a run's or a study's folder and print where it lies; returns the exit code."""
    path = write_report(folder, output)
    print(path)
    return 0


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page, `report.html` in the folder unless it is said where; returns its path.

    Raises InputError if this is the folder of no run and no study, or nothing can be written there.
    """
    if not folder.exists():
        raise missing(folder)
    path = folder / NAME if output is None else output
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output must be a file that ends in .html, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if (folder / STUDY).is_file():
        text = render("study.html.jinja", study=study_page(folder, path.parent))
    elif (folder / CONFIG).is_file():
        text = render("run.html.jinja", run=run_page(folder))
    else:
        raise InputError(f"{folder} is the folder of no run and of no study: it has no {CONFIG} and no {STUDY}")
    write_atomically(path, text)
    return path


def render(template: str, **page: object) -> str:
    """A page of `templates/`. Whatever it is given is text to it, and no markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bm3il.launch.reports"),
        autoescape=True,
        # A name that is misspelt in a template raises, instead of leaving a gap in the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": _clock, "aligned": aligned}
    made_at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(page, made_by=version(), made_at=made_at)


def _clock(seconds: float | None) -> str:
    return "–" if seconds is None else clock(seconds)
