"""Observations before the first layer of stacked networks: compact still, and expanded only where a product wants it.

A one-hot times a matrix is a row of the matrix; what all agents of an environment share is multiplied once for all;
what is constant is a bias. So the first layer of K networks with R rows reads what there is to know, not its expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.nn import functional

from bm3il.protocol.networks.options import Options
from bm3il.protocol.networks.tiles import ALL, Tile, slots_and_steps
from bm3il.protocol.observations import OWN_NUMBERS, Observations, Run

Gathered = tuple[torch.Tensor, torch.Tensor | None]
Plan = tuple[list[Run], list[list[Run]]]

COLUMNS_PER_ROW = 2
COLUMNS_PER_ADDED_ROW = 8
"""A row of a matrix added to a sum takes a CPU as long as so many columns of a product with that matrix; and adding a
row to a matrix, as the gradient does, so many (measured with 128 numbers a row)."""
COLUMNS_PER_OPTION = 4
"""To gather a number and to scatter its gradient takes a CPU as long as to take so many through a softmax and back."""
NEAR: tuple[Literal["near", "is_near"], ...] = ("near", "is_near")
KEPT_COLUMNS = 16
"""Runs of at most so many columns are expanded once for all products, and not anew for each tile of each of them."""


class ObservationGrid:
    """What K networks see in R = S·B rows each: of S slots (agents that share a network) B joint steps.

    shape: (K, R, O).   Parts of it are named by tiles, whose rows are all steps of some slots, or some steps of one.
    """

    def __init__(
        self, observations: Observations, groups: int, slots: int, grid: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Of observations [B], for G groups of S slots; grid: from joint rows to the slots (`layout.Block.grid`)."""
        self.form, self.device = observations.form, observations.device
        self.slots, self.steps = slots, len(observations)
        self.shape = groups, slots * self.steps, self.form.observation_dim
        columns = {name: grid(c).flatten(1, 2) for name, c in observations.columns.items() if name != "shared"}
        self._own = {name: columns[name] for name in OWN_NUMBERS if name in columns}
        self._masks = columns.get("masks")
        self._codes = columns["codes"].long() if "codes" in columns else None
        self._shared = observations.columns.get("shared")
        self._constants: torch.Tensor | None = None
        if self.form.constants.size:
            self._constants = grid(self.form.on(self.device, "constants").unsqueeze(0))[:, :, 0]
        self._somewhere: bool | None = None
        self._gathered: dict[tuple[object, ...], Gathered] = {}
        self._kept: dict[tuple[object, ...], torch.Tensor] = {}
        self._plans: dict[tuple[torch.dtype, int], Plan] = {}

    def masks(self, tile: Tile = ALL) -> torch.Tensor:
        """Which actions are allowed, [k, r, A] bool."""
        if self._masks is not None:
            return self._masks[tile]
        if self.form.table is None or self._codes is None:
            shape = *self._size(tile), self.form.action_dim
            return torch.ones((), dtype=torch.bool, device=self.device).expand(shape)
        return self.form.on(self.device, "table")[self._codes[tile][..., self.form.mask_code]]

    def options(self, tile: Tile = ALL) -> Options:
        """What may be done, [k, r, D]."""
        if self.device.type != "cpu" or self.form.table is None or not self._is_near(COLUMNS_PER_OPTION):
            return Options(self.masks(tile))
        assert self._codes is not None
        code = self._codes[tile][..., self.form.mask_code]
        near, allowed = (self.form.on(self.device, name) for name in NEAR)
        return Options(allowed[code] > 0, near[code])

    def expand(self, first: int, end: int, tile: Tile, target: torch.Tensor) -> None:
        """Write the columns first..end of what is seen to `target` [k, s, b, end − first], of s slots b steps."""
        for run in self.form.runs:
            start, stop = max(first, run.first), min(end, run.end)
            if start < stop:
                self._expand(run, start - run.first, tile, target[..., start - first : stop - first])

    def times(self, tile: Tile, weight: torch.Tensor, first: int, y: torch.Tensor) -> None:
        """Write the product with the rows first… of the tile's networks' weights [k, in, H] to y [k, r, H]."""
        gathered, others = self._plan(weight.dtype, COLUMNS_PER_ROW)
        per_step, begun = y.unflatten(1, self._slots_and_steps(tile)), bool(gathered)
        if gathered:
            index, share = self._rows_of(gathered, weight, first, tile)
            if share is None and y.is_contiguous():
                torch.index_select(weight.flatten(0, 1), 0, index.flatten(), out=y.view(-1, y.shape[2]))
            else:
                rows, shares = index.flatten(0, 1), None if share is None else share.flatten(0, 1)
                # It adds rows of the weights up without writing all of them down side by side.
                sums = functional.embedding_bag(rows, weight.flatten(0, 1), mode="sum", per_sample_weights=shares)
                y.copy_(sums.view(y.shape))
        for runs in others:
            part = weight[:, first + runs[0].first : first + runs[-1].end]
            if (few := self._once(runs[0], tile, weight.dtype)) is not None:
                product = (few @ part).unsqueeze(2 if runs[0].kind == "constant" else 1)
                per_step.add_(product) if begun else per_step.copy_(product)
            else:
                torch.baddbmm(y, self._numbers(runs, tile, weight.dtype), part, beta=int(begun), out=y)
            begun = True

    def gradient(self, tile: Tile, d: torch.Tensor, target: torch.Tensor, first: int, add: bool) -> None:
        """Write (or add) the gradient of the rows first… of weights to `target` [k, in, H], from that of the product of
        a tile, d [k, r, H]."""
        gathered, others = self._plan(d.dtype, COLUMNS_PER_ADDED_ROW)
        for run in () if add else gathered:
            target[:, first + run.first : first + run.end].zero_()
        if gathered:
            index, share = self._rows_of(gathered, target, first, tile)
            parts = d if share is None else (d.unsqueeze(2) * share.unsqueeze(3)).flatten(0, 1)
            target.view(-1, target.shape[2]).index_add_(0, index.flatten(), parts.flatten(0, 1))
        per_step = d.unflatten(1, self._slots_and_steps(tile))
        for runs in others:
            part = target[:, first + runs[0].first : first + runs[-1].end]
            if (few := self._once(runs[0], tile, d.dtype)) is not None:
                product = few.mT @ per_step.sum(2 if runs[0].kind == "constant" else 1)
            else:
                product = torch.bmm(self._numbers(runs, tile, d.dtype).mT, d)
            part.add_(product) if add else part.copy_(product)

    def _size(self, tile: Tile) -> tuple[int, int]:
        networks, rows = (len(range(size)[part]) for part, size in zip(tile, self.shape[:2], strict=True))
        return networks, rows

    def _cut(self, tile: Tile) -> tuple[slice, slice]:
        """The slots and the joint steps that the rows of a tile are of."""
        return slots_and_steps(tile[1], self.shape[1], self.steps)

    def _slots_and_steps(self, tile: Tile) -> tuple[int, int]:
        slots, steps = self._cut(tile)
        return slots.stop - slots.start, steps.stop - steps.start

    def _expand(self, run: Run, offset: int, tile: Tile, target: torch.Tensor) -> None:
        """Write the columns offset… of a run to [k, s, b, columns]."""
        columns = slice(offset, offset + target.shape[-1])
        stored = slice(run.source + columns.start, run.source + columns.stop)
        (slots, steps), apart = self._cut(tile), target.shape[1:3]
        if run.kind in self._own:
            target.copy_(self._own[run.kind][tile][..., stored].unflatten(1, apart))
        elif run.kind == "code":
            assert self._codes is not None
            code = self._codes[tile][..., run.source, None].unflatten(1, apart)
            if target.shape[-1] == run.width:  # numbers are written where they are 1, and not compared with all
                seen = (code < run.width).to(target.dtype)
                target.zero_().scatter_(-1, code.clamp(max=run.width - 1), seen)
            else:
                target.copy_(code == torch.arange(columns.start, columns.stop, device=self.device))
        elif run.kind == "constant":
            assert self._constants is not None
            target.copy_(self._constants[tile[0], slots, None, stored])
        else:
            assert self._shared is not None
            target.copy_(self._shared[steps, stored])
            if run.masked:
                target.mul_(self.masks(tile)[..., columns].unflatten(1, apart))

    def _plan(self, dtype: torch.dtype, columns_per_row: int) -> Plan:
        """As `_planned`, found once."""
        key = dtype, columns_per_row
        if key not in self._plans:
            self._plans[key] = self._planned(dtype, columns_per_row)
        return self._plans[key]

    def _planned(self, dtype: torch.dtype, columns_per_row: int) -> Plan:
        """Runs of which rows of the weights are gathered, and the others: those next to each other that are expanded
        together, or of which many rows see the same."""
        gathered: list[Run] = []
        others: list[list[Run]] = []
        for run in self.form.runs:
            if self._is_gathered(run, dtype, columns_per_row):
                gathered.append(run)
            elif others and self._go_together(others[-1][-1], run):
                others[-1].append(run)
            else:
                others.append([run])
        return gathered, others

    def _go_together(self, run: Run, following: Run) -> bool:
        """Whether both can be one product."""
        if run.end != following.first:
            return False
        return not (self._repeats(run) or self._repeats(following))

    def _is_gathered(self, run: Run, dtype: torch.dtype, columns_per_row: int) -> bool:
        """On a GPU products are cheaper than sums of rows, which it does not add up in the same order each time; and
        bfloat16 is for products alone."""
        if self.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
            return False
        if run.kind == "code":
            return columns_per_row < run.width
        return run.masked and self.form.table is not None and self._is_near(columns_per_row)

    def _is_near(self, columns_per_row: int) -> bool:
        """Whether everybody sees little of what is masked: who is nowhere sees all of it."""
        form = self.form
        if form.near.shape[1] * columns_per_row >= form.action_dim:
            return False
        if self._somewhere is None:
            assert self._codes is not None
            self._somewhere = not bool((self._codes[..., form.mask_code] == form.code_sizes[form.mask_code]).any())
        return self._somewhere

    def _repeats(self, run: Run) -> bool:
        """Whether many rows see the same."""
        return run.kind == "constant" or (run.kind == "shared" and not run.masked and self.slots > 1)

    def _once(self, run: Run, tile: Tile, dtype: torch.dtype) -> torch.Tensor | None:
        """What many rows see: of a constant [k, s, columns], of a shared run [b, columns]; None of other runs."""
        if not self._repeats(run):
            return None
        slots, steps = self._cut(tile)
        if run.kind == "constant":
            assert self._constants is not None
            return self._constants[tile[0], slots, run.stored].to(dtype)
        assert self._shared is not None
        return self._shared[steps, run.stored].to(dtype)

    def _numbers(self, runs: list[Run], tile: Tile, dtype: torch.dtype) -> torch.Tensor:
        """The columns of some runs side by side, [k, r, columns]."""
        if len(runs) == 1 and runs[0].kind in self._own:
            return self._own[runs[0].kind][tile][..., runs[0].stored].to(dtype)
        if len(runs) == 1 and runs[0].kind == "shared" and not runs[0].masked and self._shared is not None:
            seen = self._shared[self._cut(tile)[1], runs[0].stored]  # once per row: where slots share, it repeats
            return seen.to(dtype).expand(self._size(tile)[0], -1, -1)
        first, end = runs[0].first, runs[-1].end
        # By the end, too: forward and back may expand runs that only begin alike.
        key = first, end, dtype
        if key in self._kept:
            return self._kept[key][tile]
        keep = end - first <= KEPT_COLUMNS
        part = ALL if keep else tile
        numbers = torch.empty(*self._size(part), end - first, dtype=dtype, device=self.device)
        self.expand(first, end, part, numbers.unflatten(1, self._slots_and_steps(part)))
        if not keep:
            return numbers
        self._kept[key] = numbers
        return numbers[tile]

    def _rows_of(
        self, runs: Sequence[Run], weight: torch.Tensor, first: int, tile: Tile
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which rows of the weights [k, in, H], flattened, each row of a tile sees, and how much of each: [k, r, L].
        None for how much where that is one row, and all of it."""
        key = (weight.dtype, weight.shape[1], first, *(run.first for run in runs))
        if key not in self._gathered:
            self._gathered[key] = self._all_rows_of(runs, weight, first)
        index, share = self._gathered[key]
        before = (tile[0].start or 0) * weight.shape[1]
        part = index[tile] - before if before else index[tile]
        return part, None if share is None else share[tile]

    def _all_rows_of(self, runs: Sequence[Run], weight: torch.Tensor, first: int) -> Gathered:
        """As `_rows_of`, of all networks: found once for all tiles."""
        assert self._codes is not None
        networks, rows, _ = self.shape
        index, share = [], []
        for run in runs:
            if run.kind == "code":
                code = self._codes[..., run.source, None]
                index.append(code.clamp(max=run.width - 1) + run.first)
                share.append((code < run.width).to(weight.dtype))
            else:
                assert self._shared is not None
                code = self._codes[..., self.form.mask_code]
                near = self.form.on(self.device, "near")[code]
                step = torch.arange(rows, device=self.device).remainder(max(1, self.steps))
                place = step[:, None] * self._shared.shape[1] + run.source + near
                seen = self._shared.flatten()[place].to(weight.dtype)
                index.append(near + run.first)
                share.append(seen * self.form.on(self.device, "is_near")[code])
        network = torch.arange(networks, device=self.device)[:, None, None] * weight.shape[1] + first
        shares = torch.cat(share, dim=-1)
        whole = shares.shape[-1] == 1 and bool((shares == 1).all())
        return torch.cat(index, dim=-1).add_(network), None if whole else shares
