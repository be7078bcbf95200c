"""By what, on what and where a result was made."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

from bm3il.protocol.version import version

GIT_SECONDS = 5.0
RESULTS = "benchmarks/studies/results"
MADE = RESULTS, "docs/figures.md", "docs/figures"
"""What studies write, while others of them go on."""
SOURCE = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, str | None]:
    """Facts for a result: `version` of bm3il, `commit` of its source tree (with `-dirty` if files were changed since;
    None if it is not a git checkout), `torch`, `python`, `host`. Never fails."""
    return {
        "version": version(),
        "commit": commit(SOURCE),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "host": socket.gethostname(),
    }


def commit(source: Path) -> str | None:
    """Of the checkout whose top `source` is, else None; `-dirty` if files were changed since, beside those of MADE."""
    if not (source / ".git").exists():  # it may lie in the checkout of something else
        return None
    try:
        head = _git(source, "rev-parse", "HEAD")
        others = [f":(exclude){path}" for path in MADE]
        changed = _git(source, "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, another owner, a broken checkout, a slow disk
        return None
    return f"{head}-dirty" if changed else head


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=GIT_SECONDS, check=True)
    return done.stdout.strip()
