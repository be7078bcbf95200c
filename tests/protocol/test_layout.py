"""Joint rows and grids are each other's inverse, whatever the types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.plain import observed, to_rows

types = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(2, 3)), min_size=1, max_size=5)
sharings = st.sampled_from(["agent", "type"])


def layout_of(shapes: list[tuple[int, int, int]], sharing: ParameterSharing) -> Layout:
    spec = EnvironmentSpec("toy", tuple(TypeSpec(f"t{m}", *shape) for m, shape in enumerate(shapes)), 5)
    return Layout.of(spec, sharing)


@settings(max_examples=40, deadline=None)
@given(types, sharings, st.integers(1, 3))
def test_rows_undo_grid(shapes: list[tuple[int, int, int]], sharing: ParameterSharing, batch: int) -> None:
    for block in layout_of(shapes, sharing).blocks:
        rows = torch.rand(batch, block.num_agents, 2)
        grid = block.grid(rows)
        assert grid.shape == (block.groups, block.slots, batch, 2)
        assert torch.equal(block.rows(grid), rows)


@settings(max_examples=20, deadline=None)
@given(types, sharings, st.integers(1, 3))
def test_gradients_go_back_to_where_numbers_came_from(
    shapes: list[tuple[int, int, int]], sharing: ParameterSharing, batch: int
) -> None:
    for block in layout_of(shapes, sharing).blocks:
        rows = torch.rand(batch, block.num_agents, 2, dtype=torch.float64, requires_grad=True)
        grid = block.grid(rows.detach()).clone().requires_grad_()
        assert torch.autograd.gradcheck(block.grid, rows)
        assert torch.autograd.gradcheck(block.rows, grid)


@settings(max_examples=40, deadline=None)
@given(types, sharings)
def test_a_grid_holds_each_agent_once_and_zeros_elsewhere(
    shapes: list[tuple[int, int, int]], sharing: ParameterSharing
) -> None:
    for block in layout_of(shapes, sharing).blocks:
        numbers = torch.arange(1, block.num_agents + 1).expand(2, -1)
        for row in block.grid(numbers).movedim(2, 0):
            placed = row.flatten()
            assert sorted(placed[placed > 0].tolist()) == list(range(1, block.num_agents + 1))
            assert ((placed == 0) == (block.agent_of_slot < 0)).all()


@settings(max_examples=40, deadline=None)
@given(types, sharings)
def test_by_type_undoes_to_rows(shapes: list[tuple[int, int, int]], sharing: ParameterSharing) -> None:
    layout = layout_of(shapes, sharing)
    arrays = [np.random.default_rng(m).random((3, t.count, 2)) for m, t in enumerate(layout.spec.types)]
    rows = to_rows(layout, arrays)
    for array, found in zip(arrays, layout.spec.by_type(rows, axis=1), strict=True):
        assert np.array_equal(found.numpy(), array)
    arrays[0][:] = -1  # the rows are copies
    assert not any((block == -1).any() for block in rows)


def test_types_of_one_shape_share_a_block_and_each_its_own_group() -> None:
    layout = layout_of([(3, 4, 3), (2, 5, 2), (1, 4, 3)], "type")
    assert [block.types for block in layout.blocks] == [(0, 2), (1,)]
    first = layout.blocks[0]
    assert (first.groups, first.slots, first.num_agents) == (2, 3, 4)
    assert first.agent_of_slot.tolist() == [0, 1, 2, 3, -1, -1]
    assert first.type_of_agent.tolist() == [0, 0, 0, 1]


def test_agents_with_own_parameters_are_a_view() -> None:
    block = layout_of([(3, 4, 3), (1, 4, 3)], "agent").blocks[0]
    rows = torch.rand(2, 4, 4)
    assert block.grid(rows).data_ptr() == rows.data_ptr()
    assert (block.groups, block.slots) == (4, 1)


@pytest.mark.parametrize(
    ("field", "value", "actions"),
    [("0.actions", 3, 3), ("0.actions", 255, 3), ("0.actions", -1, 300), ("0.actions", 300, 300), ("0.own", np.nan, 3)],
)
def test_values_that_an_index_would_trust_are_checked(field: str, value: float, actions: int) -> None:
    layout = layout_of([(3, 4, actions)], "agent")
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in JointRows.array_table(layout, 2).items()}
    assert len(JointRows.from_arrays(arrays, layout)) == 2
    arrays[field].flat[-1] = value
    with pytest.raises(ProtocolError):
        JointRows.from_arrays(arrays, layout)


def test_selected_rows_are_copies() -> None:
    seen = observed(torch.arange(6.0).view(3, 1, 2), torch.tensor([True, False, True]).view(3, 1, 1))
    rows = JointRows([seen], [torch.arange(3).view(3, 1)], [torch.ones(3, 1).bool()])
    chosen = rows.select(torch.tensor([2, 1]))
    for tensor in rows.tensors():
        tensor.zero_()
    assert chosen.observations[0].dense().flatten().tolist() == [4, 5, 2, 3]
    assert chosen.observations[0].masks().flatten().tolist() == [True, False]
    assert chosen.actions[0].flatten().tolist() == [2, 1]
    assert chosen.active[0].all()
