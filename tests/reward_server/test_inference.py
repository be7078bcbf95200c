"""What queries compute, beside what SVGD differentiates."""

from __future__ import annotations

import pytest
import torch

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.protocol.layout import Block, JointRows, Layout, ParameterSharing
from bm3il.protocol.observations import Observations
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.reward_server.discriminator import Architecture, Workspace, forward
from bm3il.reward_server.inference import Inference
from bm3il.reward_server.sees import columns_seen
from tests.reward_server.small_model import SPEC as UNEVEN
from tests.reward_server.small_model import encoded, some_rows

PARTICLES, HIDDEN = 3, (6, 4)
TOWN, ROVERS = "berlin?types=2&agents=6&sight=near", "rover_tower?pairs=2"


PARTS = (Part("a", 2), Part("x", 3, "code"), Part("b", 2), Part("y", 2, "code"), Part("c", 1))
STRIPED = EnvironmentSpec("striped", (TypeSpec("t", 3, 10, 4, parts=PARTS),), 10)


def rows_in(world: str, layout: Layout) -> JointRows:
    """Some joint rows of an episode in which everybody strays, with other actions; or random ones."""
    if layout.spec is UNEVEN:
        return some_rows(layout, 9, 1)
    generator = torch.Generator().manual_seed(3)
    if layout.spec is STRIPED:
        codes = torch.randint(3, (9, 3, 2), generator=generator).to(torch.uint8)
        columns = {"own": torch.randn(9, 3, 5, generator=generator), "codes": codes}
        seen = [Observations(layout.blocks[0].form, columns)]
    else:
        observations = rollout(make_environment(world, 2), UniformPolicy(layout.spec), 4).seen()
        seen = [x.map(lambda tensor: tensor[1:10, 0]) for x in observations]
    actions = [torch.randint(b.action_dim, (9, b.num_agents), generator=generator) for b in layout.blocks]
    return JointRows(seen, actions, [torch.ones(9, b.num_agents, dtype=torch.bool) for b in layout.blocks])


def parts_of(block: Block) -> list[tuple[slice, int]]:
    """All groups but the last with all slots; then that one, with no more than it has agents in."""
    last = block.groups - 1
    return [*([(slice(0, last), block.slots)] if last else []), (slice(last, last + 1), block.agents[-1])]


@pytest.mark.parametrize(
    ("world", "sees"),
    [
        (TOWN, ("all",)),
        (TOWN, ("purpose",)),
        (TOWN, ("place", "loads", "time", "action")),
        (TOWN, ("home",)),
        (TOWN, ("action",)),
        (ROVERS, ("all",)),
        ("uneven", ("all",)),
        ("striped", ("a", "c")),
        ("striped", ("all",)),
    ],
)
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("identity", [False, True])
def test_logits_are_those_of_the_expanded_input(
    world: str, sees: tuple[str, ...], sharing: ParameterSharing, identity: bool
) -> None:
    made_up = {"uneven": UNEVEN, "striped": STRIPED}
    spec = made_up[world] if world in made_up else make_environment(world, 1).spec
    layout = Layout.of(spec, sharing, identity)
    rows, seen = rows_in(world, layout), columns_seen(spec, sees)
    for b, block in enumerate(layout.blocks):
        architecture = Architecture(block, PARTICLES, HIDDEN, "relu", seen[block.types[0]])
        layers = [layer.double() for layer in architecture.initial(torch.Generator().manual_seed(2))]
        x = encoded(architecture, layout, b, rows, torch.float64)
        expected = forward(layers, x.flatten(1, 2), "relu", Workspace(torch.float64))[0].clone()
        inference, work = Inference(architecture, layers), Workspace(torch.float64)
        grid = inference.see(rows.observations[b], rows.actions[b])
        found = torch.full_like(expected, torch.nan)
        for groups, slots in parts_of(block):
            found[groups, :, : slots * len(rows)] = inference.logits(groups, slots, grid, work)
        taken = _taken(block, len(rows))
        torch.testing.assert_close(found[taken], expected[taken])


def _taken(block: Block, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places [G, L, S·B] of slots that have an agent: what an empty one sees is anything."""
    there = (block.agent_of_slot >= 0).view(block.groups, 1, block.slots, 1)
    return torch.where(there.expand(-1, PARTICLES, -1, rows).flatten(2))
