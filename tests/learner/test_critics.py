"""Critics against loops over rows, agents and entities in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.learner.critics import Context, Critic, ValueCritic
from bm3il.learner.mean_field import MeanField
from bm3il.protocol.layout import Block, JointRows, Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.learner.slow_reference import agents_of, q_values, random_rows, spec_of

HEADS = 2
UNEVEN = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))
EVEN = spec_of((2, 3, 4), (2, 3, 4))
MIXED = EnvironmentSpec("mixed", (TypeSpec("a", 2, 3, 3), TypeSpec("b", 3, 4, 2, discrete=False)), 5)
CONTEXTS: tuple[Context, ...] = ("types", "uniform_types", "agents", "none")


pytestmark = pytest.mark.usefixtures("float64")


def build(
    spec: EnvironmentSpec,
    sharing: ParameterSharing,
    context: Context,
    attend_own_type: bool = True,
    agent_identity: bool = False,
    mean_field: MeanField = "others",
) -> Critic:
    layout = Layout.of(spec, sharing, agent_identity)
    generator = torch.Generator().manual_seed(1)
    return Critic(layout, context, 6, HEADS, attend_own_type, generator, mean_field)


def build_value(spec: EnvironmentSpec, sharing: ParameterSharing, context: Context) -> ValueCritic:
    return ValueCritic(Layout.of(spec, sharing), context, 6, HEADS, True, torch.Generator().manual_seed(1))


def assert_as_slow(
    critic: Critic, rows: JointRows, attend_own_type: bool = True, mean_field: MeanField = "others"
) -> None:
    blocks = critic.layout.blocks
    fast = [block.rows(q) for block, q in zip(blocks, critic(rows), strict=True)]
    for agent in agents_of(critic.layout):
        for row in range(len(rows)):
            slow = q_values(critic, rows, HEADS, attend_own_type, row, agent, mean_field)
            torch.testing.assert_close(fast[agent.block][row, agent.place], slow, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("mean_field", ["others", "all"])
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("spec", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_every_context_is_its_equation(
    spec: EnvironmentSpec, context: Context, sharing: ParameterSharing, mean_field: MeanField
) -> None:
    critic = build(spec, sharing, context, mean_field=mean_field)
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(2))
    assert_as_slow(critic, rows, mean_field=mean_field)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", ["types", "uniform_types"])
def test_own_type_can_be_left_out(context: Context, sharing: ParameterSharing) -> None:
    critic = build(UNEVEN, sharing, context, attend_own_type=False)
    assert_as_slow(critic, random_rows(critic.layout, 4, torch.Generator().manual_seed(3)), False)


@pytest.mark.parametrize("context", ["types", "agents"])
def test_agents_of_a_type_can_differ_by_their_identity(context: Context) -> None:
    critic = build(UNEVEN, "type", context, agent_identity=True)
    assert_as_slow(critic, random_rows(critic.layout, 3, torch.Generator().manual_seed(4)))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("context", ["types", "uniform_types", "agents"])
def test_nobody_is_attended_to_when_nobody_is_active(context: Context) -> None:
    critic = build(UNEVEN, "agent", context)
    rows = random_rows(critic.layout, 3, torch.Generator().manual_seed(5), alive=0.4)
    for active in rows.active:
        active[0] = False  # a row without anybody
    rows.active[0][1:, :3] = False  # and one type that is empty in all others
    rows.active[1][1:] = True
    assert_as_slow(critic, rows)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("own_type", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", [Critic, ValueCritic])
def test_nothing_depends_on_the_own_action_taken(
    kind: type[Critic], context: Context, own_type: bool, sharing: ParameterSharing
) -> None:
    """Q^i(s, ·, ã) and V^i stay when a^i alone changes: else the baseline of Eq. 13 would move with the action."""
    spec = UNEVEN if kind is Critic else MIXED
    critic = kind(Layout.of(spec, sharing), context, 6, HEADS, own_type, torch.Generator().manual_seed(1))
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(9), alive=0.8)
    before = critic(rows)
    moved_somebody = False
    for agent in agents_of(critic.layout):
        block, changed = critic.layout.blocks[agent.block], [a.clone() for a in rows.actions]
        own = changed[agent.block][:, agent.place]
        own.copy_((own + 1) % block.action_dim if block.discrete else own.flip(-1) - 0.5)
        after = critic(JointRows(rows.observations, changed, rows.active))
        place = (agent.group, agent.slot)
        torch.testing.assert_close(after[agent.block][place], before[agent.block][place], rtol=1e-10, atol=1e-12)
        moved_somebody |= any(not torch.allclose(x, y) for x, y in zip(after, before, strict=True))
    assert moved_somebody == (context != "none")


def test_with_everybodys_mean_the_own_action_comes_in() -> None:
    critic = build(UNEVEN, "type", "types", mean_field="all")
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(9), alive=1.0)
    before = critic(rows)[0][0, :, 0].detach()
    rows.actions[0][:, 0] = (rows.actions[0][:, 0] + 1) % 3
    assert not torch.allclose(critic(rows)[0][0, :, 0], before, rtol=1e-6)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_a_lone_agent_does_not_see_its_type(sharing: ParameterSharing) -> None:
    """Not even as a zero: alone in its type, an agent attends as one that has the type left out."""
    alone = random_rows(Layout.of(EVEN, sharing), 5, torch.Generator().manual_seed(10), alive=1.0)
    alone.active[0][:, 0] = False
    for context in ("types", "uniform_types"):
        seeing, blind = (build(EVEN, sharing, context, attend_own_type=own_type) for own_type in (True, False))
        blocks = seeing.layout.blocks
        q, expected = (blocks[0].rows(critic(alone)[0]) for critic in (seeing, blind))
        torch.testing.assert_close(q[:, 1], expected[:, 1])
        assert not torch.allclose(q[:, 0], expected[:, 0])  # the inactive one has its fellow to look at


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("context", ["types", "uniform_types", "agents"])
def test_bfloat16_products_give_nearly_the_same(context: Context) -> None:
    torch.set_default_dtype(torch.float32)
    critic = build(UNEVEN, "type", context)
    rows = random_rows(critic.layout, 64, torch.Generator().manual_seed(11))
    exact = critic(rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = critic(rows)
    for q, approximate in zip(exact, rounded, strict=True):
        torch.testing.assert_close(approximate.float(), q, rtol=0, atol=0.01)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("context", ["types", "agents"])
def test_an_inactive_agent_is_not_seen(context: Context) -> None:
    critic = build(UNEVEN, "type", context)
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(6), alive=1.0)
    rows.active[0][:, 1] = False
    before = critic(rows)
    rows.observations[0].dense()[:, 1] += 1.0  # plain: the column itself
    rows.actions[0][:, 1] = (rows.actions[0][:, 1] + 1) % 3
    others = [0, 2, 3]
    torch.testing.assert_close(
        critic.layout.blocks[0].rows(critic(rows)[0])[:, others],
        critic.layout.blocks[0].rows(before[0])[:, others],
        rtol=0,
        atol=0,
    )


def test_float64_gradients_reach_every_parameter() -> None:
    for context in CONTEXTS:
        critic = build(EVEN, "agent", context)
        rows = random_rows(critic.layout, 8, torch.Generator().manual_seed(7), alive=1.0)
        sum(q.square().sum() for q in critic(rows)).backward()
        idle = [n for n, p in critic.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        allowed = {"others.query", "others.key"} if context == "uniform_types" else set()
        assert set(idle) <= allowed


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("spec", [UNEVEN, MIXED], ids=["discrete", "mixed"])
def test_a_value_is_the_same_network_with_one_output(
    spec: EnvironmentSpec, context: Context, sharing: ParameterSharing
) -> None:
    critic = build_value(spec, sharing, context)
    rows = random_rows(critic.layout, 4, torch.Generator().manual_seed(8))
    values = critic(rows)
    assert [v.shape for v in values] == [(b.groups, b.slots, 4) for b in critic.layout.blocks]
    for agent in agents_of(critic.layout):
        for row in range(len(rows)):
            (slow,) = q_values(critic, rows, HEADS, True, row, agent)
            fast = values[agent.block][agent.group, agent.slot, row]
            torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["types", "agents"]), st.permutations([0, 1, 2]))
def test_agents_of_a_type_are_interchangeable(seed: int, context: Context, order: list[int]) -> None:
    critic = build(UNEVEN, "agent", context)
    rows = random_rows(critic.layout, 3, torch.Generator().manual_seed(seed))
    q = critic(rows)[0].detach().clone()
    shuffle = torch.tensor([*order, 3])
    for field in (rows.observations, rows.actions, rows.active):
        field[0] = field[0][:, shuffle]
    stacks = [critic.encoders[0], critic.heads[0]] + ([critic.others.embeddings[0]] if context == "agents" else [])
    with torch.no_grad():
        for parameter in (p for stack in stacks for p in stack.parameters()):
            parameter.copy_(parameter[shuffle])
    torch.testing.assert_close(critic(rows)[0], q[shuffle], rtol=1e-9, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(CONTEXTS), st.floats(-1e3, 1e3))
def test_padding_never_changes_anything(seed: int, context: Context, rubbish: float) -> None:
    critic = build(UNEVEN, "type", context)
    rows = random_rows(critic.layout, 3, torch.Generator().manual_seed(seed))
    expected = [block.rows(q) for block, q in zip(critic.layout.blocks, critic(rows), strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "grid", lambda block, values: _grid_with(block, values, rubbish))
        spoiled = [block.rows(q) for block, q in zip(critic.layout.blocks, critic(rows), strict=True)]
    for clean, dirty in zip(expected, spoiled, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


_grid = Block.grid


def _grid_with(block: Block, rows: torch.Tensor, rubbish: float) -> torch.Tensor:
    """The grid of joint rows with something else than zeros in the empty slots."""
    values = _grid(block, rows)
    empty = (block.agent_of_slot < 0).view(block.groups, block.slots, 1, *[1] * (rows.dim() - 2))
    return values.masked_fill(empty, rubbish) if values.is_floating_point() else values
