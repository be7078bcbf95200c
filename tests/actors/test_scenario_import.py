"""Scenarios from the folders of others: tiny ones made here, and real ones where they are at hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from bm3il.actors.environments.berlin.aggregation import Hours, aggregate
from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.environments.berlin.raw_network import RawNetwork
from bm3il.actors.environments.berlin.scenario import Scenario
from bm3il.actors.environments.berlin.scenario_file import load_scenario
from bm3il.launch.cli import main
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

SIZE = 6


def imported(folder: Path, output: Path, *options: str) -> Scenario:
    assert main(["scenario", "import", str(folder), "--output", str(output), *options]) == 0
    return load_scenario(str(output))


def grid_links() -> list[tuple[int, int]]:
    nodes = [(x, y) for x in range(SIZE) for y in range(SIZE)]
    steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
    pairs = [((x, y), (x + dx, y + dy)) for x, y in nodes for dx, dy in steps]
    return [(nodes.index(a) + 1, nodes.index(b) + 1) for a, b in pairs if b in nodes]


@pytest.fixture
def tntp(tmp_path: Path) -> Path:
    """A grid of 36 nodes, all of them zones."""
    folder = tmp_path / "grid"
    folder.mkdir()
    links = "\n".join(f"\t{a}\t{b}\t1000\t1\t5\t0.15\t4\t0\t0\t1\t;" for a, b in grid_links())
    (folder / "grid_net.tntp").write_text(
        f"<NUMBER OF ZONES> 36\n<FIRST THRU NODE> 1\n<END OF METADATA>\n\n~ from to capacity\n{links}\n"
    )
    nodes = "\n".join(f"{n + 1}\t{n // SIZE}\t{n % SIZE}\t;" for n in range(SIZE**2))
    (folder / "grid_node.tntp").write_text(f"Node\tX\tY\t;\n{nodes}\n")
    random = np.random.default_rng(0)
    lines = ["<NUMBER OF ZONES> 36", "<END OF METADATA>", ""]
    for origin in range(1, 37):
        lines += [f"Origin \t{origin}", "".join(f"{d} : {random.integers(0, 90)}.0;  " for d in range(1, 37))]
    (folder / "grid_trips.tntp").write_text("\n".join(lines))
    return folder


@pytest.fixture
def matsim(tmp_path: Path) -> Path:
    """The same grid, kilometres wide, with ninety commuters."""
    folder = tmp_path / "matsim"
    folder.mkdir()
    nodes = "".join(f'<node id="n{n + 1}" x="{n // SIZE * 1000}" y="{n % SIZE * 1000}"/>' for n in range(SIZE**2))
    links = "".join(
        f'<link id="{i}" from="n{a}" to="n{b}" length="1000" freespeed="10" capacity="2400" permlanes="1"/>'
        for i, (a, b) in enumerate(grid_links())
    )
    (folder / "network.xml").write_text(
        f'<network><nodes>{nodes}</nodes><links capperiod="02:00:00">{links}</links></network>'
    )
    random = np.random.default_rng(1)
    persons = ""
    for person in range(90):
        stops = "".join(
            f'<act type="{kind}" x="{x}" y="{y}"/>'
            for kind, (x, y) in zip("hw", random.uniform(0, 5000, (2, 2)), strict=True)
        )
        persons += f'<person id="{person}"><plan selected="yes">{stops}</plan></person>'
    with gzip.open(folder / "plans.xml.gz", "wt") as file:
        file.write(f"<plans>{persons}</plans>")
    return folder


def test_tntp_links_as_they_are(tntp: Path, tmp_path: Path) -> None:
    scenario = imported(tntp, tmp_path / "s.json", "--roads", "0", "--facilities", "6")
    assert (scenario.num_roads, scenario.num_facilities) == (len(grid_links()), 6)
    assert (scenario.free_flow_minutes == 5).all()
    np.testing.assert_allclose(scenario.load_vehicles, 1000 * 5 / 60)
    assert np.median(scenario.load_agents) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["tntp", "matsim"])
def test_aggregation_gives_what_was_asked_for(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    scenario = imported(folder, tmp_path / "s.json", "--roads", "18", "--facilities", "4")
    assert (scenario.num_roads, scenario.num_facilities, scenario.kinds) == (18, 4, ("home", "home", "work", "work"))
    again = imported(folder, tmp_path / "again.json", "--roads", "18", "--facilities", "4")
    np.testing.assert_array_equal(scenario.transitions, again.transitions)
    environment = make_environment(f"berlin?scenario={tmp_path / 's.json'}&types=1&agents=4", 2)
    assert isinstance(environment, Berlin)
    environment.reset(0)


def test_matsim_units(matsim: Path, tmp_path: Path) -> None:
    scenario = imported(matsim, tmp_path / "s.json", "--roads", "0", "--facilities", "4")
    np.testing.assert_allclose(scenario.free_flow_minutes, 100 / 60)
    np.testing.assert_allclose(scenario.load_vehicles, 100 / 3600 * 1200)


def test_without_coordinates_a_layout_is_made(tntp: Path, tmp_path: Path) -> None:
    (tntp / "grid_node.tntp").unlink()
    assert imported(tntp, tmp_path / "s.json", "--roads", "0", "--facilities", "4").num_roads == len(grid_links())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("grid_net.tntp", "1000\t1\t5", "1000\t1\t-5", "line 6: expected a time ≥ 0"),
        ("grid_net.tntp", "1000\t1\t5", "oops\t1\t5", "line 6: expected a number as capacity, found 'oops'"),
        ("grid_node.tntp", "36\t5\t5", "37\t5\t5", "1 nodes of the network have no coordinates, the first is 36"),
        ("grid_trips.tntp", "1 : ", "1 ; ", "expected 'destination : trips'"),
    ],
)
def test_broken_tntp_names_the_line(tntp: Path, file: str, old: str, new: str, message: str) -> None:
    path = tntp / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read(tntp)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('from="n1"', 'from="n99"', "joins the unknown node 'n99'"),
        ('id="n2"', 'id="n1"', "node 'n1' is there twice"),
        ('length="1000"', 'length="long"', "length must be a number, got 'long'"),
        ('length="1000"', 'length="-5"', "link '0': expected a length, freespeed and capacity ≥ 0, got -5"),
        ("<nodes>", "<nodes", "expected a MATSim XML file"),
    ],
)
def test_broken_matsim_names_the_element(matsim: Path, old: str, new: str, message: str) -> None:
    path = matsim / "network.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read(matsim)


def read(folder: Path) -> None:
    from bm3il.launch.environments import scenario

    scenario.read_folder(folder, scenario.Reading())


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenario", "import", str(tmp_path), "--output", str(tmp_path / "x.json")]) == 2
    assert "neither a MATSim network" in capsys.readouterr().err


def test_maps_are_drawn(tmp_path: Path) -> None:
    assert main(["scenario", "inspect", "berlin46", "--picture", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("berlin/matsim_raw", ("--radius", "17000")),
        ("networks/SiouxFalls", ()),
        ("networks/Berlin-Mitte-Center", ("--minutes-per-unit", "0.0166667")),
    ],
)
def test_real_networks(shared: Path, folder: str, options: tuple[str, ...], tmp_path: Path) -> None:
    scenario = imported(shared / "data" / folder, tmp_path / "s.json", *options)
    assert (scenario.num_roads, scenario.num_facilities) == (46, 10)
    if "matsim" in folder:  # the Berlin that ships has 5.0, 9.5 and 16.9 minutes a road
        assert 4 < scenario.free_flow_minutes.min() < np.median(scenario.free_flow_minutes) < 11
        assert scenario.free_flow_minutes.max() < 20


@pytest.mark.parametrize("roads", [8, 0])
def test_a_link_of_no_length_takes_hardly_any_time(roads: int) -> None:
    tail, head = np.array([0, 1, 1, 2, 2, 3, 3, 0]), np.array([1, 0, 2, 1, 3, 2, 0, 3])
    xy = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    minutes = np.where(np.minimum(tail, head) + np.maximum(tail, head) == 1, 0.0, 5.0)
    names = tuple("abcd")
    ends = xy[:2], xy[2:]
    raw = RawNetwork("a ring", names, xy, tail, head, minutes, np.full(8, 600.0), *ends, np.ones(2), np.ones(4, bool))
    assert (aggregate(raw, "ring", roads, 2, Hours()).free_flow_minutes > 0).all()
