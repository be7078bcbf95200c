"""Compact observations: what is kept expands to what every agent sees, comes back from it, and is checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bm3il.actors.experts.recording import record
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol import demonstration_checks, packing
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import TimeStep, compact_step
from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.observations import Form, Observations, compacted, forms
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.protocol.trajectories import Trajectories, columns_of

torch.set_num_threads(1)

BERLIN = "berlin?types=10&agents=50&closed=22,23"
NEAR, TOWERS = f"{BERLIN}&sight=near", "rover_tower?pairs=3"
TABLE = ((0, 1), (1,), (0, 2))
PARTS = (
    Part("place.road", 2, "code"),
    Part("place.facility", 1, "code"),
    Part("loads.road", 2, "shared", masked=True),
    Part("loads.facility", 1, "shared", masked=True),
    Part("speed", 1),
    Part("home", 2, "constant", values=(0, 1)),
    Part("time", 1, "shared"),
)
BUS = TypeSpec("bus", 2, 10, 3, parts=PARTS, purpose=("home",), mask="place")
TRAM = replace(BUS, name="tram", count=1, parts=(*PARTS[:5], Part("home", 2, "constant", values=(1, 0)), PARTS[6]))
TOWN = EnvironmentSpec("town", (BUS, TRAM), 4, "a view", "village", (("place", TABLE),))
NONE = 3
"""The place of those who are nowhere."""

Arrays = dict[str, np.ndarray]


def town_columns() -> Arrays:
    """Two rows: buses at 0 and nowhere, the tram at 2; then buses at 1 and 0, the tram at 1, and nobody sees load 2."""
    return {
        "own": np.array([[[7], [8], [9]], [[4], [5], [6]]], np.float32),
        "codes": np.array([[[0], [NONE], [2]], [[1], [0], [1]]], np.uint8),
        "shared": np.array([[0.25, 0.5, 0.75, 10], [0.125, 0.375, 0.625, 11]], np.float32),
    }


TOWN_SEEN = [
    [
        [1, 0, 0, 0.25, 0.5, 0, 7, 0, 1, 10],
        [0, 0, 0, 0.25, 0.5, 0.75, 8, 0, 1, 10],
        [0, 0, 1, 0.25, 0, 0.75, 9, 1, 0, 10],
    ],
    [
        [0, 1, 0, 0, 0.375, 0, 4, 0, 1, 11],
        [1, 0, 0, 0.125, 0.375, 0, 5, 0, 1, 11],
        [0, 1, 0, 0, 0.375, 0, 6, 1, 0, 11],
    ],
]
TOWN_MASKS = [[[1, 1, 0], [1, 1, 1], [1, 0, 1]], [[0, 1, 0], [1, 1, 0], [0, 1, 0]]]


def town(columns: Arrays | None = None) -> Observations:
    (form,) = forms(TOWN)
    return Observations.of_arrays(form, columns or town_columns())


def flat(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[T, E, …] → [T·E, …]."""
    return [array.reshape(-1, *array.shape[2:]) for array in arrays]


def test_every_part_is_expanded_for_every_agent() -> None:
    seen = town()
    assert seen.dense().tolist() == TOWN_SEEN
    assert seen.masks().int().tolist() == TOWN_MASKS
    assert (seen.dense().dtype, seen.masks().dtype) == (torch.float32, torch.bool)
    one = seen[torch.tensor(1)]
    assert (one.dense().tolist(), one.masks().int().tolist()) == (TOWN_SEEN[1], TOWN_MASKS[1])
    assert seen.form.table_of(2) == {name: (str(a.dtype), a.shape) for name, a in town_columns().items()}


def test_masks_of_their_own_are_kept_where_an_observation_depends_on_them() -> None:
    masks = np.array(TOWN_MASKS, bool)
    for masked in (True, False):
        parts = tuple(replace(part, masked=masked and part.masked) for part in PARTS)
        (form,) = forms(EnvironmentSpec("town", (replace(BUS, count=3, parts=parts, mask="own"),), 4))
        seen = Observations.of_arrays(form, town_columns() | {"masks": masks})
        loads = np.where(masks, 1, 1 - masked) * town_columns()["shared"][:, None, :3]
        np.testing.assert_array_equal(seen.dense()[..., 3:6], loads)
        np.testing.assert_array_equal(seen.masks(), masks)
        assert form.table_of(2)["masks"] == ("bool", (2, 3, 3))
        assert ("masks" in form.table_of(2, masks=False)) == masked
        assert ("masks" in seen.without_masks().columns) == masked
        assert torch.equal(seen.without_masks().dense(), seen.dense())


@pytest.mark.parametrize(("size", "dtype"), [(255, "uint8"), (256, "int16"), (32_767, "int16"), (32_768, "int32")])
def test_a_code_is_the_smallest_integer_that_holds_it_and_none(size: int, dtype: str) -> None:
    kind = TypeSpec("a", 3, size, 2, parts=(Part("place", size, "code"),))
    (form,) = forms(EnvironmentSpec("x", (kind,), 4))
    assert form.table_of()["codes"] == (dtype, (3, 1))
    columns = {"codes": np.array([[0], [size - 1], [size]], dtype), "masks": np.ones((3, 2), bool)}
    seen = Observations.of_arrays(form, columns)
    seen.check("a")
    assert seen.dense().nonzero().tolist() == [[0, 0], [1, size - 1]]
    assert seen.dense().sum() == 2


@st.composite
def environments(draw: st.DrawFn) -> EnvironmentSpec:
    """One or two blocks of one or two types each, their observations made of parts of every kind."""
    widths, numbers = st.integers(1, 3), st.integers(-2, 2).map(float)
    types, tables = list[TypeSpec](), list[tuple[str, tuple[tuple[int, ...], ...]]]()
    for b in range(draw(st.integers(1, 2))):
        actions, parts, codes = draw(widths), list[Part](), dict[str, int]()
        kinds = draw(st.lists(st.sampled_from(["own", "code", "shared", "constant", "masked"]), min_size=1, max_size=7))
        for n, kind in enumerate(kinds):
            name = f"{b}_{n}"
            match kind:
                case "code":
                    split = draw(st.lists(widths, min_size=1, max_size=3))
                    parts += [Part(f"{name}.{k}", width, "code") for k, width in enumerate(split)]
                    codes[name] = sum(split)
                case "masked" if not any(part.masked for part in parts):
                    first = draw(st.integers(1, actions))
                    split = [first, actions - first] if first < actions else [actions]
                    parts += [Part(f"{name}.{k}", width, "shared", True) for k, width in enumerate(split)]
                case "constant":
                    width = draw(widths)
                    parts.append(Part(name, width, "constant", values=(0.0,) * width))
                case _:
                    parts.append(Part(name, draw(widths), "own" if kind == "own" else "shared"))
        if all(part.kind == "constant" for part in parts):
            parts.append(Part("last", 1))
        mask = draw(st.sampled_from(["own", "free", *codes]))
        if mask in codes:
            some = st.sets(st.integers(0, actions - 1), min_size=1).map(lambda allowed: tuple(sorted(allowed)))
            tables.append((mask, tuple(draw(some) for _ in range(codes[mask]))))
        for m in range(draw(st.integers(1, 2))):
            mine = tuple(replace(part, values=tuple(draw(numbers) for _ in part.values)) for part in parts)
            width = sum(part.width for part in parts)
            types.append(TypeSpec(f"type {b}.{m}", draw(widths), width, actions, parts=mine, mask=mask))
    return EnvironmentSpec("town", tuple(draw(st.permutations(types))), 9, tables=tuple(tables))


def owner(part: Part) -> str:
    return part.name.partition(".")[0]


def code_sizes(kind: TypeSpec) -> Counter[str]:
    sizes = Counter[str]()
    for part in kind.parts:
        if part.kind == "code":
            sizes[owner(part)] += part.width
    return sizes


def drawn(kinds: Sequence[TypeSpec], leading: tuple[int, ...], seed: int) -> Arrays:
    """All columns of agents of one block, also those that have no width."""
    random, first = np.random.default_rng(seed), kinds[0]
    rows = (*leading, sum(kind.count for kind in kinds))
    width = {name: sum(part.width for part in first.parts if part.kind == name) for name in ("own", "shared")}
    sizes = np.array(list(code_sizes(first).values()), int)
    return {
        "own": random.normal(size=(*rows, width["own"])).astype(np.float32),
        "codes": random.integers(sizes + 1, size=(*rows, len(sizes))).astype(np.uint8),
        "shared": random.normal(size=(*leading, width["shared"])).astype(np.float32),
        "masks": random.random((*rows, first.action_dim)) < 0.5,
    }


def kept(kinds: Sequence[TypeSpec], columns: Arrays) -> Arrays:
    """Those columns that there is something to keep of."""
    own_masks = kinds[0].mask == "own"
    return {name: a for name, a in columns.items() if a.shape[-1] and (name != "masks" or own_masks)}


def slow(spec: EnvironmentSpec, kind: TypeSpec, agent: Mapping[str, list[Any]]) -> tuple[list[float], list[bool]]:
    """What one agent sees and may do, number by number."""
    sizes = code_sizes(kind)
    codes = dict(zip(sizes, agent["codes"], strict=True))
    if kind.mask == "own":
        mask = agent["masks"]
    elif kind.mask == "free" or codes[kind.mask] == sizes[kind.mask]:
        mask = [True] * kind.action_dim
    else:
        mask = [action in dict(spec.tables)[kind.mask][codes[kind.mask]] for action in range(kind.action_dim)]
    own, shared, options, passed = iter(agent["own"]), iter(agent["shared"]), iter(mask), Counter[str]()
    seen: list[float] = []
    for part in kind.parts:
        match part.kind:
            case "own":
                seen += islice(own, part.width)
            case "shared":
                seen += [x * (not part.masked or next(options)) for x in islice(shared, part.width)]
            case "constant":
                seen += part.values
            case "code":
                value = codes[owner(part)] - passed[owner(part)]
                seen += [float(value == column) for column in range(part.width)]
                passed[owner(part)] += part.width
    return seen, mask


@settings(max_examples=150, deadline=None)
@given(environments(), st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 99))
def test_expanded_is_what_a_slow_reference_says(spec: EnvironmentSpec, leading: tuple[int, ...], seed: int) -> None:
    assert EnvironmentSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    for form, block in zip(forms(spec), spec.blocks, strict=True):
        kinds = [spec.types[m] for m in block]
        columns = drawn(kinds, leading, seed)
        found = Observations.of_arrays(form, kept(kinds, columns))
        table = {name: (str(array.dtype), array.shape) for name, array in kept(kinds, columns).items()}
        assert form.table_of(*leading) == table
        assert (found.leading, form.code_sizes) == (leading, tuple(code_sizes(kinds[0]).values()))
        found.check("whose")
        agents = [kind for kind in kinds for _ in range(kind.count)]
        dense, masks = found.dense(), found.masks()
        assert dense.shape == (*leading, len(agents), kinds[0].observation_dim)
        for place in np.ndindex(leading):
            for i, kind in enumerate(agents):
                agent = {name: a[place][i].tolist() for name, a in columns.items() if name != "shared"}
                expected = slow(spec, kind, agent | {"shared": columns["shared"][place].tolist()})
                assert (dense[place][i].tolist(), masks[place][i].tolist()) == expected


@settings(max_examples=100, deadline=None)
@given(environments(), st.integers(0, 99))
def test_rows_keep_what_they_show(spec: EnvironmentSpec, seed: int) -> None:
    """Selected, joined, taken apart, and expanded and made compact again."""
    kinds = [[spec.types[m] for m in block] for block in spec.blocks]
    columns = [kept(block, drawn(block, (3,), seed)) for block in kinds]
    seen = [Observations.of_arrays(form, c) for form, c in zip(forms(spec), columns, strict=True)]
    dense, masks = [s.dense() for s in seen], [s.masks() for s in seen]
    index = torch.tensor([2, 0, 2])
    for s, expected, allowed in zip(seen, dense, masks, strict=True):
        for other, rows in (
            (s.select(index), index),
            (s[1:], torch.tensor([1, 2])),
            (Observations.joined([s[2:], s[:1], s]), torch.tensor([2, 0, 0, 1, 2])),
            (Observations.taken(s.form, iter(s.columns.values())), torch.arange(3)),
            (s.to(torch.device("cpu")).map(lambda tensor: tensor.flip(0)), torch.tensor([2, 1, 0])),
        ):
            assert len(other) == len(rows)
            assert torch.equal(other.dense(), expected[rows])
            assert torch.equal(other.masks(), allowed[rows])

    plain = replace(spec.plain(), name="an old file")
    per_type = [[t.numpy() for t in spec.by_type(blocks, axis=1)] for blocks in (dense, masks)]
    again = compacted(plain, spec, *per_type)
    assert again is not None
    assert again[0] == replace(spec, name="an old file")
    for b, (form, mine) in enumerate(zip(forms(again[0]), columns, strict=True)):
        found = Observations.of_arrays(form, again[1][b])
        assert torch.equal(found.dense(), dense[b])
        assert torch.equal(found.masks(), masks[b])
        assert_kept(form, again[1][b], mine, masks[b].numpy())


def assert_kept(form: Form, found: Mapping[str, np.ndarray], columns: Arrays, masks: np.ndarray) -> None:
    """The same columns, but for 0 in masked shared parts that nobody sees."""
    expected = {name: array.copy() for name, array in columns.items()}
    for run in form.runs:
        if run.masked:
            expected["shared"][:, run.stored] *= masks.any(axis=1)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", [BERLIN, NEAR, TOWERS])
def test_what_environments_show_comes_back(name: str) -> None:
    environment = make_environment(name, 2)
    spec = environment.spec
    played = rollout(environment, UniformPolicy(spec), 3)
    seen, masks = flat(played.observations), flat(played.action_masks)
    found = compacted(replace(spec.plain(), name="an old file"), spec, seen, masks)
    assert found is not None
    described, columns = found
    assert described == replace(spec, name="an old file")
    for b, (form, block) in enumerate(zip(forms(described), spec.blocks, strict=True)):
        again = Observations.of_arrays(form, columns[b])
        for tensor, arrays in ((again.dense(), seen), (again.masks(), masks)):
            np.testing.assert_array_equal(tensor, np.concatenate([arrays[m] for m in block], axis=1))
        of_block = columns_of(played.arrays, b)
        mine = dict(zip(of_block, flat(list(of_block.values())), strict=True))
        assert_kept(form, columns[b], mine, again.masks().numpy())
        assert sum(a.nbytes for a in columns[b].values()) < sum(seen[m].nbytes for m in block)


def test_what_nobody_describes_stays_as_it_is() -> None:
    spec, expanded = TOWN.plain(), (town().dense(), town().masks())
    assert spec.plain() == spec
    assert [part.kind for t in spec.types for part in t.parts] == ["own"] * 14
    assert (spec.tables, {t.mask for t in spec.types}) == ((), {"own"})
    assert TOWN.difference(spec) is None
    per_type = [[t.numpy() for t in spec.by_type([tensor], axis=1)] for tensor in expanded]
    found = compacted(spec, spec, *per_type)
    assert found is not None
    assert found[0] == spec
    (columns,) = found[1]
    assert columns.keys() == {"own", "masks"}
    np.testing.assert_array_equal(columns["own"], expanded[0])
    np.testing.assert_array_equal(columns["masks"], expanded[1])
    seen = Observations.of_arrays(forms(spec)[0], columns)
    assert seen.dense().data_ptr() == columns["own"].ctypes.data, "nothing to expand"


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("masks", (0, 0, 2), True),  # agent 1 of the next row is at the same place
        ("masks", (0, 1, 0), False),  # nowhere all is allowed
        ("masks", (0, 2, slice(None)), False),  # a place from which nothing is allowed
        ("seen", (0, 0, 1), 1),  # at two places
        ("seen", (0, 0, 0), 0.5),  # half at one
        ("seen", (0, 0, 3), 7),  # another load than the others see
        ("seen", (0, 0, 5), 7),  # a load that the mask hides
        ("seen", (0, 0, 8), 0),  # another home
        ("seen", (0, 0, 9), 9),  # another time
        ("seen", (0, 0, 6), 3),  # what is its own may be anything
    ],
)
def test_what_contradicts_the_description_is_not_made_compact(array: str, place: tuple[Any, ...], value: float) -> None:
    arrays = {"seen": town().dense().numpy(), "masks": town().masks().numpy()}
    arrays[array][place] = value
    per_type = [TOWN.by_type([arrays[name]], axis=1) for name in ("seen", "masks")]
    found = compacted(TOWN.plain(), TOWN, *per_type)
    assert (found is None) == (value != 3)


def test_tables_are_those_of_the_rows_and_elsewhere_the_described() -> None:
    """Other agents than described, none of whom is ever at place 1."""
    columns = town_columns()
    columns["codes"][1] = 0
    recorded = replace(TOWN, tables=(("place", ((1, 2), (0, 1, 2), (2,))),))
    (form,) = forms(recorded)
    seen = Observations.of_arrays(form, columns)
    per_type = [[t.numpy() for t in TOWN.by_type([tensor], axis=1)] for tensor in (seen.dense(), seen.masks())]
    crowded = replace(TOWN, types=tuple(replace(t, count=t.count + 5) for t in TOWN.types))
    found = compacted(recorded.plain(), crowded, *per_type)
    assert found is not None
    assert found[0] == replace(TOWN, tables=(("place", ((1, 2), TABLE[1], (2,))),))


@pytest.mark.parametrize(
    ("name", "place", "value", "text"),
    [
        ("codes", (1, 2, 0), 4, r"codes must lie in 0\.\.\[3, 300\]"),
        ("codes", (0, 0, 0), -1, r"codes must lie in 0\.\.\[3, 300\]"),
        ("codes", (1, 0, 1), 301, r"codes must lie in 0\.\.\[3, 300\]"),
        ("codes", (1, 0, 1), 300, None),
        ("codes", (1, 0, 1), 4, None),
        ("codes", (1, 2, 0), 3, None),
        ("own", (1, 2, 0), np.nan, "an observation is not finite"),
        ("own", (0, 0, 0), -np.inf, "an observation is not finite"),
        ("own", (0, slice(2), 0), [np.inf, -np.inf], "an observation is not finite"),
        ("own", (slice(None), slice(None), 0), 3e38, None),  # the sum is not finite
        ("shared", (1, 3), np.inf, "an observation is not finite"),
    ],
)
def test_what_an_index_or_a_network_would_trust_is_checked(
    name: str, place: tuple[Any, ...], value: Any, text: str | None
) -> None:
    types = tuple(replace(t, observation_dim=310, parts=(*t.parts, Part("line", 300, "code"))) for t in TOWN.types)
    spec = replace(TOWN, types=types)
    columns = town_columns()
    columns["codes"] = np.concatenate([columns["codes"].astype(np.int16), np.zeros((2, 3, 1), np.int16)], axis=2)
    columns[name][place] = value
    layout, rest = Layout.of(spec, "type"), {"actions": np.zeros((2, 3), np.uint8), "active": np.ones((2, 3), bool)}
    rows = {f"0.{name}": array for name, array in (columns | rest).items()}
    played = Trajectories.zeros(spec, 1)
    for column, array in columns.items():
        played.arrays[f"0.{column}"][1:3, 0] = array
    for check in (
        lambda: Observations.of_arrays(layout.blocks[0].form, columns).check("a bus"),
        lambda: JointRows.from_arrays(rows, layout),
        lambda: Trajectories.from_arrays(played.arrays, spec),
    ):
        if text is None:
            check()
            continue
        with pytest.raises(ProtocolError, match=text) as error:
            check()
        assert error.value.cause == "bad_value"


def test_a_time_step_shows_what_its_columns_hold_now() -> None:
    ended, columns = np.zeros(2, bool), town_columns()
    per_type = [np.ones((2, t.count)) for t in TOWN.types]
    now = compact_step(TOWN, [columns], [a.astype(bool) for a in per_type], per_type, ended, ended)
    for place in (0, 1):
        columns["codes"][0, 2] = place
        expected = town(columns)
        bus, tram = expected.dense().numpy()[:, :2], expected.dense().numpy()[:, 2:]
        np.testing.assert_array_equal(now.observations[0], bus)
        np.testing.assert_array_equal(now.observations[-1], tram)
        assert [a.shape for a in now.observations] == [bus.shape, tram.shape]
        assert [a.shape for a in now.action_masks[1:]] == [(2, 1, 3)]
        np.testing.assert_array_equal(now.action_masks[1], expected.masks().numpy()[:, 2:])
        (seen,) = now.seen(TOWN)
        assert torch.equal(seen.dense(), expected.dense())
        assert seen.columns["codes"].data_ptr() == columns["codes"].ctypes.data
    without = TimeStep(list(now.observations), list(now.action_masks), now.active, now.rewards, ended, ended)
    with pytest.raises(InputError, match=r"'town' says what observations are made of.*compact_step"):
        without.seen(TOWN)
    (seen,) = without.seen(TOWN.plain())
    assert torch.equal(seen.dense(), expected.dense())
    assert torch.equal(seen.masks(), expected.masks())


def _part(**changes: Any) -> Callable[[], Part]:
    return lambda: replace(PARTS[0], **changes)


def _type(**changes: Any) -> Callable[[], TypeSpec]:
    return lambda: replace(BUS, **changes)


def _tables(*tables: tuple[str, Any]) -> Callable[[], EnvironmentSpec]:
    return lambda: replace(TOWN, tables=tables)


NARROW = (*PARTS[:3], Part("loads.facility", 1), *PARTS[4:])
APART = (*PARTS[:3], PARTS[4], PARTS[3], *PARTS[5:])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_part(kind="coed"), "unknown kind of the part place.road 'coed'; did you mean code"),
        (_part(kind="own", masked=True), "part place.road: only shared parts can be masked, this one is 'own'"),
        (_part(masked=True), "only shared parts can be masked, this one is 'code'"),
        (_part(kind="constant"), r"part place.road: expected values for a constant, one per column, got \(\)"),
        (_part(kind="constant", values=(1.0,)), r"expected values for a constant, one per column, got \(1\.0,\)"),
        (_part(values=(1.0, 0.0)), r"expected values for a constant, one per column, got \(1\.0, 0\.0\)"),
        (_part(kind="constant", values=(1.0, np.nan)), "part place.road"),
        (_part(kind="constant", values=(1.0, np.inf)), "part place.road"),
        (_part(kind="constant", values=(1.0, 1e300)), "part place.road"),
        (_part(width=0), "part place.road must be at least 1 wide, got 0"),
        (_type(parts=NARROW), r"type 'bus': its masked parts must be neighbours.*actions \(3\), found \[2\]"),
        (_type(parts=APART), r"its masked parts must be neighbours.*actions \(3\), found \[2, 1\]"),
        (_type(action_dim=4), r"its masked parts must be neighbours.*actions \(4\), found \[3\]"),
        (_type(parts=PARTS[5:6], observation_dim=2, mask="own"), "'bus': all that it observes is constant"),
        (_type(mask="plase"), "unknown code of 'bus' 'plase'; did you mean place"),
        (_type(mask="loads"), r"unknown code of 'bus' 'loads'; known: free, own, place"),
        (_tables(), "environment 'town': expected a table of 3 'place', found none"),
        (_tables(("plase", TABLE)), "expected a table of 3 'place', found none"),
        (_tables(("place", TABLE[:2])), "expected a table of 3 'place', found one of 2"),
        (_tables(("place", (*TABLE, (0,)))), "expected a table of 3 'place', found one of 4"),
        (_tables(("place", ((0,), (1, 3), (2,)))), r"allow some of range\(0, 3\).*found \[1, 3\] with 1"),
        (_tables(("place", ((0,), (1,), (-1,)))), r"found \[-1\] with 2"),
        (_tables(("place", ((0,), (1,), (True,)))), r"found \[True\] with 2"),
        (_tables(("place", ((), (1,), (2,)))), r"table 'place' must allow some of.*found \[\] with 0"),
    ],
)
def test_descriptions_that_mean_nothing_are_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 1),
        ({"count": 9}, 1),
        ({"mask": "free"}, 2),
        ({"purpose": ()}, 2),
        ({"parts": (*TRAM.parts[:4], Part("speed", 1, "shared"), *TRAM.parts[5:])}, 2),
        ({"parts": (*TRAM.parts[:4], Part("haste", 1), *TRAM.parts[5:])}, 2),
    ],
)
def test_who_is_alike_but_for_constants_shares_a_block(changes: dict[str, Any], blocks: int) -> None:
    assert len(replace(TOWN, types=(BUS, replace(TRAM, **changes))).blocks) == blocks


def test_what_is_said_of_observations_travels_as_json() -> None:
    document = json.loads(json.dumps(TOWN.to_json()))
    again = EnvironmentSpec.from_json(document)
    assert again == TOWN
    assert hash(again) == hash(TOWN)
    assert forms(again) is forms(TOWN)
    assert {part.kind for part in again.types[0].parts} == {"own", "code", "shared", "constant"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("types", 0, "parts", 0, "kind"), "cod"),
        (("types", 0, "parts", 0, "kind"), ["code"]),
        (("types", 0, "parts", 0, "values"), None),
        (("types", 0, "parts", 4, "masked"), True),
        (("types", 0, "parts", 5, "values"), [0]),
        (("types", 0, "parts", 5, "values"), ["a", "b"]),
        (("types", 0, "parts", 5, "values"), [float("nan"), 0]),
        (("types", 0, "parts", 5, "values"), [10**400, 0]),
        (("types", 0, "mask"), "home"),
        (("types", 0, "mask"), None),
        (("tables",), None),
        (("tables",), 3),
        (("tables", 0), ["place"]),
        (("tables", 0, 1), [[0], [1], [3]]),
        (("tables", 0, 1), [[0], [1], ["2"]]),
        (("tables", 0, 1), [[0], [1], [[2]]]),
        (("tables", 0, 1, 0), 1),
        (("tables", 0, 1, 0), []),
    ],
)
def test_untrusted_descriptions_are_refused(place: tuple[Any, ...], value: Any) -> None:
    document = inner = json.loads(json.dumps(TOWN.to_json()))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(InputError):
        EnvironmentSpec.from_json(document)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files, too, are checked in several parts."""
    monkeypatch.setattr(demonstration_checks, "NUMBERS_AT_ONCE", 100)


def recorded(name: str) -> Demonstrations:
    environment = make_environment(name, 2)
    return record(environment, UniformPolicy(environment.spec), 2, 0, "a test")


def town_demonstrations() -> Demonstrations:
    """Two episodes of 4 rows each: `town_columns` again and again."""
    arrays = {f"0.{name}": np.concatenate([array] * 4) for name, array in town_columns().items()}
    arrays |= {"0.actions": np.array([[1, 2, 0], [1, 0, 1]] * 4, np.uint8), "0.active": np.ones((8, 3), bool)}
    per_episode = np.array([4, 4]), np.arange(6, dtype=np.float32).reshape(2, 3), np.array([0, 1])
    return Demonstrations(TOWN, "a test", arrays, *per_episode)


def save_before(path: Path, demonstrations: Demonstrations, masks: Sequence[np.ndarray]) -> None:
    """A file of version 1, as it was written when nobody described observations; masks: instead of the real ones."""
    spec = demonstrations.spec.to_json()
    del spec["tables"]
    for kind in spec["types"]:
        del kind["mask"]
        kind["parts"] = [{"name": part["name"], "width": part["width"]} for part in kind["parts"]]
    tensors = {name: getattr(demonstrations, name) for name in ("episode_lengths", "returns", "groups")}
    tensors |= {f"starts.{name}": array for name, array in demonstrations.starts.items()}
    for m in range(demonstrations.spec.num_types):
        tensors[f"{m}.observations"] = demonstrations.observations[m]
        tensors[f"{m}.actions"] = demonstrations.actions[m].astype(np.int8)
        optional = {f"{m}.action_masks": masks[m], f"{m}.active": demonstrations.active[m]}
        tensors |= {name: array for name, array in optional.items() if not array.all()}
    counts = {"episodes": demonstrations.num_episodes, "rows": demonstrations.num_rows}
    header = json.dumps({"spec": spec, "origin": demonstrations.origin, **counts})
    metadata = {"format": "bm3il-demonstrations", "version": "1", "header": header}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)


def assert_shows_the_same(one: Demonstrations, other: Demonstrations) -> None:
    """Type by type, and as rows for networks."""
    for field in ("observations", "action_masks", "actions", "active"):
        for mine, theirs in zip(getattr(one, field), getattr(other, field), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=field)
    for name in ("episode_lengths", "returns", "groups"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.starts.keys() == other.starts.keys()
    for name, array in one.starts.items():
        np.testing.assert_array_equal(array, other.starts[name])


@pytest.mark.parametrize("name", [BERLIN, NEAR, TOWERS, "town"])
def test_files_from_before_are_read_and_made_compact(tmp_path: Path, name: str) -> None:
    demonstrations = town_demonstrations() if name == "town" else recorded(name)
    path, spec = tmp_path / "before.safetensors", demonstrations.spec
    save_before(path, demonstrations, demonstrations.action_masks)
    before = Demonstrations.load(path)
    assert before.spec == spec.plain()
    assert {name.partition(".")[2] for name in before.arrays} == {"own", "masks", "actions", "active"}
    assert_shows_the_same(before, demonstrations)
    compact = before.in_form_of(replace(spec, name="its name today"))
    assert compact.spec == spec
    assert compact.arrays.keys() == demonstrations.arrays.keys()
    for key, array in compact.arrays.items():
        assert array.nbytes <= demonstrations.arrays[key].nbytes, key
    assert_shows_the_same(compact, demonstrations)
    assert compact.in_form_of(spec) is compact
    layout = Layout.of(spec, "type")
    expected = demonstrations.rows(layout)
    for other in (before, compact, Demonstrations.load(path).in_form_of(spec.plain())):
        rows = other.rows(layout)
        for b in range(len(layout.blocks)):
            assert torch.equal(rows.observations[b].dense(), expected.observations[b].dense())
            assert torch.equal(rows.observations[b].masks(), expected.observations[b].masks())
            assert torch.equal(rows.actions[b].long(), expected.actions[b].long())
            assert torch.equal(rows.active[b], expected.active[b])


def test_a_file_whose_masks_contradict_stays_as_it_is(tmp_path: Path) -> None:
    path, demonstrations = tmp_path / "before.safetensors", town_demonstrations()
    masks = [array.copy() for array in demonstrations.action_masks]
    masks[0][6, 0] = True  # at the same place as in rows 0, 2 and 4
    save_before(path, demonstrations, masks)
    before = Demonstrations.load(path)
    assert before.in_form_of(TOWN) is before
    assert before.spec == TOWN.plain()
    np.testing.assert_array_equal(before.action_masks[0], masks[0])
    rows = before.rows(Layout.of(TOWN, "agent"))
    np.testing.assert_array_equal(rows.observations[0].masks(), np.concatenate(masks, axis=1))
    np.testing.assert_array_equal(rows.observations[0].dense(), np.concatenate(demonstrations.observations, axis=1))


def test_a_type_that_has_become_another_block_is_laid_out_anew(tmp_path: Path) -> None:
    """Types that nothing told apart before, described differently now."""
    path, demonstrations = tmp_path / "before.safetensors", town_demonstrations()
    masks = [np.ones_like(array) for array in demonstrations.action_masks]
    save_before(path, demonstrations, masks)
    before = Demonstrations.load(path)
    other = replace(TRAM, parts=tuple(Part(part.name, part.width) for part in PARTS), mask="own")
    described = replace(TOWN, types=(BUS, other))
    assert (before.spec.blocks, described.blocks) == (((0, 1),), ((0,), (1,)))
    assert before.in_form_of(described) is before
    rows = before.rows(Layout.of(described, "type"))
    for m in range(2):
        np.testing.assert_array_equal(rows.observations[m].dense(), demonstrations.observations[m])
        np.testing.assert_array_equal(rows.observations[m].masks(), masks[m])
        np.testing.assert_array_equal(rows.actions[m], demonstrations.actions[m])
        np.testing.assert_array_equal(rows.active[m], demonstrations.active[m])


def test_episodes_may_be_longer_than_those_of_the_environment_today(tmp_path: Path) -> None:
    path, demonstrations = tmp_path / "before.safetensors", town_demonstrations()
    save_before(path, demonstrations, demonstrations.action_masks)
    today = replace(TOWN, episode_length=3)
    before = Demonstrations.load(path)
    before.check_against(today)
    assert_shows_the_same(before.in_form_of(today), demonstrations)


def test_another_crowd_of_compact_demonstrations_is_the_expanded_ones() -> None:
    demonstrations = town_demonstrations()
    spec = replace(TOWN, types=(replace(BUS, count=3), replace(TRAM, count=2)))
    compact = demonstrations.for_crowd(spec)
    assert compact.spec == spec
    for m, kind in enumerate(spec.types):
        agents = (np.arange(kind.count) + np.arange(8)[:, None]) % TOWN.types[m].count
        for field in ("observations", "action_masks", "actions", "active"):
            recorded_ones = getattr(demonstrations, field)[m]
            np.testing.assert_array_equal(getattr(compact, field)[m], recorded_ones[np.arange(8)[:, None], agents])


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", [NEAR, TOWERS, "town"])
def test_columns_come_back_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: bool) -> None:
    monkeypatch.setattr(packing, "PACKED_FROM_BYTES", 1 if pack else 1 << 40)
    monkeypatch.setattr(packing, "PACKED_RATIO", 0)
    demonstrations = town_demonstrations() if name == "town" else recorded(name)
    path = tmp_path / "some.safetensors"
    demonstrations.save(path)
    columns = [key for key in demonstrations.arrays if key.endswith((".own", ".codes", ".shared"))]
    assert {key + ".xz" * pack for key in columns} <= load_file(path).keys()
    loaded = Demonstrations.load(path)
    assert loaded.spec == demonstrations.spec
    assert loaded.arrays.keys() == demonstrations.arrays.keys()
    for key, array in demonstrations.arrays.items():
        assert loaded.arrays[key].dtype == array.dtype, key
        np.testing.assert_array_equal(loaded.arrays[key], array, err_msg=key)
    assert_shows_the_same(loaded, demonstrations)


@pytest.mark.parametrize("name", ["own", "codes", "shared", "actions", "active"])
def test_no_column_may_be_missing(name: str) -> None:
    demonstrations = town_demonstrations()
    arrays = {key: array for key, array in demonstrations.arrays.items() if key != f"0.{name}"}
    with pytest.raises(InputError, match=f"type 'bus' or one like it: 0.{name} is missing"):
        replace(demonstrations, arrays=arrays)


def test_a_file_from_before_cannot_describe_observations(tmp_path: Path) -> None:
    path, demonstrations = tmp_path / "before.safetensors", town_demonstrations()
    save_before(path, demonstrations, demonstrations.action_masks)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"]) | {"spec": TOWN.to_json()}
    save_file(load_file(path), path, metadata | {"header": json.dumps(header)})
    with pytest.raises(InputError, match=r"0\.codes, 0\.shared is missing"):
        Demonstrations.load(path)


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def _set(name: str, place: Any, value: float) -> Change:
    def change(tensors: Arrays, header: dict[str, Any]) -> None:
        tensors[name][place] = value

    return change


def _replace(name: str, make: Callable[[np.ndarray], np.ndarray], new: str = "") -> Change:
    def change(tensors: Arrays, header: dict[str, Any]) -> None:
        tensors[new or name] = np.ascontiguousarray(make(tensors.pop(name)))

    return change


def _drop(name: str) -> Change:
    def change(tensors: Arrays, header: dict[str, Any]) -> None:
        del tensors[name]

    return change


def _add_masks(tensors: Arrays, header: dict[str, Any]) -> None:
    tensors["0.masks"] = np.ones((8, 3, 3), bool)


def _describe(change: Callable[[dict[str, Any]], None]) -> Change:
    return lambda tensors, header: change(header["spec"])


def _huge_constants(spec: dict[str, Any]) -> None:
    width, count = 100_000, 1_000_000
    parts = [{"name": "x", "width": 1}, {"name": "y", "width": width, "kind": "constant", "values": [0] * width}]
    spec["types"] = [{"name": "bus", "count": count, "observation_dim": width + 1, "action_dim": 3, "parts": parts}]
    spec["tables"] = []


def _huge_table(spec: dict[str, Any]) -> None:
    size, actions = 100_000, 1_000_000
    parts, shape = [{"name": "place", "width": size, "kind": "code"}], {"observation_dim": size, "action_dim": actions}
    spec["types"] = [{"name": "bus", "count": 1, **shape, "parts": parts, "mask": "place"}]
    spec["tables"] = [["place", [[0]] * size]]


WHOSE = "type 'bus' or one like it"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("0.codes", (6, 1), 4), f"{WHOSE}: 1 codes are out of their range, the first in row 6, agent 1"),
        (_set("0.codes", (slice(5, 7), 2), 255), f"{WHOSE}: 2 codes are out of their range.*row 5, agent 2"),
        (_set("0.own", (7, 0), np.nan), f"{WHOSE}: 1 observed values are not finite, the first in row 7, agent 0"),
        (_set("0.shared", (5, 2), np.inf), f"{WHOSE}: 1 values that all observe are not finite, the first in row 5$"),
        (_set("0.actions", (5, 0), 2), f"{WHOSE}: 1 actions are forbidden by their masks, the first in row 5, agent 0"),
        (_drop("0.codes"), "tensors are missing: 0.codes"),
        (_drop("0.shared"), "tensors are missing: 0.shared"),
        (_drop("0.own"), "tensors are missing: 0.own"),
        (_drop("0.actions"), "tensors are missing: 0.actions"),
        (_add_masks, "unexpected tensors: 0.masks"),
        (_replace("0.codes", lambda a: a, "0.places"), "tensors are missing: 0.codes"),
        (_replace("0.codes", lambda a: a.astype(np.int64)), "'0.codes': expected U8, found I64"),
        (_replace("0.codes", lambda a: a.astype(np.float32)), "'0.codes': expected U8, found F32"),
        (_replace("0.shared", lambda a: a.astype(np.float64)), "'0.shared': expected F32, found F64"),
        (_replace("0.codes", lambda a: a[..., 0]), rf"codes of {WHOSE}: expected \[8, 3, 1\], found \[8, 3\]"),
        (_replace("0.codes", lambda a: a[:7]), rf"codes of {WHOSE}: expected \[8, 3, 1\], found \[7, 3, 1\]"),
        (_replace("0.shared", lambda a: a[:, None]), rf"shared of {WHOSE}: expected \[8, 4\], found \[8, 1, 4\]"),
        (_replace("0.codes", lambda a: a.ravel(), "0.codes.xz"), "'0.codes': expected xz"),
        (_describe(lambda spec: spec.update(tables=[])), "expected a table of 3 'place', found none"),
        (_describe(lambda spec: spec["types"][1].update(mask="own")), "tensors are missing: 1.actions"),
        (_describe(lambda spec: spec["types"][1]["parts"][5]["values"].pop()), "expected values for a constant"),
        (_describe(lambda spec: spec["tables"].append(["unused", [[[1]]]])), "environment"),
        (_describe(_huge_constants), "'(bus|town)'"),
        (_describe(_huge_table), "'(bus|town)'"),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, change: Change, text: str) -> None:
    path = tmp_path / "bad.safetensors"
    town_demonstrations().save(path)
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    change(tensors, header)
    save_file(tensors, path, metadata | {"header": json.dumps(header)})
    with pytest.raises(InputError, match=text) as error:
        Demonstrations.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


SCREEN = (Part("image", 3, "uint8"), Part("score", 1, "int16"), Part("speed", 2), Part("lamps", 2, "uint8"))
PIXELS = EnvironmentSpec("pixels", (TypeSpec("eye", 2, 8, 3, parts=SCREEN),), 4)
EYES = [[[0, 128, 255, -300, 0.5, -2, 1, 0], [7, 8, 9, 30_000, 1.25, 4, 0, 1]]]


def pixels() -> Observations:
    seen = np.array(EYES, np.float32)
    columns = {"own": seen[..., 4:6], "int16": seen[..., 3:4].astype(np.int16), "masks": np.ones((1, 2, 3), bool)}
    columns["uint8"] = seen[..., [0, 1, 2, 6, 7]].astype(np.uint8)
    return Observations.of_arrays(forms(PIXELS)[0], columns)


def test_integers_are_kept_as_integers_and_seen_as_numbers() -> None:
    (form,) = forms(PIXELS)
    seen = pixels()
    table = form.table_of(1)
    assert (table["uint8"], table["int16"], table["own"]) == (
        ("uint8", (1, 2, 5)),
        ("int16", (1, 2, 1)),
        ("float32", (1, 2, 2)),
    )
    assert (seen.dense().tolist(), seen.dense().dtype) == (EYES, torch.float32)
    assert EnvironmentSpec.from_json(json.loads(json.dumps(PIXELS.to_json()))) == PIXELS
    layout = Layout.of(PIXELS, "type")
    rows = JointRows([seen], [torch.zeros(1, 2, dtype=torch.uint8)], [torch.ones(1, 2, dtype=torch.bool)])
    came = JointRows.from_arrays(rows.to_arrays(), layout)
    assert came.observations[0].dense().tolist() == EYES
    assert {name: (str(a.dtype), a.shape) for name, a in rows.to_arrays().items()} == JointRows.array_table(layout, 1)


@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_networks_see_integers_as_they_see_the_same_numbers(sharing: Any) -> None:
    layout = Layout.of(PIXELS, sharing)
    policy = Policy(layout, (4,), torch.Generator().manual_seed(0))
    seen = pixels()
    plain = Observations(Form.plain(2, 8, 3), {"own": seen.dense(), "masks": seen.masks()})
    (block,) = layout.blocks
    of_integers, of_numbers = (policy.outputs(0, block.see(each)) for each in (seen, plain))
    torch.testing.assert_close(of_integers, of_numbers)
    parameters = list(policy.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (of_integers, of_numbers)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("odd", [None, 0.5, 300.0, -1.0])
def test_earlier_demonstrations_of_integers_are_kept_as_integers_if_that_is_what_they_are(odd: float | None) -> None:
    spec, seen = PIXELS.plain(), np.array(EYES * 4, np.float32)
    if odd is not None:
        seen[2, 1, 0] = odd
    agents = np.ones((4, 2), bool)
    old = Demonstrations.of_types(
        *(spec, "a test", [seen], [np.zeros((4, 2), np.int64)], [np.ones((4, 2, 3), bool)], [agents]),
        *(np.array([4]), np.zeros((1, 2), np.float32), np.zeros(1, np.int64)),
    )
    old.check_against(PIXELS)
    found = old.in_form_of(PIXELS)
    assert ("0.uint8" in found.arrays) == (odd is None)
    np.testing.assert_array_equal(found.observations[0], seen)


def test_demonstrations_of_integers_come_back_from_their_file(tmp_path: Path) -> None:
    columns = {f"0.{name}": np.concatenate([t.numpy()] * 4) for name, t in pixels().columns.items()}
    arrays = columns | {"0.actions": np.zeros((4, 2), np.uint8), "0.active": np.ones((4, 2), bool)}
    made = Demonstrations(PIXELS, "a test", arrays, np.array([4]), np.zeros((1, 2), np.float32), np.zeros(1, np.int64))
    made.save(tmp_path / "pixels.safetensors")
    found = Demonstrations.load(tmp_path / "pixels.safetensors")
    assert {name: a.dtype for name, a in found.arrays.items()} == {name: a.dtype for name, a in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
