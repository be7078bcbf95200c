"""The newest joint rows of the agents, in a preallocated ring."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from protocol.layout import JointRows, Layout


class Window:
    """The last `capacity` joint rows. `cursor` is where the next row goes; `filled` counts the rows that are there."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.capacity, self.cursor, self.filled = capacity, 0, 0
        table = JointRows.array_table(layout, capacity)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        self.rows = JointRows.from_arrays(arrays, layout)

    def push(self, rows: JointRows) -> None:
        """Overwrite the oldest rows; of more rows than fit, the last are kept."""
        count = min(len(rows), self.capacity)
        index = (self.cursor + torch.arange(count)) % self.capacity
        for mine, theirs in zip(_tensors(self.rows), _tensors(rows), strict=True):
            mine.index_copy_(0, index, theirs[len(rows) - count :])
        self.cursor = (self.cursor + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def load(self, arrays: Mapping[str, np.ndarray], cursor: int, filled: int) -> None:
        """Take over the rows of another window of this capacity, as `rows.to_arrays` named them."""
        for name, mine in self.rows.to_arrays().items():
            mine[...] = arrays[name]
        self.cursor, self.filled = cursor, filled


def _tensors(rows: JointRows) -> list[torch.Tensor]:
    return [*rows.observations, *rows.actions, *rows.active]
