from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.reward_server.memory import Memory
from tests.plain import seen_by

torch.set_num_threads(1)

LAYOUT = Layout.of(EnvironmentSpec("one", (TypeSpec("a", 2, 1, 3),), 10), "agent")


def numbered(first: int, end: int) -> JointRows:
    """Rows that carry their number."""
    number = torch.arange(first, end)
    return JointRows(
        seen_by(LAYOUT, [number.float().view(-1, 1, 1).expand(-1, 2, 1)]),
        [(number % 3).view(-1, 1).expand(-1, 2)],
        [torch.ones(end - first, 2, dtype=torch.bool)],
    )


def pushed(memory: Memory, counts: list[int]) -> Memory:
    for count in counts:
        memory.push(numbered(memory.observed, memory.observed + count))
    return memory


def held(memory: Memory) -> list[int]:
    """The numbers of the rows in it, by place."""
    rows = memory.rows
    numbers = [int(value) for value in rows.observations[0].dense()[: memory.filled, 0, 0]]
    assert rows.actions[0][: memory.filled].tolist() == [[n % 3] * 2 for n in numbers]
    assert rows.active[0][: memory.filled].all()
    return numbers


@pytest.mark.parametrize("counts", [[3], [7], [4, 4, 4], [23], [2, 30, 1]])
def test_a_window_holds_the_newest(counts: list[int]) -> None:
    memory = pushed(Memory(LAYOUT, 7, "window", 0), counts)
    assert sorted(held(memory)) == list(range(max(0, sum(counts) - 7), sum(counts)))


@pytest.mark.parametrize("counts", [[40], [3, 30, 1, 6], [7, 33], [1] * 40])
def test_a_reservoir_equals_one_row_after_the_other(counts: list[int]) -> None:
    """Algorithm R as Vitter has it, on the same random bits."""
    places = list(range(7))
    generator = torch.Generator().manual_seed(5)
    for number in range(40):
        bits = int(torch.randint(2**63 - 1, (1,), generator=generator))
        if number >= 7 and bits % (number + 1) < 7:
            places[bits % (number + 1)] = number
    assert held(pushed(Memory(LAYOUT, 7, "run", 5), counts)) == places


@pytest.mark.parametrize("counts", [[6], [1, 4, 1], [3, 3]])
def test_every_set_of_rows_is_as_likely_as_every_other(counts: list[int]) -> None:
    """3 of 6 rows: 20 sets. Chi-square with 19 degrees of freedom, below its 99.9 % quantile."""
    draws = 4_000
    found = Counter(frozenset(held(pushed(Memory(LAYOUT, 3, "run", seed), counts))) for seed in range(draws))
    expected = draws / 20
    sets = [frozenset(rows) for rows in combinations(range(6), 3)]
    assert sum((found[rows] - expected) ** 2 / expected for rows in sets) < 43.8


def test_old_rows_are_in_it_as_often_as_new_ones() -> None:
    """20 of 2,000 rows over 300 seeds: 3 rows of every hundred by the mean, chi-square over the twenty hundreds."""
    found = np.zeros(20)
    for seed in range(300):
        for number in held(pushed(Memory(LAYOUT, 20, "run", seed), [800, 500, 700])):
            found[number // 100] += 1
    assert ((found - 300) ** 2 / 300).sum() < 43.8


@pytest.mark.parametrize("kind", ["window", "run"])
def test_a_state_continues_to_the_same_bits(kind: str) -> None:
    memory = pushed(Memory(LAYOUT, 7, kind, 1), [5, 20])  # type: ignore[arg-type]
    saved = memory.state()
    assert {n: (a.dtype.name, a.shape) for n, a in saved.items()} == Memory.state_table(LAYOUT, 7)
    restored = Memory(LAYOUT, 7, kind, 2)  # type: ignore[arg-type]
    restored.load_state(saved)
    assert held(pushed(restored, [3, 40])) == held(pushed(memory, [3, 40]))
    for name, array in memory.state().items():
        np.testing.assert_array_equal(restored.state()[name], array)


@pytest.mark.parametrize(("name", "value"), [("observed", -1), ("observed", 2**62), ("0.actions", 9)])
def test_a_state_with_impossible_values_is_refused(name: str, value: int) -> None:
    saved = Memory(LAYOUT, 7, "run", 1).state()
    saved[name] = np.full_like(saved[name], value)
    with pytest.raises(ProtocolError):
        Memory(LAYOUT, 7, "run", 1).load_state(saved)


@pytest.mark.parametrize("sight", ["all", "near"])
def test_rows_of_a_described_environment_stay_compact(sight: str) -> None:
    """What a commuter observes is 137 numbers, or 548 bytes: a memory takes 15 for that, the action and all."""
    berlin = Berlin(1, agents=100, sight=sight)
    played = rollout(berlin, UniformPolicy(berlin.spec), seed=3)
    layout = Layout.of(berlin.spec, "type")
    rows = Demonstrations.from_trajectories(played, berlin.spec, "uniform").rows(layout)
    memory, restored = (Memory(layout, len(rows), "window", 0) for _ in range(2))
    assert sum(tensor.nbytes for tensor in memory.rows.tensors()) < 15 * 100 * len(rows)
    memory.push(rows)
    restored.load_state(memory.state())
    observations, masks, actions = (
        np.concatenate([part[: len(rows), 0] for part in parts], axis=1)
        for parts in (played.observations, played.action_masks, played.actions)
    )
    for kept in (memory.rows, restored.rows):
        np.testing.assert_array_equal(kept.observations[0].dense().numpy(), observations)
        np.testing.assert_array_equal(kept.observations[0].masks().numpy(), masks)
        np.testing.assert_array_equal(kept.actions[0].numpy(), actions)
        assert kept.active[0].all()
