"""Vehicles on a grid of SUMO's that choose their ways."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
import psutil
import pytest

from bm3il.actors.experts.scripted import expert_for
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import returns, rollout
from bm3il.launch.cli import main
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.adapters import sumo
from bm3il.protocol.adapters.sumo import Sumo
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment, with_absolute_files

if find_spec("libsumo") is None:  # to import it is left to processes of its own
    pytest.skip("libsumo is not installed", allow_module_level=True)

from bm3il.protocol.adapters.sumo_network import AT_HOME, Network, Trip, random_demand, recorded_day, recorded_demand

GRID = Path(__file__).parent / "grid.net.xml"
FEW = f"sumo:{GRID}?vehicles=6&steps=30"
ROUTES = """<routes>
  <vType id="truck" maxSpeed="8"/>
  <vType id="car" sigma="0"/>
  <route id="long" edges="B0A0 A0A1 A1A2 A2B2"/>
  <trip id="late" type="car" depart="130" from="A0A1" to="B1C1"/>
  <vehicle id="a" type="truck" depart="100" route="long"/>
  <vehicle id="b" type="car" depart="100"><route edges="B0C0 C0C1 C1C2 C2B2"/></vehicle>
</routes>"""


DETOUR = "A0A1 A1B1 B1B0 B0C0 C0C1"
DAY = f"""<routes>
  <vType id="car" sigma="0"/>
  <vehicle id="late" type="car" depart="107"><routeDistribution>
    <route replacedOnEdge="A0A1" edges="A0A1 A1B1 B1C1 C1C0"/>
    <route edges="{DETOUR}" exitTimes="1 2 3 4 5"/>
  </routeDistribution></vehicle>
  <vehicle id="early" type="car" depart="100"><route edges="B0B1 B1C1 C1C2"/></vehicle>
</routes>"""


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(str(GRID))


def test_it_keeps_the_contract() -> None:
    assert check_environment(FEW) == 0


def test_who_is_near_a_junction_decides_and_others_stay_on() -> None:
    environment = make_environment(FEW, 3)
    (kind,) = environment.spec.types
    assert (kind.name, kind.count, kind.action_dim) == ("car", 6, 4)
    assert [part.name for part in kind.parts] == ["own", "destination", "ahead.0", "ahead.1", "ahead.2"]
    now, random = environment.reset(3), np.random.default_rng(0)
    decided = stayed = 0
    for _ in range(12):
        masks, active, seen = now.action_masks[0], now.active[0], now.observations[0]
        decides, ways = masks[active][:, 0] == 0, masks[active][:, 1:]
        assert (ways.any(axis=1) == decides).all()
        assert (seen[active][:, 6] == decides).all()
        assert (seen[active][:, 11::6].astype(bool) >= ways).all()
        decided, stayed = decided + decides.sum(), stayed + (~decides).sum()
        now = environment.step([(random.random(masks.shape) * masks).argmax(-1)])
    assert decided > 20
    assert stayed > 20


def test_the_expert_arrives_where_random_drivers_get_lost() -> None:
    environment = make_environment(FEW, 4)
    expert = returns(environment, expert_for(environment.spec), 5).mean()
    assert expert > 8
    assert returns(environment, UniformPolicy(environment.spec), 5).mean() < expert - 3


def test_routes_are_agents_of_their_types(tmp_path: Path) -> None:
    (tmp_path / "day.rou.xml").write_text(ROUTES, encoding="utf-8")
    name = f"sumo:{GRID}?routes={tmp_path / 'day.rou.xml'}&steps=20"
    environment = make_environment(name, 2)
    assert [(t.name, t.count) for t in environment.spec.types] == [("car", 2), ("truck", 1)]
    now, expert = environment.reset(0), expert_for(environment.spec)
    total, there = np.zeros(3), []
    while not now.terminated.all():
        there.append([*now.active[0][0], *now.active[1][0]])
        now = environment.step(expert.act(now))
        total += np.concatenate(now.rewards, axis=1)[0]
    assert there[0] == [True, False, True]
    assert there[4] == [True, True, True]  # the late one came after 30 s
    assert 9 > total[0] > total[2] > 6  # the truck takes longer on the same way


@pytest.mark.parametrize(
    ("element", "text"),
    [
        ('<trip id="t" depart="0" from="A0A1" to="nowhere"/>', "trip t: the network has no edge 'nowhere'"),
        ('<trip id="t" depart="soon" from="A0A1" to="B1C1"/>', "trip t: expected seconds as its depart, got 'soon'"),
        ('<vehicle id="v" depart="0"/>', "vehicle v: expected edges that it starts and ends on"),
        ('<flow id="f" from="A0A1" to="B1C1"/>', "there is no trip and no vehicle in it"),
        ("<trip", "ParseError"),
    ],
)
def test_routes_that_cannot_be_driven_are_named(tmp_path: Path, element: str, text: str) -> None:
    file = tmp_path / "day.rou.xml"
    file.write_text(f"<routes>{element}</routes>", encoding="utf-8")
    with pytest.raises(SimulatorError, match=rf"it failed: .*{text}"):
        make_environment(f"sumo:{GRID}?routes={file}", 1)


def test_a_type_of_the_default_s_name_says_what_vehicles_of_no_type_are(network: Network, tmp_path: Path) -> None:
    file = tmp_path / "day.rou.xml"
    vehicles = """<vehicle id="a" type="DEFAULT_VEHTYPE" depart="0"><route edges="B0C0 C0C1 C1C2"/></vehicle>
      <vehicle id="b" depart="1"><route edges="B0B1 B1C1 C1C2"/></vehicle>"""
    slow = '<vType id="DEFAULT_VEHTYPE" maxSpeed="2"/>'
    for types, kinds in (("", ["car", "car"]), ('<vType id="car"/>', ["DEFAULT_VEHTYPE", "car"])):
        file.write_text(f"<routes>{slow}{types}{vehicles}</routes>", encoding="utf-8")
        demand = recorded_demand(network, str(file), 0)
        assert demand.kinds == kinds
        assert demand.types[kinds[0]]["maxSpeed"] == "2"
        world = make_environment(f"sumo:{GRID}?routes={file}&steps=8", 1)
        now = world.reset(0)
        for _ in range(3):
            now = world.step([mask.argmax(axis=-1) for mask in now.action_masks])
        speeds = [seen[0, x, 5] for seen in now.observations for x in range(seen.shape[1])]
        assert 0 < speeds[0] < 0.2, "of those that are allowed"
        assert (speeds[1] > 0.2) == bool(types), "another kind is as it is without"
        world.close()  # type: ignore[attr-defined]


def test_what_a_simulation_fails_of_is_told(tmp_path: Path) -> None:
    text = '<routes><vType id="t" length="abc"/><trip id="a" type="t" depart="0" from="B0C0" to="C1C2"/></routes>'
    (tmp_path / "day.rou.xml").write_text(text, encoding="utf-8")
    world = make_environment(f"sumo:{GRID}?routes={tmp_path / 'day.rou.xml'}&steps=8", 1)
    with pytest.raises(SimulatorError, match=r"has ended: ValueError: could not convert string to float: 'abc'$"):
        world.reset(0)


def test_trips_begin_with_the_first_and_stand_type_by_type(network: Network, tmp_path: Path) -> None:
    (tmp_path / "day.rou.xml").write_text(ROUTES, encoding="utf-8")
    demand = recorded_demand(network, str(tmp_path / "day.rou.xml"), 0)
    ends = [(0, "B0C0", "C2B2"), (30, "A0A1", "B1C1"), (0, "B0A0", "A2B2")]
    assert demand.trips == [Trip(at, network.number[origin], network.number[goal]) for at, origin, goal in ends]
    assert demand.kinds == ["car", "car", "truck"]
    assert recorded_demand(network, str(tmp_path / "day.rou.xml"), 2).kinds == ["car", "truck"]


@pytest.fixture
def day(tmp_path: Path) -> Path:
    file = tmp_path / "day.vehroutes.xml"
    file.write_text(DAY, encoding="utf-8")
    return file


def test_recorded_ways_are_driven_again_and_become_actions(day: Path) -> None:
    name = f"sumo:{GRID}?routes={day}&steps=30"
    again = unperturbed(make_environment(name, 1)).drives_again([day, day])  # type: ignore[attr-defined]
    recorded = rollout(again, again, seed=3)
    assert recorded.lengths.max() < 30  # all have arrived
    actions, active = recorded.actions[0], recorded.active[0]
    turns = [[action for action, _ in groupby(actions[active[:-1, 0, x], 0, x]) if action] for x in (0, 1)]
    assert turns == [[3, 1], [2, 3, 1, 1]]
    assert again.left_out == 0
    environment = make_environment(name, 2)
    now = environment.reset(3)
    for t in range(int(recorded.lengths[0])):  # by the actions alone
        np.testing.assert_array_equal(now.observations[0], recorded.observations[0][t])
        now = environment.step([actions[t]])
        np.testing.assert_array_equal(now.rewards[0], recorded.rewards[0][t])


def test_a_turn_that_is_no_action_is_driven_and_left_out(
    day: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, network = 'from="A1B1" to="B1B0" fromLane="0" toLane="0" via=":B1_9_0" dir="r"', tmp_path / "town.net.xml"
    text = GRID.read_text(encoding="utf-8")
    assert turn in text
    network.write_text(text.replace(turn, turn.replace('"r"', '"t"')), encoding="utf-8")  # as if it turned around
    monkeypatch.setattr(Sumo, "most_copies", 2)
    name = f"sumo:{network}?routes={day}&steps=30"
    again = unperturbed(make_environment(name, 1)).drives_again([day] * 3)  # type: ignore[attr-defined]
    there = np.concatenate([rollout(again, again, seed).active[0] for seed in (3, 4)], axis=1)[:, :3]
    missing = [np.ptp(np.flatnonzero(x)) + 1 - x.sum() for x in there.reshape(len(there), -1).T]
    assert missing[::2] == [0, 0, 0]
    assert min(missing[1::2]) > 0
    assert again.left_out == sum(missing)  # the fourth episode is a file once more


def test_days_are_matched_by_the_names_of_vehicles(network: Network, day: Path, tmp_path: Path) -> None:
    demand = recorded_demand(network, str(day), 0)
    assert [trip.depart for trip in recorded_day(network, str(day), demand)] == [0, 7]
    other = tmp_path / "other.xml"
    other.write_text(DAY.replace('"early"', '"stranger"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.xml: there is no vehicle 'stranger'"):
        recorded_day(network, str(other), demand)
    other.write_text(f'<routes><vehicle id="late" depart="3"><route edges="{DETOUR}"/></vehicle></routes>', "utf-8")
    absent, late = recorded_day(network, str(other), demand)
    assert absent is AT_HOME
    assert late.way == tuple(DETOUR.split())
    assert recorded_day(network, str(day), random_demand(network, 3, 0))[2] is AT_HOME
    with pytest.raises(ValueError, match="expected at most 1 vehicles, got 2"):
        recorded_day(network, str(day), random_demand(network, 1, 0))
    other.write_text(DAY.replace("A1B1 B1B0", "A1B1 C1C0"), encoding="utf-8")
    with pytest.raises(ValueError, match="vehicle late: in the network, 'A1B1' does not lead to 'C1C0'"):
        recorded_day(network, str(other), demand)
    other.write_text('<routes><trip id="late" depart="3" from="A0A1" to="C0C1"/></routes>', "utf-8")
    with pytest.raises(ValueError, match="expected the edges that vehicle late took"):
        recorded_day(network, str(other), demand)


def test_files_of_routes_are_imported_an_episode_each(
    day: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, name = tmp_path / "days.safetensors", f"sumo:{GRID}?routes={day}"
    assert main(["demonstrations", "import", *[str(day)] * 3, "--environment", name, "--output", str(output)]) == 0
    capsys.readouterr()
    assert Demonstrations.load(output).num_episodes == 3
    for files, environment, text in (
        ([day, "a.csv"], name, "expected one file, or routes of SUMO"),
        ([day], "rover_tower", "routes are driven in a network of SUMO"),
        (["lost.xml"], name, "there is no file lost.xml"),
    ):
        words = [
            "demonstrations",
            "import",
            *map(str, files),
            "--environment",
            environment,
            "--output",
            "x.safetensors",
        ]
        assert main(words) == 2
        assert text in capsys.readouterr().err


def test_nobody_enters_a_closed_edge_and_actions_mean_the_same(network: Network) -> None:
    closed = Network(str(GRID), ["B1C1", "C1B1"])
    assert closed.successors == network.successors
    origin, goal = (network.number[name] for name in ("A1B1", "C1C2"))
    ways = [[each.ids[edge] for edge in each.path(origin, goal)] for each in (network, closed)]
    assert ways[0] == ["A1B1", "B1C1", "C1C2"]
    assert ways[1] in (["A1B1", "B1B2", "B2C2", "C2C1", "C1C2"], ["A1B1", "B1B0", "B0C0", "C0C1", "C1C2"])
    assert not {closed.number["B1C1"], closed.number["C1B1"]} & set(closed.connected)
    with pytest.raises(ValueError, match="there is no edge 'B1C9' to close; did you mean"):
        Network(str(GRID), ["B1C9"])


def test_a_closed_edge_is_a_change_of_the_same_world(network: Network, day: Path) -> None:
    name = f"sumo:{GRID}?routes={day}&steps=30"
    environment, changed = make_environment(name, 1), make_environment(f"{name}&closed=B1B0", 1)
    assert changed.spec.changes == environment.spec.name
    assert changed.spec.name == f"{environment.spec.name}&closed=B1B0"
    assert environment.spec.difference(changed.spec) is None
    for each, is_open in ((environment, True), (changed, False)):
        now, where = each.reset(3), network.middles[network.number["A1B1"]]
        for _ in range(20):  # the late one goes to the right at A1
            seen, masks = now.observations[0][0, 1], now.action_masks[0][0, 1]
            if seen[6] and np.allclose(seen[:2], where):
                break
            early = int(now.action_masks[0][0, 0].argmax())
            now = each.step([np.array([[early, 2 if masks[2] else int(masks.argmax())]])])
        assert masks.tolist() == [False, True, True, is_open]
        assert seen[23:].any() == is_open
    with pytest.raises(SimulatorError, match="vehicle late: expected to start and end on open edges, 'C0C1' is closed"):
        make_environment(f"{name}&closed=C0C1", 1)
    with pytest.raises(SimulatorError, match="vehicle late: in the network, 'A1B1' does not lead to 'B1B0'"):
        unperturbed(changed).drives_again([day])  # type: ignore[attr-defined]


def test_edges_follow_from_left_to_right_and_ways_are_the_fastest(network: Network) -> None:
    assert (len(network.ids), network.most, len(network.connected)) == (24, 3, 24)
    ahead = network.successors[network.number["B0B1"]]  # northwards, into the middle
    assert [network.ids[edge] for edge in ahead] == ["B1A1", "B1B2", "B1C1"]
    turns = [network.turn(network.number["B0B1"], edge) for edge in ahead]
    np.testing.assert_allclose(turns, [(0, 1), (1, 0), (0, -1)], atol=1e-9)
    way = network.path(network.number["A0A1"], network.number["B2C2"])
    assert len(way) == 4
    rest = network.to(way[-1])
    assert rest[way[-1]] == 0
    assert rest[way[0]] == pytest.approx(network.seconds[way[1:]].sum())


def test_a_simulation_that_has_ended_is_told() -> None:
    environment = make_environment(FEW, 2)
    environment.reset(0)
    server = psutil.Process(environment._copies._sessions[0]._process.pid)  # type: ignore[attr-defined]
    copies = server.children()
    assert len(copies) == 2
    copies[1].kill()
    with pytest.raises(SimulatorError, match="it failed: RuntimeError: the process of a simulation has ended"):
        environment.step([np.zeros((2, 6), int)])
    psutil.wait_procs([server, *copies], timeout=10)
    assert not any(process.is_running() for process in (server, *copies))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sumo", "name a network"),
        ("sumo:lost.net.xml", "there is no file lost.net.xml"),
        (f"sumo:{GRID}?routes=lost.xml", "there is no file lost.xml"),
        (f"sumo:{GRID}?interval=0", "expected interval ≥ 1, got 0"),
    ],
)
def test_what_cannot_be_made_is_said(name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_environment(name, 1)


def test_without_sumo_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sumo, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'bm3il\[sumo\]'"):
        make_environment(FEW, 1)


def test_its_files_are_known_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(GRID, "town.net.xml")
    Path("day.rou.xml").touch()
    files = [f"{tmp_path}/town.net.xml", f"{tmp_path}/day.rou.xml"]
    name, found = with_absolute_files("sumo:town.net.xml?routes=day.rou.xml&steps=20")
    assert name == f"sumo:{files[0]}?routes={files[1]}&steps=20"
    assert sorted(found) == sorted(files)
