"""Demonstrations written down as somebody else would: a long table by our names of columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars

from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.recordings.columns import action_columns, mask_columns, observation_columns

Row = dict[str, Any]


def rows_of(demonstrations: Demonstrations, masks: bool = False) -> list[Row]:
    """One row for each active agent and step."""
    rows: list[Row] = []
    ends = np.cumsum(demonstrations.episode_lengths)
    for row in range(demonstrations.num_rows):
        episode = int(np.searchsorted(ends, row, side="right"))
        step = row - int(ends[episode] - demonstrations.episode_lengths[episode])
        for m, t in enumerate(demonstrations.spec.types):
            for x in np.flatnonzero(demonstrations.active[m][row]):
                action = np.atleast_1d(demonstrations.actions[m][row, x])
                mask = demonstrations.action_masks[m][row, x].astype(int)
                number = demonstrations.spec.offsets[m] + x
                rows.append(
                    {"episode": f"e{episode}", "step": step, "agent": f"{t.name}_{x}"}
                    | dict(zip(observation_columns(t), demonstrations.observations[m][row, x].tolist(), strict=True))
                    | dict(zip(action_columns(t), action.tolist(), strict=True))
                    | (dict(zip(mask_columns(t), mask.tolist(), strict=True)) if masks else {})
                    | {"return": float(demonstrations.returns[episode, number])}
                )
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    """A table with the columns of all rows, nothing where a row has none; of the kind that its name says."""
    names = dict.fromkeys(name for row in rows for name in row)
    frame = polars.DataFrame([{name: row.get(name) for name in names} for row in rows], infer_schema_length=None)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def assert_same(one: Demonstrations, other: Demonstrations) -> None:
    """In what every active agent saw, might do and did."""
    assert {name: array.dtype for name, array in one.arrays.items()} == {n: a.dtype for n, a in other.arrays.items()}
    for m, there in enumerate(one.active):
        np.testing.assert_array_equal(there, other.active[m])
        for name in ("observations", "action_masks", "actions"):
            mine, theirs = getattr(one, name)[m], getattr(other, name)[m]
            np.testing.assert_array_equal(mine[there], theirs[there], err_msg=name)
    np.testing.assert_array_equal(one.episode_lengths, other.episode_lengths)
    np.testing.assert_allclose(one.returns, other.returns, rtol=1e-6)
