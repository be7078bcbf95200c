from __future__ import annotations

import torch

from bm3il.protocol.layout import JointRows
from bm3il.reward_server.batcher import QueryBatcher, Waiting
from tests.plain import observed


def query(name: str, rows: int, arrived: float = 0.0, alone: bool = False) -> Waiting:
    part = [torch.zeros(rows, 1)]
    seen = [observed(torch.zeros(rows, 1, 1), torch.ones(rows, 1, 1, dtype=torch.bool))]
    return Waiting(name, JointRows(seen, part, part), None, False, alone, arrived)


def names(queries: list[Waiting]) -> list[str]:
    return [q.request for q in queries]


def make_batcher() -> QueryBatcher:
    return QueryBatcher(max_batch_rows=10, max_delay_seconds=1.0, max_queue_rows=30, deadline_seconds=5.0)


def test_a_query_waits_for_others_until_the_delay_is_over() -> None:
    batcher = make_batcher()
    assert batcher.wait_seconds(0.0) is None
    batcher.add(query("a", 3, arrived=0.0))
    batcher.add(query("b", 3, arrived=0.9))
    assert batcher.wait_seconds(0.75) == 0.25
    assert batcher.take(0.75) == []
    assert names(batcher.take(1.0)) == ["a", "b"]
    assert batcher.wait_seconds(1.0) is None
    assert batcher.rows == 0


def test_a_full_batch_does_not_wait() -> None:
    batcher = make_batcher()
    for name, rows in (("a", 4), ("b", 4), ("c", 4)):
        batcher.add(query(name, rows))
    assert names(batcher.take(0.0)) == ["a", "b"]  # c would make it 12 rows
    assert batcher.take(0.0) == []
    assert names(batcher.take(0.0, flush=True)) == ["c"]


def test_a_query_larger_than_a_batch_is_a_batch() -> None:
    batcher = make_batcher()
    batcher.add(query("large", 25))
    assert names(batcher.take(0.0)) == ["large"]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    batcher = make_batcher()
    assert all(batcher.add(query(name, 10)) is None for name in "abc")
    refusal = batcher.add(query("d", 1))
    assert refusal is not None
    assert refusal.cause == "overloaded"
    batcher.take(0.0)
    assert batcher.add(query("d", 1)) is None


def test_a_query_past_its_deadline_is_dropped_not_computed() -> None:
    batcher = make_batcher()
    batcher.add(query("old", 2, arrived=0.0))
    batcher.add(query("young", 2, arrived=4.0))
    assert names(batcher.late(5.5)) == ["old"]
    assert names(batcher.take(5.5)) == ["young"]


def test_alone_is_never_merged_and_never_waits() -> None:
    batcher = make_batcher()
    batcher.add(query("a", 1))
    batcher.add(query("b", 1, alone=True))
    batcher.add(query("c", 1))
    assert [names(batcher.take(0.0)) for _ in range(2)] == [["a"], ["b"]]
    assert batcher.take(0.0) == []
    assert names(batcher.clear()) == ["c"]


def test_an_empty_queue_takes_a_query_of_any_size() -> None:
    batcher = make_batcher()
    assert batcher.add(query("huge", 31)) is None
    assert batcher.add(query("small", 1)) is not None
    assert names(batcher.take(0.0)) == ["huge"]
