"""`bm3il new-environment` writes a package that works as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bm3il.launch.environments.new import new_environment
from bm3il.protocol.errors import InputError


def test_what_is_written_passes_its_own_tests(tmp_path: Path) -> None:
    folder = tmp_path / "bus_lines"
    assert new_environment("bus_lines", folder) == 0
    info = folder / "bus_lines-0.1.0.dist-info"  # as if it were installed
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bus_lines\nVersion: 0.1.0\n")
    points = (folder / "pyproject.toml").read_text().partition("[project.entry-points.")[2].partition("[tool.")[0]
    (info / "entry_points.txt").write_text("[" + points.replace("[project.entry-points.", "[").replace('"', ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=100)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "class BusLines:" in (folder / "bus_lines.py").read_text()
    assert "my_town" not in "".join(file.read_text() for file in folder.glob("*.*") if file.is_file())


@pytest.mark.parametrize("name", ["Town", "my-town", "2towns", "", "class", "json", "berlin", "bm3il", "a/b"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"take another|expected a name"):
        new_environment(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        new_environment("bus_lines", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_not_imported_in_place_of_what_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_environment("bus_lines", None) == 0
    (folder,) = tmp_path.iterdir()
    assert not folder.name.isidentifier()
