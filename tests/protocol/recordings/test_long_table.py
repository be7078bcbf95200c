"""Tables of others: what is meant comes out as it was, what cannot be meant is named with its row."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("polars")
import polars

from bm3il.actors.experts.recording import record
from bm3il.actors.experts.scripted import RoverTowerExpert
from bm3il.actors.policy import UniformPolicy
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.recordings.long_table import read_table
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import FREE, EnvironmentSpec, Part, TypeSpec
from tests.protocol.recordings.written import Row, assert_same, rows_of, write

TAXI = TypeSpec("taxi", 2, 3, 3, parts=(Part("position", 2), Part("fuel", 1)))
TRAM = TypeSpec("tram", 1, 2, 2, discrete=False)
TOWN: Any = SimpleNamespace(spec=EnvironmentSpec("town", (TAXI, TRAM), 4))


def town_rows() -> list[Row]:
    """Two episodes of 3 and 2 steps, of two taxis with masks and a tram; the second taxi comes late, leaves early."""
    rows: list[Row] = []
    for episode, steps in (("monday", 3), ("tuesday", 2)):
        for step in range(steps):
            for x in range(2):
                if x == 0 or step == 1:
                    place = {"position.0": step / 4, "position.1": -x / 3, "fuel": 1 - step / 8}
                    masks = {"mask.0": 1, "mask.1": x, "mask.2": 1 - x}
                    mine = {"episode": episode, "step": step, "agent": f"taxi_{x}", "action": 2 - x, "reward": 0.5}
                    rows.append(mine | place | masks)
            seen = {"observation.0": step, "observation.1": 2}
            rows.append({"episode": episode, "step": step, "agent": "tram"} | seen | {"action.0": 1, "action.1": -0.25})
    return rows


def read(tmp_path: Path, rows: list[Row], mapping: str = "", environment: Any = TOWN) -> Demonstrations:
    """Of a CSV with these rows, and a mapping file."""
    if mapping:
        (tmp_path / "mapping.yaml").write_text(mapping)
    path = write(tmp_path / "town.csv", rows)
    return read_table(path, environment, tmp_path / "mapping.yaml" if mapping else None)[0]


def changed(column: str, value: Any, row: int = 3) -> Callable[[list[Row]], list[Row]]:
    """Rows with another value in one place."""
    return lambda rows: [r | {column: value} if i == row else r for i, r in enumerate(rows)]


def renamed(rows: list[Row], **names: str) -> list[Row]:
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_what_was_recorded_comes_back(tmp_path: Path, suffix: str) -> None:
    rovers = make_environment("rover_tower?pairs=2", 3)
    recorded = record(rovers, RoverTowerExpert(), 3, seed=1, origin="")
    path = write(tmp_path / f"rovers{suffix}", rows_of(recorded))
    found, notes = read_table(path, rovers)
    assert_same(found, recorded)
    assert (found.spec, notes) == (rovers.spec, [])


@pytest.mark.parametrize(
    "name",
    ["pettingzoo:mpe2.simple_tag_v3?arguments=max_cycles:4", "berlin?types=2&agents=4&sight=near"],
)
def test_uneven_types_and_compact_rows_come_back(tmp_path: Path, name: str) -> None:
    if name.startswith("pettingzoo"):
        pytest.importorskip("mpe2")
    world = make_environment(name, 2)
    recorded = record(world, UniformPolicy(world.spec), 2, seed=1, origin="")
    assert_same(read(tmp_path, rows_of(recorded, masks=True), environment=world), recorded)


def test_rows_come_in_any_order(tmp_path: Path) -> None:
    rows = town_rows()
    first, *others = rows  # which names the first episode
    random.Random(3).shuffle(others)
    assert_same(read(tmp_path, [first, *others]), read(tmp_path, rows))


def test_who_comes_late_or_leaves_early_is_inactive_then(tmp_path: Path) -> None:
    found = read(tmp_path, town_rows())
    assert found.active[0].tolist() == [[True, False], [True, True], [True, False], [True, False], [True, True]]
    assert found.active[1].all()
    assert found.actions[0][found.active[0]].tolist() == [2, 2, 1, 2, 2, 2, 1]
    assert found.action_masks[0][1].tolist() == [[True, False, True], [True, True, False]]
    assert found.observations[0][1, 1].tolist() == pytest.approx([0.25, -1 / 3, 0.875])
    np.testing.assert_array_equal(found.actions[1][:, 0], [[1, -0.25]] * 5)
    np.testing.assert_array_equal(found.returns, [[1.5, 0.5, np.nan], [1, 0.5, np.nan]])


def test_who_is_away_for_a_while_says_so_in_a_column(tmp_path: Path) -> None:
    rows = town_rows()
    # The first taxi in the second step of monday; the rest of its row is not read.
    rows[2] |= {"active": "false", "action": None, "reward": None}
    found = read(tmp_path, [{"active": "true"} | row for row in rows])
    assert found.active[0][:3, 0].tolist() == [True, False, True]
    assert found.returns[0, :2].tolist() == [1.0, 0.5]


def test_a_code_may_be_one_column(tmp_path: Path) -> None:
    lift = TypeSpec(
        "lift", 1, 4, 2, parts=(Part("floor.low", 1, "code"), Part("floor.high", 2, "code"), Part("load", 1))
    )
    house: Any = SimpleNamespace(spec=EnvironmentSpec("house", (lift,), 9))
    rows = [{"episode": 0, "step": i, "floor": floor, "load": 0.5, "action": 1} for i, floor in enumerate((2, None, 0))]
    found = read(tmp_path, rows, environment=house)
    assert found.observations[0][:, 0].tolist() == [[0, 0, 1, 0.5], [0, 0, 0, 0.5], [1, 0, 0, 0.5]]
    one_hot = [{"floor.low.0": 0, "floor.high.0": 0, "floor.high.1": 1} | row for row in rows]
    for row in one_hot:
        del row["floor"]
    assert read(tmp_path, one_hot, environment=house).observations[0][:, 0].argmax(1).tolist() == [2, 2, 2]
    with pytest.raises(InputError, match=r"row 2: expected 0..2 or nothing in 'floor', got 3$"):
        read(tmp_path, [rows[0] | {"floor": 3}], environment=house)
    with pytest.raises(InputError, match=r"the column 'floor' .* is missing; did you mean floors\?"):
        read(tmp_path, renamed(rows, floor="floors"), environment=house)


def test_types_and_numbers_do_in_place_of_names(tmp_path: Path) -> None:
    rows = [{"type": row["agent"][:4], "number": int(row["agent"][5:] or 0)} | row for row in town_rows()]
    for row in rows:
        del row["agent"]
    assert_same(read(tmp_path, rows), read(tmp_path, town_rows()))
    with pytest.raises(InputError, match=r"row 5: expected agents 0..1 of 'taxi', got 2$"):
        read(tmp_path, changed("number", 2)(rows))
    with pytest.raises(InputError, match=r"row 5: unknown type 'taxy'; did you mean taxi"):
        read(tmp_path, changed("type", "taxy")(rows))


MAPPING = """
columns:
  episode: day
  agent: car
  action: {taxi: turn, tram: [gas, bend]}
  position: [x, y]
  observation: {tram: [speed, line]}
types: {cab: taxi}
agents: {M 10: tram_0}
actions: {taxi: {no: 0, left: 1, right: 2}}
"""


def mapped_rows() -> list[Row]:
    names = {"episode": "day", "agent": "car", "position.0": "x", "position.1": "y", "observation.0": "speed"}
    names |= {"observation.1": "line", "action": "turn", "action.0": "gas", "action.1": "bend"}
    rows = renamed(town_rows(), **names)
    for row in rows:
        row["car"] = row["car"].replace("taxi", "cab").replace("tram", "M 10")
        if "turn" in row:
            row["turn"] = ("no", "left", "right")[row["turn"]]
    return rows


def test_a_mapping_file_tells_other_names(tmp_path: Path) -> None:
    assert_same(read(tmp_path, mapped_rows(), MAPPING), read(tmp_path, town_rows()))
    with pytest.raises(InputError, match=r"expected an integer in 'turn' \(.*\), got 'rigth'; did you mean right\?"):
        read(tmp_path, changed("turn", "rigth")(mapped_rows()), MAPPING)


NUMBERED_ANEW = "actions: {taxi: {1: 0, 2: 1, 3: 2}}"


@pytest.mark.parametrize("kind", ["text", "whole", "floats"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_words_may_be_numbers_however_they_are_written(tmp_path: Path, kind: str, suffix: str) -> None:
    write_as: Callable[[int], Any] = {"text": str, "whole": int, "floats": float}[kind]
    rows = [r | {"action": write_as(r["action"] + 1)} if "action" in r else r for r in town_rows()]
    (tmp_path / "mapping.yaml").write_text(NUMBERED_ANEW)
    path = write(tmp_path / f"anew{suffix}", rows)
    assert_same(read_table(path, TOWN, tmp_path / "mapping.yaml")[0], read(tmp_path, town_rows()))
    path = write(path, changed("action", write_as(0))(rows))
    with pytest.raises(InputError, match=r"row \d: expected a word of the mapping file in 'action' \(.*\), got '0"):
        read_table(path, TOWN, tmp_path / "mapping.yaml")


def test_plain_numbers_do_beside_words(tmp_path: Path) -> None:
    found = read(tmp_path, town_rows(), "actions: {taxi: {no: 0, left: 1, right: 2}}")
    assert_same(found, read(tmp_path, town_rows()))


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ("columns: [a]", "expected sections"),
        ("a: [", r"is not YAML: line 1, column 5: expected the node content"),
        ("colums: {}", r"unknown section 'colums'; did you mean columns"),
        ("columns: {positon: [x, y]}", "unknown column 'positon'; did you mean position"),
        ("columns: {position: [x, y, z]}", "'position' of 'taxi' has 2, got x, y, z"),
        ("columns: {action: {bus: turn}}", "unknown type 'bus'"),
        ("columns: {step: [a, b]}", "expected one column for 'step'"),
        ("types: {cab: taxy}", r"unknown type 'taxy'; did you mean taxi"),
        ("agents: {M 10: taxi_2}", r"unknown agent 'taxi_2'; did you mean taxi_"),
        ("columns: {reward: {tram: rewrad}}", r"'rewrad' \('reward' of 'tram'\) is missing; did you mean reward"),
        ("columns: {active: prezent}", r"the column 'prezent' \('active' of 'taxi'\) is missing; did you mean agent"),
        ("columns: {mask: {taxi: [mask.0, mask.1, musk]}}", "'musk' .* is missing; did you mean mask"),
        ("columns: {episode: day}", r"the column 'day' \('episode'\) is missing"),
        ("actions: {taxi: {left: 3}}", r"expected 0..2 for 'left' of 'taxi', got 3"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path: Path, mapping: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as error:
        read(tmp_path, town_rows(), mapping)
    assert "mapping.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def without(column: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{name: value for name, value in row.items() if name != column} for row in rows]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("step"), r"town.csv: the column 'step' \(the step of its episode\) is missing; known: action"),
        (lambda rows: renamed(rows, fuel="fule"), r"the column 'fuel' .*of 'taxi'.* is missing; did you mean fule\?"),
        (
            lambda rows: renamed(rows, action="actoin"),
            r"the column 'action' .* is missing; did you mean .*actoin",
        ),
        (lambda rows: [*rows, rows[3]], r"row 14: taxi_1 was in this step before, in row 5$"),
        (
            lambda rows: [r for r in rows if r["step"] != 1],
            r"row 4: expected a row of step 1 in episode 'monday' before",
        ),
        (lambda rows: rows[2:], r"row 2: expected a row of step 0 in episode 'monday' before one of step 1"),
        (lambda rows: rows[:2] + rows[3:], r"row 6: taxi_0 was last seen 2 steps ago, in row 2; .*column 'active'"),
        (changed("step", 9, 11), r"row 13: expected a row of step 2 in episode 'tuesday' before one of step 9"),
        (changed("step", "1st"), r"row 5: expected an integer in 'step' .*, got '1st'$"),
        (changed("step", 1e300), r"row 5: expected an integer in 'step' .*, got '1e\+300'$"),
        (changed("step", 1.5), r"row 5: expected an integer in 'step' .*, got '1.5'$"),
        (changed("episode", None), r"row 5: expected which episode a row belongs to in 'episode', got nothing$"),
        (changed("agent", "taxi_7"), r"row 5: unknown agent 'taxi_7'; did you mean taxi_"),
        (changed("fuel", "0,5"), r"row 5: expected a number in 'fuel' \(.*\), got '0,5'$"),
        (changed("fuel", None), r"row 5: expected a number in 'fuel' .*, got nothing$"),
        (changed("fuel", "nan"), r"row 5: expected a number in 'fuel' .*, got 'nan'$"),
        (changed("fuel", "1e60"), r"row 5: expected a finite number in 'fuel', got inf$"),
        (changed("action", 3), r"row 5: expected an action of 'taxi' in 0..2, got 3$"),
        (changed("action", 2), r"row 5: expected an allowed action \(0, 1\), got 2$"),
        (changed("action.1", 1.5, 1), r"row 3: expected an action of 'tram' in -1..1, got 1.5$"),
        (changed("mask.1", "maybe"), r"row 5: expected a number in 'mask.1' .*, got 'maybe'"),
        (changed("mask.1", -1), r"row 5: expected 0 or 1 in 'mask.1' \(whether it may do that, of 'taxi'\), got -1$"),
        (changed("mask.1", 0.5), r"row 5: expected 0 or 1 in 'mask.1' .*, got 0.5$"),
        (
            lambda rows: changed("active", 2)([r | {"active": "true"} for r in rows]),
            r"row 5: expected 0 or 1 in 'active' \(whether it takes part, of 'taxi'\), got 2$",
        ),
        (changed("return", 5), None),
    ],
)
def test_what_cannot_be_meant_is_named(
    tmp_path: Path, change: Callable[[list[Row]], list[Row]], text: str | None
) -> None:
    rows = change(town_rows())
    if text is None:
        assert np.isnan(read(tmp_path, rows).returns[0, 2])
        return
    with pytest.raises(InputError, match=text) as error:
        read(tmp_path, rows)
    assert str(error.value).startswith(str(tmp_path / "town.csv"))
    assert "\n" not in str(error.value)


def test_an_episode_is_no_longer_than_the_environments(tmp_path: Path) -> None:
    rows = [row for row in town_rows() if row["agent"] != "taxi_1"]
    longer = [row | {"step": row["step"] + 3} for row in rows if row["episode"] == "monday"]
    with pytest.raises(InputError, match=r"row \d+: expected at most 4 steps, as an episode of 'town' has them, got 6"):
        read(tmp_path, [*rows, *longer])


def test_the_return_of_an_episode_may_be_written_in_all_its_rows(tmp_path: Path) -> None:
    rows = [row | {"return": 7 if row["episode"] == "monday" else None} for row in town_rows()]
    found = read(tmp_path, rows)
    np.testing.assert_array_equal(found.returns[0], [7, 7, 7])
    assert np.isnan(found.returns[1]).all()
    with pytest.raises(InputError, match=r"row 4: expected the same 'return' in all rows .*, got 8 and 7"):
        read(tmp_path, changed("return", 8, 2)(rows))


def test_what_no_agent_observes_there_is_refused(tmp_path: Path) -> None:
    hall = TypeSpec(
        "hall", 2, 4, 2, True, (Part("door", 2, "code"), Part("clock", 1, "shared"), Part("count", 1, "uint8"))
    )
    house: Any = SimpleNamespace(spec=EnvironmentSpec("house", (hall,), 9))
    row = {"episode": 0, "step": 0, "door.0": 0, "door.1": 1, "clock": 0.25, "count": 3, "action": 0}
    rows = [row | {"agent": f"hall_{x}"} for x in range(2)]
    assert read(tmp_path, rows, environment=house).observations[0].tolist() == [[[0, 1, 0.25, 3]] * 2]
    for column, value in (("door.0", 1), ("clock", 0.5), ("count", 2.5), ("count", 300)):
        with pytest.raises(InputError, match=r"row 3: expected .* as '.*' of 'hall' in 'house', got"):
            read(tmp_path, changed(column, value, 1)(rows), environment=house)
    alone = read(tmp_path, rows[1:], environment=house)
    assert alone.observations[0][0, 1].tolist() == [0, 1, 0.25, 3], "what all see is not what an absent one sees"


def test_masks_must_be_those_of_the_environment(tmp_path: Path) -> None:
    free: Any = SimpleNamespace(spec=EnvironmentSpec("free", (TypeSpec("a", 1, 1, 2, mask=FREE),), 9))
    row = {"episode": 0, "step": 0, "observation.0": 0, "action": 0, "mask.0": 1, "mask.1": 1}
    assert read(tmp_path, [row], environment=free).num_rows == 1
    with pytest.raises(InputError, match="row 2: 'free' allows action 1 there, and its mask does not"):
        read(tmp_path, [row | {"mask.1": 0}], environment=free)


def test_columns_that_nobody_asked_for_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "town.csv", [row | {"rewrd": 1} for row in town_rows()])
    assert read_table(path, TOWN)[1] == ["columns that were not read: rewrd"]


def test_a_part_may_be_called_like_a_key(tmp_path: Path) -> None:
    last = TypeSpec("a", 1, 2, 2, parts=(Part("action", 1), Part("speed", 1)))
    world: Any = SimpleNamespace(spec=EnvironmentSpec("world", (last,), 9))
    rows = [{"episode": 0, "step": 0, "observation.action": 0.5, "speed": 3, "action": 1}]
    assert read(tmp_path, rows, environment=world).observations[0].tolist() == [[[0.5, 3]]]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"", "cannot be read as a table"),
        ("a.csv", b"episode,step\n", "found none below the heading"),
        ("a.csv", b"episode,step, step\n0,0,0\n", "found 'step' more than once"),
        ("a.csv", b"episode,step\n0,0,0\n", "cannot be read as a table"),
        ("a.csv", b"episode,step\n\xff\xfe,0\n", "cannot be read as a table"),
        ("a.parquet", b"PAR1 and not more", "cannot be read as a table"),
        ("a.xls", b"", r"a file that ends with \.csv"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text) as error:
        read_table(tmp_path / name, TOWN)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"cannot be read|ends with"):
        read_table(tmp_path / f"no_{name}", TOWN)


def test_columns_of_parquet_are_text_or_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "town.parquet", town_rows())
    frame = polars.read_parquet(path)
    frame.with_columns(polars.col("agent").cast(polars.Categorical)).write_parquet(path)
    assert_same(read_table(path, TOWN)[0], read(tmp_path, town_rows()))
    for column in ("episode", "fuel"):
        frame.with_columns(polars.concat_list(column)).write_parquet(path)
        with pytest.raises(InputError, match=rf"expected text or numbers in '{column}' \(.*\), got List"):
            read_table(path, TOWN)


def test_the_examples_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "recordings.md").read_text(encoding="utf-8")
    table, places = re.findall(r"```\n(episode,step.*?)```", text, re.DOTALL)
    (mapping,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "drives.csv").write_text(table)
    found, notes = read_table(tmp_path / "drives.csv", TOWN)
    assert (found.num_rows, notes) == (2, [])
    np.testing.assert_array_equal(found.returns, [[1, 0.5, 0]])
    columns = {"episode": "day", "step": "minute", "agent": "vehicle", "position.0": "x", "position.1": "y"}
    columns |= {
        "action": "turn",
        "action.0": "gas",
        "action.1": "bend",
        "observation.0": "speed",
        "observation.1": "line",
    }
    heading, _, rows = table.partition("\n")
    rows = rows.replace("tram", "B-XY 12").replace("taxi", "cab")
    (tmp_path / "named.csv").write_text(",".join(columns.get(name, name) for name in heading.split(",")) + "\n" + rows)
    (tmp_path / "names.yaml").write_text(mapping)
    assert_same(read_table(tmp_path / "named.csv", TOWN, tmp_path / "names.yaml")[0], found)
    assert places.startswith("episode,step,agent,place\n")


def test_a_mistyped_number_is_found_in_its_line_of_the_file(tmp_path: Path) -> None:
    lines = ["episode,step,agent,position.0,position.1,fuel,observation.0,observation.1,action,action.0,action.1"]
    lines += ["0,0, tram_0 ,,,, 1 ,2,,0.5,1", "0,0,taxi_0,1,2,3,,,0,,", '"0",0,taxi_1,1,2,l,,,0,,']
    path = tmp_path / "typed.csv"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n\r\n")
    with pytest.raises(InputError, match=r"typed.csv, row 4: expected a number in 'fuel' .*, got 'l'$"):
        read_table(path, TOWN)
    assert path.read_text().splitlines()[4 - 1].endswith("l,,,0,,")
    path.write_text(path.read_text().replace(",l,", ",1,"))
    assert read_table(path, TOWN)[0].num_rows == 1


def test_episodes_are_in_the_order_of_their_first_rows(tmp_path: Path) -> None:
    """And not in that of their names, by which 10 comes before 9."""
    names = {"monday": "9", "tuesday": "10"}
    rows = [row | {"episode": names[row["episode"]]} for row in town_rows()]
    found = read(tmp_path, rows)
    assert found.episode_lengths.tolist() == [3, 2]
    assert_same(found, read(tmp_path, town_rows()))


def test_steps_may_count_from_any_number(tmp_path: Path) -> None:
    rows = [row | {"step": row["step"] + 7} for row in town_rows()]
    assert_same(read(tmp_path, rows), read(tmp_path, town_rows()))
