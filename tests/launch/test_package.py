"""What is installed: one package, with all that it reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("actors", "launch", "learner", "protocol", "reward_server")


def test_nothing_imports_a_room_by_its_bare_name() -> None:
    """It would find it in this folder, as a second copy of the same module, and nothing of the kind where it is
    installed."""
    bare = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS)})\b", re.MULTILINE)
    folders = (*ROOMS, "bm3il", "benchmarks", "tests", "deploy")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert [str(path) for path in files if bare.search(path.read_text(encoding="utf-8"))] == []


def test_a_folder_of_its_name_does_not_hide_it(tmp_path: Path) -> None:
    """A notebook beside the clone, of which Python would make an empty package."""
    (tmp_path / "bm3il").mkdir()
    (tmp_path / "bm3il" / "README.md").touch()
    beside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import bm3il; print(bm3il.__all__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=beside, capture_output=True, text=True, timeout=60)
    assert "train" in done.stdout, f"{done.stderr}an old install? pip install --editable ."


@pytest.mark.processes
def test_a_wheel_has_one_name_and_everything_that_is_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=110)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"bm3il"}
    kinds = ("py", "yaml", "safetensors", "json", "jinja", "css")
    read = [path for room in ROOMS for kind in kinds for path in (ROOT / room).rglob(f"*.{kind}")]
    assert {f"bm3il/{path.relative_to(ROOT)}" for path in read} <= set(names)
