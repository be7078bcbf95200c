"""The ring of joint rows, with rows that carry their own number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.learner.replay import Batch, Replay
from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import Layout
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import Part
from bm3il.protocol.trajectories import Trajectories
from tests.learner.slow_reference import spec_of

SPEC = spec_of((2, 3, 4), (1, 2, 3), episode_length=5)
LAYOUT = Layout.of(SPEC, "type")


def episodes(numbers: list[int], lengths: list[int], terminated: list[bool]) -> Trajectories:
    """Episodes whose observation at step t is 100·number + t for every agent; action t is t mod A, reward t is t."""
    made = Trajectories.zeros(SPEC, len(numbers))
    made.lengths[:] = lengths
    for e, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        (made.terminated if terminated[e] else made.truncated)[length - 1, e] = True
        for m, t in enumerate(SPEC.types):
            for step in range(length + 1):
                made.observations[m][step, e] = 100 * number + step
                made.active[m][step, e] = step % 2 == 0
                made.action_masks[m][step, e, :, step % t.action_dim] = True
            for step in range(length):
                made.actions[m][step, e] = step % t.action_dim
                made.rewards[m][step, e] = step
    return Trajectories.from_arrays(made.arrays, SPEC)


def assert_consistent(batch: Batch, ends: dict[int, tuple[int, bool]]) -> set[tuple[int, int]]:
    """Every row is one step of one episode and its true successor; returns the (episode, step) pairs seen."""
    seen = set()
    for row in range(len(batch.rows)):
        number, step = divmod(int(batch.rows.observations[0].dense()[row, 0, 0]), 100)
        length, terminates = ends[number]
        assert 0 <= step < length
        assert bool(batch.terminated[row]) == (terminates and step == length - 1)
        for b, block in enumerate(LAYOUT.blocks):
            now, following = batch.rows.observations[b], batch.next_observations[b]
            assert (now.dense()[row] == 100 * number + step).all()
            assert (following.dense()[row] == 100 * number + step + 1).all()
            assert (batch.rows.actions[b][row] == step % block.action_dim).all()
            assert now.masks()[row, :, step % block.action_dim].all()
            assert following.masks()[row, :, (step + 1) % block.action_dim].all()
            assert (batch.rows.active[b][row] == (step % 2 == 0)).all()
            assert (batch.next_active[b][row] == (step % 2 == 1)).all()
            assert (batch.rewards[b][row] == step).all()
        seen.add((number, step))
    return seen


def test_rows_of_uneven_episodes_keep_to_their_episode() -> None:
    replay = Replay(LAYOUT, window_steps=20)
    fresh = replay.rows(replay.add(episodes([1, 2, 3], [5, 2, 3], [False, True, False])))
    assert len(replay) == len(fresh) == 10
    assert [int(v) for v in fresh.observations[1].dense()[:, 0, 0]] == [*range(100, 105), 200, 201, 300, 301, 302]
    batch = replay.sample(1_000, torch.Generator().manual_seed(0))[0]
    ends = {1: (5, False), 2: (2, True), 3: (3, False)}
    assert assert_consistent(batch, ends) == {(n, t) for n, (length, _) in ends.items() for t in range(length)}


def test_the_ring_overwrites_the_oldest_rows_and_never_joins_what_is_left_of_them() -> None:
    replay = Replay(LAYOUT, window_steps=15)
    ends = {}
    for number in range(12):
        length, terminated = 1 + (number * 3) % 5, number % 2 == 0
        ends[number] = (length, terminated)
        replay.add(episodes([number], [length], [terminated]))
        batch = replay.sample(400, torch.Generator().manual_seed(number))[0]
        seen = assert_consistent(batch, ends)
        assert {(number, t) for t in range(length)} <= seen
        assert len(seen) == len(replay)
    assert {n for n, _ in seen} <= set(range(6, 12))


def test_a_window_holds_the_steps_that_it_promises() -> None:
    replay = Replay(LAYOUT, window_steps=15)
    for number in range(7):
        replay.add(episodes([number], [5], [False]))
    assert len(replay) == 15


def test_a_chunk_that_does_not_fit_is_refused_before_anything_is_lost() -> None:
    replay = Replay(LAYOUT, window_steps=5)
    replay.add(episodes([1], [5], [False]))
    with pytest.raises(InputError, match="window-steps"):
        replay.add(episodes([2, 3], [5, 5], [False, False]))
    assert_consistent(replay.sample(50, torch.Generator().manual_seed(0))[0], {1: (5, False)})


@pytest.mark.parametrize("window_steps", [20, 10, 5])
def test_all_fresh_rows_of_an_iteration_are_told_even_if_the_window_is_smaller(window_steps: int) -> None:
    replay = Replay(LAYOUT, window_steps)
    fresh = replay.add_all([episodes([n], [length], [True]) for n, length in ((1, 5), (2, 2), (3, 5))])
    expected = [*range(100, 105), *range(200, 202), *range(300, 305)]
    assert [int(v) for v in fresh.observations[1].dense()[:, 0, 0]] == expected
    assert len(fresh.actions[1]) == len(fresh.active[1]) == len(expected)


def test_fresh_rows_are_copies() -> None:
    replay = Replay(LAYOUT, window_steps=5)
    fresh = replay.rows(replay.add(episodes([1], [5], [False])))
    kept = fresh.observations[0].dense().clone()
    replay.add(episodes([2], [5], [False]))
    assert torch.equal(fresh.observations[0].dense(), kept)


def test_a_restored_ring_samples_and_overwrites_alike() -> None:
    first, second = Replay(LAYOUT, 15), Replay(LAYOUT, 15)
    for number in range(5):
        first.add(episodes([number], [1 + number], [True]))
    second.load_state({name: array.copy() for name, array in first.state().items()})
    for replay in (first, second):
        replay.add(episodes([9], [4], [False]))
    assert first.observed == second.observed == 1 + 2 + 3 + 4 + 5 + 4
    drawn = [replay.sample(60, torch.Generator().manual_seed(1)) for replay in (first, second)]
    (one, its_numbers), (other, other_numbers) = drawn
    assert torch.equal(its_numbers, other_numbers)
    for b in range(len(LAYOUT.blocks)):
        assert torch.equal(one.rows.observations[b].dense(), other.rows.observations[b].dense())
        assert torch.equal(one.rows.observations[b].masks(), other.rows.observations[b].masks())
        assert torch.equal(one.next_observations[b].dense(), other.next_observations[b].dense())
    assert torch.equal(one.terminated, other.terminated)


@pytest.mark.parametrize("batches", [1, 3, 7])
def test_whole_episodes_take_a_short_way_to_the_same_rows(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rings = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(Replay, "_fits_whole", lambda *_: False)
        replay, fresh = Replay(LAYOUT, 20), []
        for batch in range(batches):
            numbers = [2 * batch, 2 * batch + 1]
            fresh.append(replay.rows(replay.add(episodes(numbers, [5, 5], [True, False]))))
        rings.append((replay.state(), fresh))
    (short, fresh), (long, expected) = rings
    for name, array in long.items():
        np.testing.assert_array_equal(short[name], array, err_msg=name)
    for rows, wanted in zip(fresh, expected, strict=True):
        for name, array in wanted.to_arrays().items():
            np.testing.assert_array_equal(rows.to_arrays()[name], array)


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "_add", lambda *_: pytest.fail("the long way"))
    replay = Replay(LAYOUT, 20)
    for _ in range(3):
        replay.add(episodes([1, 2], [5, 5], [True, False]))


@pytest.mark.parametrize("name", ["berlin?types=10&agents=50&sight=near", "rover_tower"])
def test_a_step_of_an_agent_takes_few_bytes(name: str) -> None:
    spec = make_environment(name, 1).spec
    steps = 10 * spec.episode_length
    state = Replay(Layout.of(spec, "type"), steps).state()
    assert sum(array.nbytes for array in state.values()) <= 30 * steps * spec.num_agents


@pytest.mark.parametrize("name", ["berlin?types=10&agents=50&sight=near", "rover_tower"])
def test_what_was_kept_compact_comes_out_as_it_was_seen(name: str) -> None:
    environment = make_environment(name, 2)
    layout = Layout.of(environment.spec, "type")
    made = rollout(environment, UniformPolicy(environment.spec), 0)
    replay = Replay(layout, 2 * environment.spec.episode_length)
    replay.add(made)
    batch = replay.sample(30, torch.Generator().manual_seed(0))[0]
    for b, types in enumerate(environment.spec.blocks):
        seen, masks = (
            torch.from_numpy(np.concatenate([parts[m] for m in types], axis=2))
            for parts in (made.observations, made.action_masks)
        )
        now, following = batch.rows.observations[b], batch.next_observations[b]
        for row in range(30):
            t, e = (seen[:-1] == now.dense()[row]).flatten(2).all(2).nonzero()[0].tolist()
            assert torch.equal(now.masks()[row], masks[t, e])
            assert torch.equal(following.dense()[row], seen[t + 1, e])
            assert torch.equal(following.masks()[row], masks[t + 1, e])


def test_a_replay_of_a_release_that_kept_integers_otherwise_is_refused_in_one_line() -> None:
    types = tuple(replace(t, parts=(Part("image", t.observation_dim, "uint8"),)) for t in SPEC.types)
    before = Replay(LAYOUT, 10).state()
    with pytest.raises(InputError, match=r"the checkpoint's replay has no 0\.uint8, 1\.uint8"):
        Replay(Layout.of(replace(SPEC, types=types), "type"), 10).load_state(before)


def test_rows_are_known_by_their_numbers_in_the_run() -> None:
    replay, marks = Replay(LAYOUT, 15), []
    assert replay.kept() is None
    for number in range(8):
        length = 1 + (number * 3) % 5
        replay.add(episodes([number], [length], [True]))
        marks += [100 * number + t for t in range(length)]
        first, rows = replay.kept() or (0, None)
        assert rows is not None
        assert rows.observations[1].dense()[:, 0, 0].tolist() == marks[first:]
        batch, numbers = replay.sample(100, torch.Generator().manual_seed(number))
        assert batch.rows.observations[1].dense()[:, 0, 0].tolist() == [marks[n] for n in numbers.tolist()]
