"""Environments by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bm3il.protocol import registry
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.registry import known_environments, make_environment

if TYPE_CHECKING:
    from somewhere import Map  # type: ignore[import-not-found]


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


class OptionalTown(TownEnvironment):
    """Options may be nothing."""

    def __init__(
        self, num_envs: int, closed: str | None = None, speed: float | None = None, cars: list[str] | None = None
    ) -> None:
        self.options = {"closed": closed, "speed": speed, "cars": cars}


class AnnotatedTown(TownEnvironment):
    """Annotated by what only type checkers import."""

    def __init__(
        self, num_envs: int, size: int, city: Map | None = None, rate: float | None = None, rain: bool = False
    ) -> None:
        self.options = {"size": size, "city": city, "rate": rate, "rain": rain}


class BrokenTown(TownEnvironment):
    """Raises where it is made."""

    def __init__(self, num_envs: int, lone: int = 0, first_copy: int = 0) -> None:
        if lone < 0:
            raise ValueError(f"lone must not be negative\nnot {lone}")
        raise AttributeError("no such road")


@pytest.fixture(autouse=True)
def towns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Entry points as another package would add them."""
    real = registry.entry_points
    added = [
        EntryPoint("town", f"{__name__}:TownEnvironment", registry.GROUP),
        EntryPoint("icy_town", f"{__name__}:IcyTown", registry.GROUP),
        EntryPoint("plain_town", f"{__name__}:PlainTown", registry.GROUP),
        EntryPoint("optional_town", f"{__name__}:OptionalTown", registry.GROUP),
        EntryPoint("annotated_town", f"{__name__}:AnnotatedTown", registry.GROUP),
        EntryPoint("broken_town", f"{__name__}:BrokenTown", registry.GROUP),
        EntryPoint("unlicensed_town", "unlicensed_town:Town", registry.GROUP),
        EntryPoint("no_town", f"{__name__}:Town", registry.GROUP),
        EntryPoint("lost_town", "lost_module:Town", registry.GROUP),
        EntryPoint("misspelt_town", f"{__name__}:Tonw", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), *added])
    (tmp_path / "unlicensed_town.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)


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


def test_options_that_may_be_nothing_are_taken() -> None:
    town = make_environment("optional_town?closed=a1&speed=2", 1)
    assert isinstance(town, OptionalTown)
    assert town.options == {"closed": "a1", "speed": 2.0, "cars": None}


def test_annotations_that_cannot_be_read_are_replaced_by_plain_ones_and_defaults() -> None:
    town = make_environment("annotated_town?size=3&city=Rome&rate=2&rain=true", 1)
    assert isinstance(town, AnnotatedTown)
    assert town.options == {"size": 3, "city": "Rome", "rate": 2.0, "rain": True}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken_town?lone=-1", r"environment 'broken_town\?lone=-1' raised ValueError: lone .* negative not -1$"),
        ("broken_town?slip=0.1", r"environment 'broken_town\?slip=0.1' raised AttributeError: no such road$"),
        ("annotated_town", "environment 'annotated_town' raised TypeError: .* missing 1 required .*: 'size'"),
        ("unlicensed_town", "environment 'unlicensed_town' raised RuntimeError: no licence$"),
    ],
)
def test_what_an_environment_raises_is_told_in_a_line_and_its_traceback_kept(name: str, text: str) -> None:
    with pytest.raises(SimulatorError, match=text) as error:
        make_environment(name, 1)
    assert error.value.__cause__ is not None
    assert "unlicensed_town" not in sys.modules


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rover_tower:foo", r"environment 'rover_tower' takes nothing after ':', got 'foo'; its options follow '\?'"),
        ("optional_town?cars=a", r"cars of environment optional_town: .*list\[str\]"),
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
