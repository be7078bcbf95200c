"""Specs: their limits, their JSON, their differences."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec

SPEC = EnvironmentSpec("town", (TypeSpec("bus", 3, 4, 5), TypeSpec("tram", 2, 1, 2, discrete=False)), 6)


def test_agents_are_numbered_type_by_type() -> None:
    assert (SPEC.num_types, SPEC.num_agents, SPEC.offsets) == (2, 5, (0, 3))


def test_json_and_back() -> None:
    assert EnvironmentSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("types",), [], "has no agent types"),
        (("types",), None, "not an environment spec"),
        (("types",), ["bus"], "not an environment spec"),
        (("types", 0, "count"), 0, r"type 'bus': count must be an integer in 1\.\."),
        (("types", 0, "count"), True, "count must be an integer"),
        (("types", 0, "count"), "3", "count must be an integer"),
        (("types", 0, "count"), 10**12, "count must be an integer"),
        (("types", 1, "observation_dim"), -1, "type 'tram': observation_dim"),
        (("types", 1, "action_dim"), 2.5, "type 'tram': action_dim"),
        (("types", 1, "name"), "bus", "two types of one name: bus, bus"),
        (("episode_length",), 0, r"episode_length must be an integer in 1\.\.10000000"),
        (("episode_length",), 10**7 + 1, "the most steps of an episode, got 10000001"),
        (("episode_length",), "6", r"episode_length must be an integer in 1\.\.10000000"),
    ],
)
def test_untrusted_json_is_checked(path: tuple[Any, ...], value: Any, text: str) -> None:
    document = json.loads(json.dumps(SPEC.to_json()))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=text):
        EnvironmentSpec.from_json(document)


@pytest.mark.parametrize("value", [None, 3, "town", [], {}, {"name": "town", "types": [{}], "episode_length": 3}])
def test_what_is_no_spec_is_refused(value: Any) -> None:
    with pytest.raises(InputError):
        EnvironmentSpec.from_json(value)


def test_first_difference_is_told() -> None:
    assert SPEC.difference(replace(SPEC, name="city", episode_length=9)) is None
    assert (
        SPEC.difference(replace(SPEC, view="near"))
        == "expected observations that mean nothing in particular, found 'near'"
    )
    assert SPEC.difference(replace(SPEC, types=SPEC.types[:1])) == "expected 2 agent types, found 1"
    changes = {"name": "car", "count": 9, "observation_dim": 9, "action_dim": 9, "discrete": True}
    for field, value in changes.items():
        other = replace(SPEC, types=(SPEC.types[0], replace(SPEC.types[1], **{field: value})))
        difference = SPEC.difference(other)
        assert difference == f"type 'tram': expected {field} {getattr(SPEC.types[1], field)!r}, found {value!r}"


def test_parts_in_another_order_are_a_difference() -> None:
    def town(*parts: Part) -> EnvironmentSpec:
        return EnvironmentSpec("town", (TypeSpec("bus", 1, 3, 5, parts=parts),), 6)

    spec, unnamed = town(Part("place", 1), Part("goal", 1), Part("load", 1)), town()
    swapped = town(Part("goal", 1), Part("place", 1), Part("load", 1))
    told = "type 'bus': expected 'place' (1 wide) in what it observes, found 'goal' (1 wide) in its place"
    assert spec.difference(swapped) == told
    assert "expected 'load' (1 wide)" in str(spec.difference(town(*spec.types[0].parts[:2], Part("fuel", 1))))
    assert "found 'place' (2 wide)" in str(spec.difference(town(Part("place", 2), Part("load", 1))))
    for other in (spec, spec.plain(), town(Part("place", 1), Part("goal", 1, "uint8"), Part("load", 1)), unnamed):
        assert spec.difference(other) is None
        assert other.difference(spec) is None


def test_columns_of_named_parts() -> None:
    parts = (Part("place.road", 2), Part("place.facility", 3), Part("time", 1))
    driver = TypeSpec("driver", 1, 6, 5, parts=parts, purpose=("place.facility", "time"))
    assert driver.columns(driver.purpose) == (2, 3, 4, 5)
    assert driver.columns(["time", "place"]) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(InputError, match=r"'plase'.*place"):
        driver.columns(["plase"])
    spec = EnvironmentSpec("town", (driver,), 3, changes="village")
    assert EnvironmentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_parts_must_make_up_the_observation() -> None:
    with pytest.raises(InputError, match="its parts are 2 wide, its observation 6"):
        TypeSpec("driver", 1, 6, 5, parts=(Part("place", 2),))
    with pytest.raises(InputError, match="part of what 'driver' observes"):
        TypeSpec("driver", 1, 2, 5, parts=(Part("place", 2),), purpose=("goal",))


def test_another_number_of_agents_may_be_overlooked() -> None:
    other = replace(SPEC, types=tuple(replace(t, count=t.count + 1) for t in SPEC.types))
    assert "count" in str(SPEC.difference(other))
    assert SPEC.difference(other, counts=False) is None
