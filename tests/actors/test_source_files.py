"""Which files of a folder are taken: tiny ones, of which only the beginning matters."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bm3il.actors.environments.berlin.source_files import Sources, find_sources
from bm3il.protocol.errors import InputError

INSIDE = {
    "network": "<network><nodes/></network>",
    "plans": "<population><person/></population>",
    "old plans": '<?xml version="1.0"?>\n<!-- of 2004 -->\n<!DOCTYPE plans SYSTEM "plans_v4.dtd">\n<plans></plans>',
    "facilities": "<facilities/>",
    "config": "<config/>",
    "events": "<networkChangeEvents/>",
    "net": "<NUMBER OF ZONES> 3\n<NUMBER OF LINKS> 1\n\n1 2 900 1 5 ;\n",
    "bare net": "1 2 900 1 5 ;\n",
    "trips": "<NUMBER OF ZONES> 3\n\norigin 1\n 2 : 5.0;\n",
    "nodes": "node x y ;\n1 0 0 ;\n",
    "flow": "From To Volume Cost\n1 2 3.0 4.0\n",
}


def folder(path: Path, **files: str) -> Path:
    """Files of the names of arguments, with `__` for a dot, that hold what their values say."""
    for name, what in files.items():
        (path / name.replace("__", ".")).write_text(INSIDE[what])
    return path


def taken(sources: Sources) -> list[str | None]:
    return [file.name if file else None for file in (sources.network, sources.trips, sources.places)]


def test_what_is_inside_counts(tmp_path: Path) -> None:
    folder(tmp_path, config_plans1__xml="config", network_change_events__xml="events", output_config__xml="config")
    folder(tmp_path, roads__xml="network", people__xml="old plans", shops__xml="facilities", network__txt="network")
    (tmp_path / "plans.xml").mkdir()
    sources = find_sources(tmp_path)
    assert (sources.format, *taken(sources)) == ("matsim", "roads.xml", "people.xml", "shops.xml")


def test_capitals_plurals_and_packed_files_are_found(tmp_path: Path) -> None:
    folder(tmp_path, Town_Net__TNTP="bare net", Town_Flow__tntp="flow", Town_Nodes__Tntp="nodes")
    (tmp_path / "Town_Trips.tntp.gz").write_bytes(gzip.compress(INSIDE["trips"].encode()))
    assert taken(find_sources(tmp_path)) == ["Town_Net.TNTP", "Town_Trips.tntp.gz", "Town_Nodes.Tntp"]


def test_files_of_one_name_go_together(tmp_path: Path) -> None:
    folder(tmp_path, network__xml="network", plans__xml="plans", initial_plans__xml="plans")
    assert taken(find_sources(tmp_path)) == ["network.xml", "plans.xml", None]
    folder(tmp_path, output_network__xml="network")
    assert taken(find_sources(tmp_path)) == ["network.xml", "plans.xml", None]
    (tmp_path / "plans.xml").unlink()
    with pytest.raises(InputError, match=r"more than one network with trips .*name --network and --plans"):
        find_sources(tmp_path)
    assert taken(find_sources(tmp_path, "output_network.xml")) == ["output_network.xml", "initial_plans.xml", None]


def test_options_name_the_files(tmp_path: Path) -> None:
    folder(tmp_path, a_net__tntp="net", a_trips__tntp="trips", a_node__tntp="nodes", network__xml="network")
    folder(tmp_path, b_net__tntp="net", b_trips_am__tntp="trips", b_trips_pm__tntp="trips", b_nodes__tntp="nodes")
    folder(tmp_path, plans__xml="plans", config__xml="config")
    with pytest.raises(InputError, match="name --network and --plans"):
        find_sources(tmp_path)
    assert taken(find_sources(tmp_path, "a_net.tntp")) == ["a_net.tntp", "a_trips.tntp", "a_node.tntp"]
    assert taken(find_sources(tmp_path, "b_net.tntp", "b_trips_pm.tntp"))[1:] == ["b_trips_pm.tntp", "b_nodes.tntp"]
    assert taken(find_sources(tmp_path, str(tmp_path / "network.xml"))) == ["network.xml", "plans.xml", None]
    with pytest.raises(InputError, match=r"unknown file 'a_nett.tntp'; did you mean a_net.tntp"):
        find_sources(tmp_path, "a_nett.tntp")
    with pytest.raises(InputError, match=r"config.xml holds no trips: it is <config>"):
        find_sources(tmp_path, "network.xml", "config.xml")


def test_nodes_that_go_with_no_network_are_not_guessed(tmp_path: Path) -> None:
    folder(tmp_path, a_net__tntp="net", a_trips__tntp="trips", b_node__tntp="nodes", c_node__tntp="nodes")
    with pytest.raises(InputError, match=r"which of b_node.tntp, c_node.tntp goes with a_net.tntp"):
        find_sources(tmp_path)


def test_a_damaged_file_is_in_nobodys_way_unless_it_is_needed(tmp_path: Path) -> None:
    """It has the role of its name: whoever reads it says what is wrong."""
    folder(tmp_path, network__xml="network", plans__xml="plans")
    for name in ("events.xml.gz", "facilities.xml.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"<events>" * 100)[:-20])
    assert taken(find_sources(tmp_path)) == ["network.xml", "plans.xml", "facilities.xml.gz"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a MATSim network and plans"),
        ({"network__xml": "network", "a_trips__tntp": "trips"}, r"holds a network \(network.xml\) and no trips"),
        ({"plans__xml": "plans", "network__xml": "config"}, r"holds trips \(plans.xml\) and no network"),
    ],
)
def test_what_is_missing_is_said(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_sources(folder(tmp_path, **files))
    with pytest.raises(InputError, match=r"cannot read the folder \S*nothing: No such file"):
        find_sources(tmp_path / "nothing")
