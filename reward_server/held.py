"""Rows that the server was shown, by their numbers: a query can name them and need not bring them again."""

from __future__ import annotations

import numpy as np
import torch

from bm3il.protocol.device import check_room
from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.layout import JointRows, Layout


class Held:
    """The newest `capacity` joint rows of a session, on `device`. The first one that comes has the number `first`."""

    def __init__(self, layout: Layout, capacity: int, first: int, device: torch.device | str = "cpu") -> None:
        self.capacity, self._first, self._next = capacity, first, first
        self._device = torch.device(device)
        table = JointRows.array_table(layout, capacity)
        check_room(table, self._device, "learner.window-steps", capacity)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        self._rows = JointRows.from_arrays(arrays, layout).to(self._device)

    def keep(self, rows: JointRows) -> None:
        """Take in rows, numbered on from the last one."""
        newest = rows.without_masks()
        if len(newest) > self.capacity:  # the older ones would be overwritten by the same rows
            newest = newest.map(lambda tensor: tensor[len(rows) - self.capacity :])
        self._next += len(rows)
        # A row lies at its number modulo the capacity, so that `take` needs no index of what is where.
        place = (torch.arange(self._next - len(newest), self._next) % max(1, self.capacity)).to(self._device)
        for mine, theirs in zip(self._rows.tensors(), newest.tensors(), strict=True):
            mine.index_copy_(0, place, theirs.to(device=self._device, dtype=mine.dtype))

    def take(self, numbers: torch.Tensor) -> JointRows:
        """The rows of these numbers, copied.

        Raises ProtocolError (cause `not_held`) for one that never came, or is no longer here.
        """
        oldest = max(self._first, self._next - self.capacity)
        if not (oldest <= int(numbers.min()) and int(numbers.max()) < self._next):
            raise ProtocolError(
                "not_held",
                f"rows {int(numbers.min())}..{int(numbers.max())} were asked for; "
                f"this server holds {oldest}..{self._next - 1}",
            )
        return self._rows.select((numbers % self.capacity).to(self._device))
