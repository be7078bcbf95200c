from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.reward_server.discriminator import Architecture
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.sees import Seen, columns_seen
from bm3il.reward_server.settings import RewardSettings
from tests.plain import seen_by
from tests.reward_server.small_model import encoded

torch.set_num_threads(1)

DRIVER = TypeSpec(
    "driver",
    3,
    7,
    4,
    parts=(Part("place.road", 2), Part("loads", 2), Part("place.facility", 2), Part("time", 1)),
    purpose=("place.facility", "time"),
)
WALKER = TypeSpec("walker", 2, 3, 2, discrete=False, parts=(Part("time", 1), Part("goal", 2)), purpose=("goal",))
SPEC = EnvironmentSpec("town", (DRIVER, WALKER), 10)
SETTINGS = RewardSettings(particles=2, hidden=(6,), batch_size=8, window_steps=20, updates=2)
LAYOUT = Layout.of(SPEC, "type")


def some_rows(seed: int, count: int = 20) -> JointRows:
    generator = torch.Generator().manual_seed(seed)
    observations = [torch.randn(count, 3, 7, generator=generator), torch.randn(count, 2, 3, generator=generator)]
    return JointRows(
        seen_by(LAYOUT, observations),
        [torch.randint(4, (count, 3), generator=generator), torch.rand(count, 2, 2, generator=generator)],
        [torch.ones(count, 3, dtype=torch.bool), torch.ones(count, 2, dtype=torch.bool)],
    )


def dense(rows: JointRows, b: int) -> torch.Tensor:
    """What the agents of a block observe, [B, N_b, O]: all is their own, so that writing to it changes the rows."""
    return rows.observations[b].columns["own"]


def make_model(sees: tuple[str, ...]) -> RewardModel:
    model = RewardModel(LAYOUT, some_rows(0), dataclasses.replace(SETTINGS, sees=sees), seed=0)
    model.observe(some_rows(1))
    model.update(0.0)
    return model


@pytest.mark.parametrize(
    ("sees", "driver", "walker"),
    [
        (("all",), Seen(((0, 7),), True), Seen(((0, 3),), True)),
        (("time", "all"), Seen(((0, 7),), True), Seen(((0, 3),), True)),
        (("purpose",), Seen(((4, 7),), False), Seen(((1, 3),), False)),
        (("time", "action", "place"), Seen(((0, 2), (4, 7)), True), Seen(((0, 1),), True)),
        (("place.road", "purpose"), Seen(((0, 2), (4, 7)), False), Seen(((1, 3),), False)),
        (("goal", "action"), Seen((), True), Seen(((1, 3),), True)),
    ],
)
def test_names_stand_for_columns_of_every_type(sees: tuple[str, ...], driver: Seen, walker: Seen) -> None:
    assert columns_seen(SPEC, sees) == [driver, walker]


@pytest.mark.parametrize(
    ("sees", "expected"),
    [
        (("plase",), "unknown part for --reward.sees 'plase'; did you mean place"),
        (("time", "al"), "did you mean all"),
        (("time", "time.hour"), "unknown part for --reward.sees 'time.hour'"),
        (("goal",), "discriminators of 'driver' would see nothing; add 'action' or one of its parts: place.road"),
        ((), "would see nothing"),
    ],
)
def test_what_cannot_be_seen_is_one_line(sees: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError) as error:
        columns_seen(SPEC, sees)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_environment_without_parts_or_purpose_says_what_to_do() -> None:
    plain = EnvironmentSpec("plain", (TypeSpec("a", 1, 3, 2),), 10)
    with pytest.raises(InputError, match=r"'plain' does not name the parts.*'all' and 'action'"):
        columns_seen(plain, ["time"])
    with pytest.raises(InputError, match=r"'plain' does not say which parts .* are after; .*`purpose` in its spec"):
        columns_seen(plain, ["purpose"])
    assert columns_seen(plain, ["action"]) == [Seen((), True)]
    without = EnvironmentSpec("without", (dataclasses.replace(DRIVER, purpose=()),), 10)
    with pytest.raises(InputError, match=r"name parts instead \(it has loads, place.facility, place.road, time\)"):
        columns_seen(without, ["purpose"])


@pytest.mark.parametrize("sees", [("all",), ("time", "place"), ("goal", "loads", "action")])
@pytest.mark.parametrize("identity", [False, True])
def test_the_input_holds_what_is_seen_and_nothing_else(sees: tuple[str, ...], identity: bool) -> None:
    rows, layout = some_rows(2, 5), Layout.of(SPEC, LAYOUT.parameter_sharing, identity)
    for b, (block, seen) in enumerate(zip(layout.blocks, columns_seen(SPEC, sees), strict=True)):
        x, observations = encoded(Architecture(block, 1, (4,), "relu", seen), layout, b, rows), dense(rows, b)
        for row in range(5):
            for agent in range(block.num_agents):
                expected = [observations[row, agent, c] for run in seen.runs for c in range(*run)]
                if seen.action and block.discrete:
                    expected += [float(rows.actions[b][row, agent] == action) for action in range(block.action_dim)]
                elif seen.action:
                    expected += list(rows.actions[b][row, agent])
                expected += [float(agent == slot) for slot in range(block.slots)] if identity else [1.0]
                assert x[0, agent, row].tolist() == pytest.approx([float(value) for value in expected])


def test_rewards_depend_on_what_is_seen_alone() -> None:
    model = make_model(("purpose",))
    rows, other = some_rows(3), some_rows(4)
    for b, runs in enumerate([[(4, 7)], [(1, 3)]]):
        for first, end in runs:
            dense(other, b)[..., first:end] = dense(rows, b)[..., first:end]
    for found, expected in zip(model.query(other)[0], model.query(rows)[0], strict=True):
        assert torch.equal(found, expected)
    dense(other, 0)[..., 6] += 1
    assert not torch.equal(model.query(other)[0][0], model.query(rows)[0][0])


def test_to_name_every_part_and_the_action_is_to_see_all() -> None:
    named, every = make_model(("place", "loads", "time", "goal", "action")).state(), make_model(("all",)).state()
    assert all(np.array_equal(named[name], every[name]) for name in every)
