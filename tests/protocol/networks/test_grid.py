"""Compact observations before the first layer give what their expansion would give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol.layout import Block, Layout
from bm3il.protocol.networks import grid as grids
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.networks.tiles import ALL, Tile, slots_and_steps
from bm3il.protocol.observations import Observations
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import ParameterSharing

WORLDS = (
    "berlin?types=5&agents=50&sight=near",
    "berlin?types=5&agents=50",
    "rover_tower?pairs=3",
)
WIDTH = 7


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["agent", "type"])
def sharing(request: pytest.FixtureRequest) -> ParameterSharing:
    return request.param  # type: ignore[no-any-return]


def seen_in(world: str, sharing: ParameterSharing) -> Iterator[tuple[Block, Observations]]:
    """Some joint rows of an episode in which everybody strays, block by block."""
    environment = make_environment(world, 2)
    layout = Layout.of(environment.spec, sharing)
    played = rollout(environment, UniformPolicy(environment.spec), 4)
    for block, seen in zip(layout.blocks, played.seen(), strict=True):
        yield block, seen.map(lambda tensor: tensor[5:25:4].flatten(0, 1))


def expanded(block: Block, tensor: torch.Tensor) -> torch.Tensor:
    """Joint rows as [G, S·B, …]; what empty slots hold is nobody's."""
    return block.grid(tensor).flatten(1, 2).double()


def there(block: Block, rows: int) -> torch.Tensor:
    """[G, S·B, 1] 1 where a slot has an agent."""
    return expanded(block, torch.ones(rows, block.num_agents, 1))


def tiles(grid: ObservationGrid) -> list[Tile]:
    """All of it: of some networks, then the others, the first slot in two pieces, and the other slots in one."""
    networks, steps, rows = grid.shape[0] // 2, grid.steps, grid.shape[1]
    parts = [slice(0, 2), slice(2, steps), slice(steps, rows)]
    return [
        (some, part) for some in (slice(0, networks), slice(networks, None)) for part in parts if part.start < part.stop
    ]


@pytest.mark.parametrize("columns_per_row", [0, 4, 1_000])
@pytest.mark.parametrize("columns_per_added_row", [0, 1_000])
def test_products_and_gradients_are_those_of_the_expansion(
    world: str,
    sharing: ParameterSharing,
    columns_per_row: int,
    columns_per_added_row: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grids, "COLUMNS_PER_ROW", columns_per_row)
    monkeypatch.setattr(grids, "COLUMNS_PER_ADDED_ROW", columns_per_added_row)
    generator = torch.Generator().manual_seed(1)
    for block, seen in seen_in(world, sharing):
        grid, x, taken = block.see(seen), expanded(block, seen.dense()), there(block, len(seen))
        before = 3  # the observation's rows of the weights begin behind another input's
        weight = torch.randn(block.groups, before + x.shape[2], WIDTH, dtype=torch.float64, generator=generator)
        y = torch.full((*x.shape[:2], WIDTH), torch.nan, dtype=torch.float64)
        d = torch.randn(y.shape, dtype=torch.float64, generator=generator) * taken
        target = torch.ones_like(weight)
        for tile in tiles(grid):
            grid.times(tile, weight[tile[0]], before, y[tile])
            grid.gradient(tile, d[tile], target[tile[0]], before, add=(tile[1].start or 0) > 0)
        torch.testing.assert_close(y * taken, (x @ weight[:, before:]) * taken)
        torch.testing.assert_close(target[:, before:], x.mT @ d)
        assert (target[:, :before] == 1).all()


def test_masks_and_expansions_of_tiles_are_those_of_the_rows(world: str, sharing: ParameterSharing) -> None:
    for block, seen in seen_in(world, sharing):
        grid, taken = block.see(seen), there(block, len(seen))
        x, masks = expanded(block, seen.dense()) * taken, expanded(block, seen.masks()) * taken
        for tile in (ALL, *tiles(grid)):
            for first, end in ((0, x.shape[2]), (1, x.shape[2] - 2)):
                columns = torch.full_like(x[tile][..., first:end], torch.nan)
                slots, steps = slots_and_steps(tile[1], grid.shape[1], grid.steps)
                apart = slots.stop - slots.start, steps.stop - steps.start
                grid.expand(first, end, tile, columns.unflatten(1, apart))
                torch.testing.assert_close(columns * taken[tile], x[tile][..., first:end])
            torch.testing.assert_close(grid.masks(tile).double() * taken[tile], masks[tile])


def test_networks_say_the_same_of_either(world: str, sharing: ParameterSharing) -> None:
    for block, seen in seen_in(world, sharing):
        x, taken = expanded(block, seen.dense()), there(block, len(seen))
        generator = torch.Generator().manual_seed(2)
        network = StackedMLP(block.groups, (x.shape[2], 9, 4), generator, agents=block.agents).double()
        found = []
        for given in (x, block.see(seen)):
            network.zero_grad()
            output = network(given) * taken
            (output**2).sum().backward()
            found.append([output.detach(), *(parameter.grad for parameter in network.parameters())])
            with torch.no_grad():
                torch.testing.assert_close(network(given) * taken, output.detach())
            network.zero_grad()
            network.backpropagate([given], lambda tile, y, taken=taken: 2 * y * taken[tile], to_inputs=False)
            torch.testing.assert_close([parameter.grad for parameter in network.parameters()], found[-1][1:])
        torch.testing.assert_close(found[0], found[1])
