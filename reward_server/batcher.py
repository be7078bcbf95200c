"""Which queries are computed together, and which wait, are refused or come too late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from bm3il.protocol.layout import JointRows
from bm3il.protocol.messages import Refusal


@dataclass(frozen=True)
class Waiting:
    """A query in the queue. `arrived`, in seconds of the caller's clock, is no later than it came, also if it lay in a
    socket; `request` is the caller's to know it by."""

    request: Any
    rows: JointRows
    true_rewards: list[torch.Tensor] | None
    deviation: bool
    alone: bool
    arrived: float


class QueryBatcher:
    """A bounded first-in-first-out queue of queries, taken out in batches. All times are given by the caller.

    max_batch_rows: joint rows at which a batch is full (a larger query is a batch of its own).
    max_delay_seconds: how long the oldest query waits for others.   max_queue_rows: joint rows that may wait.
    deadline_seconds: age from which on nobody waits for the answer any more.
    """

    def __init__(
        self, max_batch_rows: int, max_delay_seconds: float, max_queue_rows: int, deadline_seconds: float
    ) -> None:
        self._max_batch_rows, self._max_delay_seconds = max_batch_rows, max_delay_seconds
        self._max_queue_rows, self._deadline_seconds = max_queue_rows, deadline_seconds
        self._queue: deque[Waiting] = deque()
        self.rows = 0
        """Joint rows that wait."""

    def add(self, query: Waiting) -> Refusal | None:
        """Queue a query, or say why not (cause `overloaded`)."""
        # An empty queue takes a query of any size: it would otherwise be refused for ever.
        if self._queue and self.rows + len(query.rows) > self._max_queue_rows:
            return Refusal("overloaded", f"{self.rows} joint rows are waiting, of at most {self._max_queue_rows}")
        self._queue.append(query)
        self.rows += len(query.rows)
        return None

    def wait_seconds(self, now: float) -> float | None:
        """How long until a batch is due; None if nothing waits."""
        if not self._queue:
            return None
        if self._batch()[1]:
            return 0.0
        return max(0.0, self._queue[0].arrived + self._max_delay_seconds - now)

    def take(self, now: float, flush: bool = False) -> list[Waiting]:
        """The next batch if it is due, or if `flush`; empty otherwise. Take out `late` ones first."""
        wait = self.wait_seconds(now)
        if wait is None or (wait > 0 and not flush):
            return []
        return [self._pop() for _ in range(self._batch()[0])]

    def late(self, now: float) -> list[Waiting]:
        """Take out the queries that are past their deadline."""
        queries = []
        # Queries stand in the order in which they arrived: behind one that is in time, all are.
        while self._queue and now - self._queue[0].arrived > self._deadline_seconds:
            queries.append(self._pop())
        return queries

    def clear(self) -> list[Waiting]:
        """Take out all queries."""
        return [self._pop() for _ in range(len(self._queue))]

    def _batch(self) -> tuple[int, bool]:
        """How many queries at the head make up the next batch, and whether nothing can be added to it."""
        if self._queue[0].alone:
            return 1, True
        rows = 0
        for count, query in enumerate(self._queue):
            # Order is kept: a smaller query behind one that does not fit is not taken before it.
            if query.alone or (count and rows + len(query.rows) > self._max_batch_rows):
                return count, True
            rows += len(query.rows)
        return len(self._queue), rows >= self._max_batch_rows

    def _pop(self) -> Waiting:
        query = self._queue.popleft()
        self.rows -= len(query.rows)
        return query
