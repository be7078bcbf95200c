"""Environments by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from bm3il.protocol import registry
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import known_environments, make_environment


class Town:
    """Takes an option of every kind; not an environment."""

    def __init__(self, num_envs: int, target: str = "", size: int = 1, rate: float = 1.0, rain: bool = False) -> None:
        self.options = {"num_envs": num_envs, "target": target, "size": size, "rate": rate, "rain": rain}


class TownEnvironment(Town):
    """The same with what the contract asks for."""

    spec = None
    num_envs = 1

    def reset(self) -> None: ...

    def step(self) -> None: ...


class IcyTown(TownEnvironment):
    """Means something of its own by `slip`."""

    def __init__(self, num_envs: int, slip: str = "") -> None:
        self.options = {"slip": slip}


class PlainTown(TownEnvironment):
    """Says nothing of types."""

    def __init__(self, num_envs, size=1, rate=1.0, rain=False, *, name="x"):  # type: ignore[no-untyped-def]
        self.options = {"size": size, "rate": rate, "rain": rain, "name": name}


@pytest.fixture(autouse=True)
def towns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points as another package would add them."""
    real = registry.entry_points
    added = [
        EntryPoint("town", f"{__name__}:TownEnvironment", registry.GROUP),
        EntryPoint("icy_town", f"{__name__}:IcyTown", registry.GROUP),
        EntryPoint("plain_town", f"{__name__}:PlainTown", registry.GROUP),
        EntryPoint("no_town", f"{__name__}:Town", registry.GROUP),
        EntryPoint("lost_town", "lost_module:Town", registry.GROUP),
        EntryPoint("misspelt_town", f"{__name__}:Tonw", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), *added])


def test_name_becomes_environment() -> None:
    assert "rover_tower" in known_environments()
    environment = make_environment("rover_tower?pairs=2", num_envs=3)
    assert (environment.num_envs, environment.spec.num_agents) == (3, 4)
    assert environment.spec.name == "rover_tower?pairs=2", "the name of the spec builds the same environment again"
    assert make_environment("rover_tower", 1).spec.num_agents == 8


def test_options_take_the_types_of_the_signature() -> None:
    town = make_environment("town:mpe2.spread?size=3&rate=0.5&rain=true", 2)
    assert isinstance(town, TownEnvironment)
    assert town.options == {"num_envs": 2, "target": "mpe2.spread", "size": 3, "rate": 0.5, "rain": True}


def test_options_without_annotations_take_the_types_of_their_defaults() -> None:
    town = make_environment("plain_town?size=3&rate=2&rain=true&name=y", 2)
    assert isinstance(town, PlainTown)
    assert town.options == {"size": 3, "rate": 2.0, "rain": True, "name": "y"}


def test_what_a_factory_calls_slip_is_its_own() -> None:
    town = make_environment("icy_town?slip=here", 1)
    assert isinstance(town, IcyTown)
    assert town.options == {"slip": "here"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rover_towr", "unknown environment 'rover_towr'; did you mean rover_tower?"),
        ("xyz", "unknown environment 'xyz'; known: .*rover_tower"),
        ("", "unknown environment ''"),
        ("rover_tower?pair=2", "unknown option of environment rover_tower 'pair'; did you mean pairs"),
        ("rover_tower?num_envs=2", "unknown option"),
        ("rover_tower?pairs=two", "pairs of environment rover_tower: expected an integer, got 'two'"),
        ("rover_tower?pairs=", "expected an integer, got ''"),
        ("rover_tower?pairs=0", r"pairs in 1\.\.1000"),
        ("town?rain=yes", "expected true or false, got 'yes'"),
        ("town?rate=x", "expected a number, got 'x'"),
        ("no_town", "does not follow protocol.environment.Environment"),
        ("lost_town", "environment 'lost_town' is lost_module:Town, which cannot be imported: No module"),
        ("misspelt_town", "has no attribute 'Tonw'"),
    ],
)
def test_mistakes_are_named(name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_environment(name, 1)
