"""Which joint rows of the agents the discriminators learn from: the newest of the run, or any of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from bm3il.protocol.device import check_room
from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.messages import Arrays
from bm3il.protocol.specs import ArrayTable
from bm3il.reward_server.settings import MemoryKind

MAX_OBSERVED = 2**60
"""Far from where the numbers of rows would overflow."""


class Memory:
    """At most `capacity` joint rows of those that were pushed, in preallocated arrays.

    kind: `window` keeps the newest. `run` keeps a sample of all, in which each row ever pushed is with equal
        probability, capacity / observed (algorithm R; Vitter 1985, "Random Sampling with a Reservoir").
    rows: on `device`; the first `filled` of them are there; the order means nothing.
    observed: rows pushed since the start.
    """

    def __init__(
        self, layout: Layout, capacity: int, kind: MemoryKind, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.capacity, self.observed = capacity, 0
        self._layout, self._kind = layout, kind
        self._generator = torch.Generator().manual_seed(seed)
        self._device = torch.device(device)
        table = JointRows.array_table(layout, capacity)
        check_room(table, self._device, "reward.window-steps", capacity)
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in table.items()}
        self.rows = JointRows.from_arrays(arrays, layout).to(self._device)

    @property
    def filled(self) -> int:
        """How many rows there are."""
        return min(self.observed, self.capacity)

    def push(self, rows: JointRows) -> None:
        """Take in rows, one after the other in effect: of two that go to one place the later one stays.

        Where they go is found on the CPU, for the same draws on every device.
        """
        number = self.observed + torch.arange(len(rows))
        place = number % self.capacity if self._kind == "window" else self._drawn(number)
        # Of rows with one place only the latest is written: which of them comes last is left open by `index_copy_`.
        # The place behind the others takes the rows that are not kept.
        last = torch.full((self.capacity + 1,), -1)
        last.scatter_reduce_(0, place.clamp_max(self.capacity), torch.arange(len(rows)), "amax")
        written = (last[:-1] >= 0).nonzero().squeeze(1)
        taken = rows.without_masks().select(last[written]).to(self._device)
        written = written.to(self._device, non_blocking=True)
        for mine, theirs in zip(self.rows.tensors(), taken.tensors(), strict=True):
            # Actions may come as int64; kept are the smallest integers that hold them.
            mine.index_copy_(0, written, theirs.to(mine.dtype))
        self.observed += len(rows)

    def state(self) -> Arrays:
        """Everything that a restart needs, copied; `state_table` gives names and shapes."""
        held = self.rows.on_host().to_arrays()
        arrays = {name: array.copy() for name, array in held.items()}
        return arrays | {
            "observed": np.array([self.observed], np.int64),
            "generator": self._generator.get_state().numpy(),
        }

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a `state`, of a memory of either kind.

        Raises ProtocolError (cause `bad_value`) for values that no state has.
        """
        observed = int(arrays["observed"][0])
        if not 0 <= observed <= MAX_OBSERVED:
            raise ProtocolError("bad_value", f"a memory cannot have observed {observed} rows")
        rows = JointRows.from_arrays(arrays, self._layout)  # checks the values
        for mine, theirs in zip(self.rows.tensors(), rows.tensors(), strict=True):
            mine.copy_(theirs)
        self._generator.set_state(torch.tensor(arrays["generator"]))
        self.observed = observed

    @staticmethod
    def state_table(layout: Layout, capacity: int) -> ArrayTable:
        """Name → (dtype, shape) of `state`."""
        table: ArrayTable = {"observed": ("int64", (1,)), "generator": ("uint8", (len(torch.Generator().get_state()),))}
        return table | JointRows.array_table(layout, capacity)

    def _drawn(self, number: torch.Tensor) -> torch.Tensor:
        """The place of each row by its number in the run, from 0; one beyond `capacity` is nowhere.

        Row n goes to one of the places 0..n, each as likely as the others: a remainder of 63 random bits is so to
        n / 2^63. The first rows fill the places in turn.
        """
        bits = torch.randint(2**63 - 1, number.shape, generator=self._generator)
        return torch.where(number < self.capacity, number, bits % (number + 1))
