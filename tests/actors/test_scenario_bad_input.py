"""Files of others as they come: each kind of oddity is either read as it is meant, or told in one line."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bm3il.actors.environments.berlin.scenario_file import load_scenario
from bm3il.launch.cli import main

SIDE = 5
NODES = [(row, column) for row in range(SIDE) for column in range(SIDE)]
ROADS = [(a, b) for a in NODES for b in NODES if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
SIZE = ("--roads", "24", "--facilities", "6")
COLUMNS = ("init_node", "term_node", "capacity", "length", "free_flow_time", "b", "power", "speed", "toll", "link_type")


def tntp(
    folder: Path, columns: tuple[str, ...] = COLUMNS, heading: str = "", unit: float = 1, width: float = 1
) -> Path:
    """A grid whose roads take 3 to 8 minutes, in columns of that order; unit: of times in a minute."""
    links = []
    for link, (a, b) in enumerate(ROADS):
        values = dict(zip(COLUMNS, (0, 0, 0, 1.5, 0, 0.15, 4, 0, 0, 1), strict=True), number=link + 1)
        values |= {"init_node": NODES.index(a) + 1, "term_node": NODES.index(b) + 1}
        values |= {"capacity": width * (800 + 40 * (sum(a + b) % 7)), "free_flow_time": unit * (3 + a[0] * b[1] % 6)}
        links.append("\t".join(f"{values[column]:g}" for column in columns))
    trips = [
        f"Origin {a + 1}\n" + "".join(f"{b + 1:5d} : {(5 * a + 7 * b) % 13:.1f};" for b in range(len(NODES)) if a != b)
        for a in range(len(NODES))
    ]
    write(
        folder,
        town_net__tntp="\n".join(
            ["<NUMBER OF ZONES> 25", f"<NUMBER OF LINKS> {len(links)}", "<FIRST THRU NODE> 1", "<END OF METADATA>", ""]
            + ["~\t" + (heading or "\t".join(columns)) + "\t;"]
            + [f"\t{link}\t;" for link in links]
        ),
        town_trips__tntp="<NUMBER OF ZONES> 25\n<END OF METADATA>\n\n" + "\n\n".join(trips) + "\n",
        town_node__tntp="Node\tX\tY\t;\n"
        + "".join(f"{n + 1}\t{column * 900}\t{row * 900}\t;\n" for n, (row, column) in enumerate(NODES)),
    )
    return folder


def matsim(
    folder: Path, stops: Callable[[Any, Any], str] = lambda home, work: at("home", home) + at("work", work)
) -> Path:
    """The same grid, and 80 people whose plans hold what `stops` makes of where they live and work."""
    nodes = "".join(f'<node id="{r}_{c}" x="{c * 900}" y="{r * 900}"/>\n' for r, c in NODES)
    links = "".join(
        f'<link id="{a[0]}{a[1]}-{b[0]}{b[1]}" from="{a[0]}_{a[1]}" to="{b[0]}_{b[1]}" length="900" '
        f'freespeed="{5 + a[0] * b[1] % 6}" capacity="{800 + 40 * (sum(a + b) % 7)}" modes="car,bike"/>\n'
        for a, b in ROADS
    )
    draw = random.Random(0)
    people = "".join(
        f'<person id="p{n}"><plan selected="no"/><plan selected="yes">'
        f"{stops(*((draw.uniform(0, 3600), draw.uniform(0, 3600)) for _ in 'hw'))}</plan></person>\n"
        for n in range(80)
    )
    write(
        folder,
        network__xml=f"<network><nodes>\n{nodes}</nodes><links>\n{links}</links></network>",
        plans__xml=f"<population>\n{people}</population>",
    )
    return folder


def at(kind: str, place: tuple[float, float]) -> str:
    return f'<activity type="{kind}" x="{place[0]}" y="{place[1]}"/>'


def write(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def change(path: Path, old: str, new: str, times: int = 1) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, times))


class Import:
    """Imports folders, one after the other."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._output, self._capsys = folder / "imported.json", capsys

    def __call__(self, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
        """What the scenario's file holds but for its source, and what was told besides."""
        self._output.unlink(missing_ok=True)
        arguments = ["scenario", "import", str(folder), "--output", str(self._output), "--name", "x", *SIZE, *options]
        assert main(arguments) == 0, self._capsys.readouterr().err
        load_scenario(str(self._output))
        found = json.loads(self._output.read_text())
        found.pop("source")
        return found, self._capsys.readouterr().err

    def refused(self, folder: Path, *options: str) -> str:
        """The one line that is told."""
        self._output.unlink(missing_ok=True)
        assert main(["scenario", "import", str(folder), "--output", str(self._output), *SIZE, *options]) == 2
        assert not self._output.exists()
        told = self._capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        return told.err


@pytest.fixture
def imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    return Import(tmp_path, capsys)


# What TNTP files leave open


@pytest.mark.parametrize("unit", [60, 1 / 60])
def test_times_that_fit_no_day_are_told_with_the_option(unit: float, imported: Import, tmp_path: Path) -> None:
    odd = tntp(tmp_path / "odd", unit=unit)
    told = imported(odd)[1]
    assert "are the times of the files right? --minutes-per-unit tells their unit (0.0166667 for seconds, 60 " in told
    mended, told = imported(odd, "--minutes-per-unit", str(1 / unit))
    assert told == ""
    plain, told = imported(tntp(tmp_path / "plain"))
    assert told == ""
    for column in ("free_flow_minutes", "load_vehicles"):
        np.testing.assert_allclose(mended["roads"][column], plain["roads"][column], rtol=1e-4)
    assert "--minutes-per-unit must be above 0" in imported.refused(odd, "--minutes-per-unit", "0")


def test_one_capacity_that_stands_for_none_is_told_with_the_option(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town", width=0)
    for capacity, doubted in (("1", True), ("999999", True), ("900", False)):
        tntp(folder, width=0)
        change(folder / "town_net.tntp", "\t0\t1.5\t", f"\t{capacity}\t1.5\t", -1)
        told = imported(folder)[1]
        assert (f"every link has a capacity of {capacity} " in told and "--flow-scale" in told) == doubted


@pytest.mark.parametrize(
    ("order", "heading"),
    [
        ((0, 1, 3, 2, 4, 5, 6, 7, 8, 9), ""),
        ((4, 1, 0, 9, 2), ""),
        (
            (0, 1, 3, 2, 4, 7),
            "Init node \tTerm node \tLength (mi)\tCapacity (veh/h)\tFree Flow Time (min)\tSpeed limit",
        ),
        ((0, 1, 4, 2), "From  To  FFT[min]  Cap"),
        ((-1, 0, 1, 2, 3, 4), "link_id tail head capacity length free_flow_time"),
    ],
)
def test_columns_are_those_of_the_heading(
    order: tuple[int, ...], heading: str, imported: Import, tmp_path: Path
) -> None:
    columns = (*COLUMNS, "number")
    odd = tntp(tmp_path / "odd", tuple(columns[place] for place in order), heading)
    assert imported(odd) == imported(tntp(tmp_path / "plain"))


def test_columns_of_nodes_are_those_of_the_heading(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    plain = imported(folder)
    rows = [row.split("\t") for row in (folder / "town_node.tntp").read_text().splitlines()[1:]]
    (folder / "town_node.tntp").write_text("~ lat lon node\n" + "".join(f"{y} {x} {n}\n" for n, x, y, _ in rows))
    assert imported(folder) == plain
    (folder / "town_node.tntp").write_text("Knoten Ost Nord\n" + "".join(f"{n} {x} {y}\n" for n, x, y, _ in rows))
    assert imported(folder) == plain


def test_a_sentence_is_no_heading_and_an_incomplete_heading_is_refused(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    plain = imported(folder)
    change(folder / "town_net.tntp", "\t;\n", "\t;\n~ capacity was changed from veh/day to veh/h by hand\n")
    assert imported(folder) == plain
    change(folder / "town_net.tntp", "\tcapacity\t", "\tspeed\t")
    assert "line 6: the heading has no column 'capacity'" in imported.refused(folder)


def test_trips_on_the_line_of_their_origin_count(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    plain = imported(folder)
    for number, word in ((1, "ORIGIN"), (7, "origin"), (9, "Origin")):
        change(folder / "town_trips.tntp", f"Origin {number}\n", f"{word}\t{number}.0 ")
    assert imported(folder) == plain


@pytest.mark.parametrize("name", ["town_nodes.tntp", "TOWN_NODE.TNTP", "Town_Nodes.tntp.gz"])
def test_nodes_are_found_by_every_name_and_without_them_it_is_said(name: str, imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    plain = imported(folder)
    nodes = (folder / "town_node.tntp").read_bytes()
    (folder / "town_node.tntp").unlink()
    assert "no file of nodes (NAME_node.tntp): their places are made up" in imported(folder)[1]
    (folder / name).write_bytes(gzip.compress(nodes) if name.endswith("gz") else nodes)
    assert imported(folder) == plain


def test_spellings_of_the_same_are_the_same(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    plain = imported(folder)
    net = folder / "town_net.tntp"
    change(net, "<NUMBER OF ZONES> 25", "<total o/d flow (veh/h)> 1\n<number of zones> 25")
    change(net, "<FIRST THRU NODE>", "<first thru node>")
    change(net, "\t1\t2\t", "\t1.0\t2.0\t")
    change(folder / "town_node.tntp", "\n3\t", "\n3.0\t")
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert imported(folder) == plain


def test_first_through_nodes_are_kept_in_every_spelling(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    for tag in ("<FIRST THRU NODE>", "<first thru node>"):
        tntp(folder)
        change(folder / "town_net.tntp", "<FIRST THRU NODE> 1", f"{tag} 26")
        assert "from 26 on (FIRST THRU NODE), and the last node is 25" in imported.refused(folder)


def test_closed_links_are_left_out_and_counted(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    rows = (folder / "town_net.tntp").read_text().splitlines()
    fields = rows[20].split("\t")
    rows[20] = "\t".join([*fields[:3], "0", *fields[4:]])
    (folder / "town_net.tntp").write_text("\n".join(rows))
    without, told = imported(folder, "--roads", "0")
    assert told == "bm3il: left out: 1 links of capacity 0\n"
    assert len(without["roads"]["tail"]) == len(ROADS) - 1
    tntp(folder, width=0)
    assert f"there is no link; left out: {len(ROADS)} links of capacity 0" in imported.refused(folder)


def test_what_a_file_promises_and_lacks_is_told(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    net = folder / "town_net.tntp"
    net.write_text(net.read_text()[: net.read_text().rindex("\n\t")])
    assert f"town_net.tntp promises {len(ROADS)} links and holds {len(ROADS) - 1}" in imported(folder)[1]
    tntp(folder)
    change(folder / "town_trips.tntp", "Origin 3\n", "Origin 3\n  77 : 12.0; 78 : 3;")
    assert "left out: 15 trips from or to nodes without links, the first is 77" in imported(folder)[1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("net", "\t1\t2\t", "\tnan\t2\t", "line 7: expected a number as init node, found 'nan'"),
        ("net", "\t1\t2\t", "\t1.5\t2\t", "line 7: expected a whole number as init node, found '1.5'"),
        ("net", "\t1.5\t3\t", "\t1.5\t3;2\t", "line 7: expected a number as free flow time, found '3;2'"),
        ("net", "\t1.5\t3\t", "\t1.5\tinf\t", "line 7: expected a number as free flow time, found 'inf'"),
        ("net", "THRU NODE> 1", "THRU NODE> one", "line 3: expected a number as FIRST THRU NODE, found 'one'"),
        ("node", "\n2\t900\t", "\n2\tnan\t", "line 3: expected a number as x, found 'nan'"),
        ("node", "\n2\t900\t", "\n2-\t900\t", "line 3: expected a number as node, found '2-'"),
        ("node", "\n2\t900\t0", "\n2\t900", "line 3: expected at least 3 columns"),
        ("trips", ": 7.0;", ": 7-0;", "line 5: expected a number as trips, found '7-0'"),
        ("trips", ": 7.0;", ": -7.0;", "line 5: expected trips ≥ 0, found '2 : -7.0'"),
        ("trips", ": 7.0;", ": nan;", "line 5: expected a number as trips, found 'nan'"),
        ("trips", ": 7.0;", "= 7.0;", "line 5: expected 'destination : trips' of an origin, found '2 = 7.0'"),
        ("trips", "Origin 1\n", "Origin one\n", "line 4: expected a number as origin, found 'one'"),
        ("trips", "Origin 1\n", "", "line 4: expected 'destination : trips' of an origin"),
    ],
)
def test_a_mistyped_number_is_told_with_file_and_line(
    file: str, old: str, new: str, message: str, imported: Import, tmp_path: Path
) -> None:
    folder = tntp(tmp_path / "town")
    change(folder / f"town_{file}.tntp", old, new)
    assert f"town_{file}.tntp, {message}" in imported.refused(folder)


def test_coordinates_that_are_too_large_for_distances_are_refused(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    change(folder / "town_node.tntp", "\n2\t900\t", "\n2\t9e200\t")
    assert "town_trips.tntp: node 2 lacks coordinates" in imported.refused(folder)


# How many roads


def test_how_many_roads_go_is_told_and_true(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    told = imported.refused(folder, "--roads", "90")
    most = int(told.partition("at most ")[2].split()[0])
    assert f"joined by 90 roads: at most {most} --roads go with 6 --facilities; --roads 0 takes all" in told
    assert len(imported(folder, "--roads", str(most))[0]["roads"]["tail"]) == most
    assert f"at most {most} --roads go" in imported.refused(folder, "--roads", str(most + 2))


def test_a_network_of_one_ways_is_told_by_how_far_it_reaches(imported: Import, tmp_path: Path) -> None:
    folder = tntp(tmp_path / "town")
    rows = (folder / "town_net.tntp").read_text().splitlines()
    ahead = [row for row in rows[6:] if int(row.split()[0]) < int(row.split()[1])]
    (folder / "town_net.tntp").write_text("\n".join(rows[:6] + ahead))
    assert "1 of 25 nodes can be reached from each other, too few for 6 facilities" in imported.refused(folder)


# What MATSim folders hold besides


def test_plans_and_network_are_known_by_what_is_inside(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town")
    plain = imported(folder)
    write(folder, config_plans1__xml="<config/>", network_change_events__xml="<networkChangeEvents/>")
    assert imported(folder) == plain
    (folder / "plans.xml").rename(folder / "Population.XML")
    assert imported(folder) == plain
    people = (folder / "Population.XML").read_bytes()
    (folder / "Population.XML").unlink()
    for name, content in (
        ("population.xml.zst", importlib.import_module("zstandard").ZstdCompressor().compress(people)),
        ("PLANS.XML.GZ", gzip.compress(people)),
        ("plans.xml.gz", people),
    ):
        (folder / name).write_bytes(content)
        assert imported(folder) == plain
        (folder / name).unlink()


def test_of_several_plans_one_is_named(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town")
    plain = imported(folder)
    (folder / "plans.xml").rename(folder / "relaxed_plans.xml")
    write(folder, initial_plans__xml="<population/>")
    assert "initial_plans.xml; network.xml and relaxed_plans.xml): name --network and" in imported.refused(folder)
    assert imported(folder, "--plans", "relaxed_plans.xml") == plain
    assert "network.xml holds no trips: it is network" in imported.refused(folder, "--plans", "network.xml")


def test_links_without_cars_and_closed_ones_are_left_out_and_counted(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town")
    plain = imported(folder)[0]
    link = '<link id="{}" from="0_0" to="4_4" length="{}" freespeed="{}" capacity="{}" modes="{}"/>'
    more = [
        link.format("tram", 5000, "Infinity", 99999, "tram, pt"),
        link.format("rail", 5000, 100, 99999, "rail"),
        link.format("bus", 5000, 100, 99999, "car_passenger"),
        link.format("closed", 5000, 10, 0.0, "car"),
        link.format("works", 5000, 0, 900, "car"),
    ]
    change(folder / "network.xml", "</links>", "".join(more) + "</links>")
    change(folder / "network.xml", "</nodes>", '<node id="stop" x="NaN" y="0"/></nodes>')
    found, told = imported(folder)
    assert found == plain
    assert told == (
        "bm3il: left out: 2 links of freespeed or capacity 0, 1 links for pt and tram, 1 links for rail, "
        "1 links for car_passenger\n"
    )
    change(folder / "network.xml", 'modes="car,bike"', 'modes="bike"', -1)
    change(folder / "network.xml", 'modes="car"', 'modes="pt"', -1)
    assert "there is no link for cars; left out: 80 links for bike, 2 links for pt" in imported.refused(folder)


def test_home_and_work_are_words_and_not_syllables(imported: Import, tmp_path: Path) -> None:
    plain = imported(matsim(tmp_path / "plain"))

    def day(home: Any, work: Any) -> str:
        middle = (1800, 1800)
        first = at("hospital", middle) + at("hotel", middle) + at("homeless_shelter", middle) + at("walk_dog", middle)
        return first + at("Home_86400.0", home) + at("workshop", middle) + at("WORK", work) + at("home", middle)

    assert imported(matsim(tmp_path / "long", day)) == plain
    letters = matsim(tmp_path / "letters", lambda home, work: at("h1", home) + at("W", work))
    assert imported(letters) == plain


def test_other_words_are_told_and_can_be_named(imported: Import, tmp_path: Path) -> None:
    plain = imported(matsim(tmp_path / "plain"))

    def day(home: Any, work: Any) -> str:
        return at("Zuhause", home) + at("Büro 2", work) + at("Zuhause", home)

    folder = matsim(tmp_path / "town", day)
    told = imported.refused(folder)
    assert "nobody has a plan with a home (home, h) and a work (work, w) activity" in told
    assert "found: Zuhause (160), Büro 2 (80); name the types with --home and --work" in told
    assert imported(folder, "--home", "wohnen", "zuhause", "--work", "Büro") == plain
    assert "a home (Zuhaus) and" in imported.refused(folder, "--home", "Zuhaus", "--work", "Büro")


def test_people_without_a_commute_are_counted(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town")
    change(folder / "plans.xml", 'type="work"', 'type="school"', 7)
    change(folder / "plans.xml", "</population>", '<person id="child"/></population>')
    assert imported(folder)[1] == "bm3il: left out: 8 of 81 people, without a home or a work\n"


def test_an_activity_is_where_its_link_or_facility_is(imported: Import, tmp_path: Path) -> None:
    """At the middle of its link, as MATSim has it."""

    def told(home: Any, work: Any) -> str:
        row, column = round(home[1] / 900), min(round(home[0] / 900), 3)
        shop = round(work[0]) % 3
        return (
            f'<activity type="home" link="{row}{column}-{row}{column + 1}"/><activity type="work" facility="f{shop}"/>'
        )

    def meant(home: Any, work: Any) -> str:
        row, column = round(home[1] / 900), min(round(home[0] / 900), 3)
        places = [(10.0, 20.0), (3000.0, 3100.0), (2250.0, 0.0)]
        return at("home", (900 * column + 450, 900 * row)) + at("work", places[round(work[0]) % 3])

    folder = matsim(tmp_path / "told", told)
    assert "person 'p0': work: expected x and y, or a facility" in imported.refused(folder)
    shops = '<facility id="f0" x="10" y="20"/><facility id="f1" x="3000" y="3100"/><facility id="f2" linkId="02-03"/>'
    write(folder, facilities__xml=f"<facilities>{shops}</facilities>")
    assert imported(folder) == imported(matsim(tmp_path / "meant", meant))
    change(folder / "facilities.xml", 'linkId="02-03"', 'linkId="02-99"')
    assert "got facility='f2'" in imported.refused(folder)
    change(folder / "plans.xml", 'link="', 'link="gone', 1)
    assert "person 'p0': home: expected x and y, or a facility" in imported.refused(folder)


@pytest.mark.parametrize("moved", [lambda x, y: (13.4 + x / 7e4, 52.5 + y / 1e5), lambda x, y: (x + 4.2e6, y + 3e3)])
def test_people_of_another_coordinate_system_are_refused(
    moved: Callable[[float, float], tuple[float, float]], imported: Import, tmp_path: Path
) -> None:
    folder = matsim(tmp_path / "town", lambda home, work: at("home", moved(*home)) + at("work", moved(*work)))
    change(folder / "network.xml", 'x="0"', 'x="100"', -1)
    told = imported.refused(folder)
    assert "network.xml and plans.xml: homes and works are at x" in told
    assert "the network is at x 100 to 3600, y 0 to 3600, and no trip leads along its roads" in told


def test_people_who_live_around_the_network_are_told_with_the_option(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town", lambda h, w: at("home", (h[0] * 9, h[1] * 9)) + at("work", (w[0] * 9, w[1] * 9)))
    assert "--radius leaves them out" in imported(folder)[1]


def test_a_town_where_nobody_would_travel_is_refused(imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "same", lambda home, work: at("home", home) + at("work", home))
    assert "no trip leads along its roads" in imported.refused(folder)
    folder = matsim(tmp_path / "near", lambda home, work: at("home", (0, 0)) + at("work", (900, 0)))
    assert "nobody would travel" in imported.refused(folder, "--roads", "0", "--facilities", "2")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("network", '<node id="0_1" x="900"', '<node id="0_1" x="NaN"', "node '0_1' needs x and y that are finite"),
        ("network", '<node id="0_1" x="900"', '<node id="0_1" x="9oo"', "node '0_1': x must be a number, got '9oo'"),
        ("network", 'length="900"', 'length="nan"', "link '00-01': expected a length, freespeed and capacity ≥ 0"),
        ("network", 'capacity="800"', 'capacity="-1"', "expected a length, freespeed and capacity ≥ 0, got 900.0"),
        ("plans", 'type="work" x="', 'type="work" x="nan" was="', "person 'p0': work: expected x and y"),
        ("plans", 'type="work" x="', 'type="work" x="1,5" was="', "person 'p0': work: x must be a number, got '1,5'"),
        ("plans", "<person", "<person <", "expected a MATSim XML file: not well-formed (invalid token): line 2"),
    ],
)
def test_a_mistyped_number_is_told_with_file_and_element(
    file: str, old: str, new: str, message: str, imported: Import, tmp_path: Path
) -> None:
    folder = matsim(tmp_path / "town")
    change(folder / f"{file}.xml", old, new)
    told = imported.refused(folder)
    assert f"{file}.xml" in told
    assert message in told


@pytest.mark.parametrize("name", ["network.xml", "plans.xml"])
def test_a_damaged_file_is_named(name: str, imported: Import, tmp_path: Path) -> None:
    folder = matsim(tmp_path / "town")
    whole = gzip.compress((folder / name).read_bytes())
    (folder / name).unlink()
    for damaged in (whole[: len(whole) // 2], whole[:-4] + bytes(4)):
        (folder / f"{name}.gz").write_bytes(damaged)
        assert f"{name}.gz is damaged and cannot be unpacked: " in imported.refused(folder)


# The inputs that were reported


def test_what_was_reported_is_read_as_meant(
    shared: Path, imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in ("make_tntp.py", "make_matsim.py"):
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path / script)])
        runpy.run_path(str(shared / "data" / "bad_input" / script), run_name="__main__")
    town, people = tmp_path / "make_tntp.py", tmp_path / "make_matsim.py"
    plain = imported(town / "plain")
    assert sum(plain[0]["demand"]["trips"]) == 1183
    spelt = ("bom", "crlf", "lowercase_tags", "punctuated_tag", "float_node_ids_net", "lowercase_origin")
    for name in (*spelt, "origin_same_line", "origin_same_line_some", "uppercase_names", "columns_swapped"):
        assert imported(town / name) == plain, name
    options = {"times_in_seconds": "--minutes-per-unit", "capacity_all_1": "--flow-scale", "one_closed_link": "1 links"}
    for name, word in options.items():
        assert word in imported(town / name)[1], name
    for name, word in {"nan_node": "line 8", "trips_typo": "line 6", "zones_above_nodes": "FIRST THRU"}.items():
        assert word in imported.refused(town / name), name
    plain = imported(people / "plain")
    for name in ("population_name", "config_sorts_first", "plain_text_named_gz", "unused_pt_nodes", "two_plans_files"):
        assert imported(people / name) == plain, name
    assert imported(people / "hotel_hospital_first") == plain
    for name, word in {"rail_link": "2 links for pt", "closed_link": "1 links of freespeed or capacity 0"}.items():
        assert imported(people / name)[0] == plain[0], name
        assert word in imported(people / name)[1], name
    for name in ("first_home_without_xy", "facility_only"):
        assert imported(people / name)[1] == ""
    words = {"people_in_degrees": "coordinate", "damaged_gz": "is damaged", "german_names": "Zuhause (60), Arbeit (60)"}
    for name, word in words.items():
        assert word in imported.refused(people / name), name
    imported(people / "german_names", "--home", "Zuhause", "--work", "Arbeit")
