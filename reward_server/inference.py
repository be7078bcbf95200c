"""Logits of discriminators without their gradients, from observations as they are kept: what queries take.

The first layer has most of the weights, and of what it sees little is numbers: of a one-hot, one row of its weights is
looked up; what never changes for an agent is in its bias. So it is kept a second time, [G, in, L·H], rows in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.stacked import add_bias
from bm3il.protocol.observations import Form, Observations, Run
from bm3il.reward_server.discriminator import Architecture, Workspace, deeper

Columns = tuple[slice, slice]
"""Columns of the first layer's input, and where they come from."""


class Inference:
    """The discriminators of one block, for as long as their layers stay as they are."""

    def __init__(self, architecture: Architecture, layers: Sequence[torch.Tensor]) -> None:
        """layers: [G, L, out, in + biases] each."""
        self._architecture, self._layers, block = architecture, layers, architecture.block
        self._form, rows, constants = _seen(architecture)
        first = layers[0].flatten(1, 2).mT
        self._weight = first.new_zeros(len(first), self._form.observation_dim, first.shape[2])
        for columns, target in rows:
            self._weight[:, target] = first[:, columns]
        self._bias = first[:, architecture.inputs :].contiguous()
        for columns, stored in constants:
            of_slots = block.grid(block.form.on(first.device, "constants").unsqueeze(0))[:, :, 0, stored]
            self._bias = self._bias + of_slots.to(first.dtype) @ first[:, columns]

    def see(self, observations: Observations, actions: torch.Tensor) -> ObservationGrid:
        """What is seen of (s, a): observations [B], and actions [B, N_b] int64, or [B, N_b, A]."""
        columns = dict(observations.columns)
        if self._architecture.seen.action:
            name, values = ("codes", actions.unsqueeze(-1)) if self._architecture.block.discrete else ("own", actions)
            columns[name] = torch.cat([columns[name], values], dim=-1) if name in columns else values
        return self._architecture.block.see(Observations(self._form, columns))

    def logits(self, groups: slice, slots: int, grid: ObservationGrid, work: Workspace) -> torch.Tensor:
        """z of the particles [g, L, s·B], for what some groups see in their first slots. Overwritten by the next
        call."""
        layers, particles = [layer[groups] for layer in self._layers], self._architecture.particles
        rows = slots * grid.steps
        h = work.take("first", len(layers[0]), rows, self._weight.shape[2])
        if self._form.runs:
            grid.times((groups, slice(0, rows)), self._weight[groups], 0, h)
        else:
            # Constants alone are seen, and what they add is in the bias.
            h.zero_()
        add_bias(h, self._bias[groups, :slots])
        # Rows in front suit the gathering of weights; the deeper layers are stacked by particle.
        of_particles = h.unflatten(2, (particles, -1)).transpose(1, 2).reshape(len(h) * particles, rows, -1)
        return deeper(layers[1:], of_particles.mT, self._architecture.activation, work)[0].unflatten(0, (-1, particles))


def _seen(architecture: Architecture) -> tuple[Form, list[Columns], list[Columns]]:
    """The form of what is seen of (s, a) but for what is constant; which columns of the first layer's input are which
    of it; and which are which constants."""
    block, runs = architecture.block, list[Run]()
    rows: list[Columns] = []
    constants: list[Columns] = []
    form, end = block.form, 0
    for run in form.runs:
        common = [(c.start - run.first, k) for c, k in _overlaps(architecture, run)]
        if not common:
            continue
        if run.kind == "constant":
            constants += [(k, _moved(k, run.source + offset)) for offset, k in common]
            continue
        rows += [(k, _moved(k, end + offset)) for offset, k in common]
        runs.append(replace(run, first=end, end=end + run.width))
        end += run.width
    codes, own = form.code_sizes, form.own
    if architecture.seen.action:
        action = slice(end, end + block.action_dim)
        rows.append((slice(architecture.seen.width, architecture.inputs), action))
        if block.discrete:
            runs.append(Run("code", action.start, action.stop, len(codes)))
            codes = (*codes, block.action_dim)
        else:
            runs.append(Run("own", action.start, action.stop, own))
            own += block.action_dim
        end = action.stop
    none = form.constants[:, :0]
    # `_tensors` caches the form's arrays on devices, and the old form's constants are not those of this one.
    seen = replace(
        form, observation_dim=end, runs=_merged(runs), own=own, code_sizes=codes, constants=none, _tensors={}
    )
    return seen, rows, constants


def _overlaps(architecture: Architecture, run: Run) -> list[tuple[slice, slice]]:
    """Columns of the observation that are seen of a run, and which columns of the first layer's input they are."""
    found, before = [], 0
    for first, end in architecture.seen.runs:
        start, stop = max(first, run.first), min(end, run.end)
        if start < stop:
            found.append((slice(start, stop), slice(before + start - first, before + stop - first)))
        before += end - first
    return found


def _moved(columns: slice, start: int) -> slice:
    return slice(start, start + columns.stop - columns.start)


def _merged(runs: list[Run]) -> tuple[Run, ...]:
    """Neighbours that lie next to each other where they are kept, too, are one."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        # Every code is a one-hot of its own.
        alike = last is not None and (last.kind, last.masked) == (run.kind, run.masked) and run.kind != "code"
        if last is not None and alike and not run.masked and last.stored.stop == run.source:
            merged[-1] = replace(last, end=run.end)
        else:
            merged.append(run)
    return tuple(merged)
