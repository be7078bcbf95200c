"""By what, on what and where a result was made."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

from bm3il.protocol.version import version

GIT_SECONDS = 5.0
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
    """Of the checkout whose top `source` is, else None."""
    if not (source / ".git").exists():  # it may lie in the checkout of something else
        return None
    try:
        command = ["git", "-C", str(source), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=GIT_SECONDS, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, another owner, a broken checkout, a slow disk
        return None
    return done.stdout.strip() or None
