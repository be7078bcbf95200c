"""The reward model on a device that is not the host's, pretended: mixing the two is an error here as it is there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.observations import Observations, forms
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.reward_server import particles
from bm3il.reward_server.health import Health
from bm3il.reward_server.memory import Memory
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.settings import RewardSettings
from tests.never_waiting import NeverWaiting

torch.set_num_threads(1)

PARTS = (Part("place", 2), Part("time", 1), Part("load", 1))
DESCRIBED = (
    Part("place", 2, "code"),
    Part("load", 3, "shared", masked=True),
    Part("home", 1, "constant", values=(0.5,)),
    Part("time", 1),
)
SPEC = EnvironmentSpec(
    "uneven",
    (
        TypeSpec("a", 3, 4, 5, parts=PARTS, purpose=("time", "place")),
        TypeSpec("b", 2, 4, 5, parts=PARTS, purpose=("time", "place")),
        TypeSpec("c", 2, 3, 2, discrete=False, parts=(Part("time", 1), Part("goal", 2)), purpose=("goal",)),
        TypeSpec("d", 2, 7, 3, parts=DESCRIBED, purpose=("place", "home"), mask="place"),
    ),
    10,
    tables=(("place", ((0,), (1, 2))),),
)
SETTINGS = RewardSettings(particles=3, hidden=(8, 6), batch_size=16, window_steps=40)
DEVICE = "meta"
"""Under FakeTensorMode a device like any other, but that its tensors have no values."""


class Standing(torch.optim.Adam):
    """Takes no step: the fused kernel is not for pretended tensors, and the other reads numbers that they lack."""

    def __init__(self, *args: Any, fused: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def step(self, closure: Any = None) -> None:
        devices = {value.device for p, state in self.state.items() for value in (p, p.grad, *state.values())}
        assert devices == {torch.device(DEVICE)}


def some_rows(layout: Layout, count: int) -> JointRows:
    shapes = [((count, block.num_agents), block) for block in layout.blocks]
    columns = [
        {
            name: torch.ones(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in b.form.table_of(count).items()
        }
        for b in layout.blocks
    ]
    return JointRows(
        [Observations(b.form, c) for b, c in zip(layout.blocks, columns, strict=True)],
        [torch.randint(b.action_dim, shape) if b.discrete else torch.rand(*shape, 2) for shape, b in shapes],
        [torch.ones(shape, dtype=torch.bool) for shape, _ in shapes],
    )


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_scope": "function"},
        {"kernel_scope": "function", "particles": 1, "sees": ("purpose", "action")},
        {"kernel_scope": "tensor", "sees": ("purpose",)},
        {"kernel_scope": "network"},
        {"kernel_scope": "none", "prior_stddev": 0.0},
    ],
)
def test_host_and_device_are_never_mixed(
    monkeypatch: pytest.MonkeyPatch, sharing: ParameterSharing, changes: dict[str, Any]
) -> None:
    forms.cache_clear()  # what they copied to the device of another test
    layout = Layout.of(SPEC, sharing, agent_identity=sharing == "type")
    settings = dataclasses.replace(SETTINGS, **changes)
    memory = Memory(layout, 40, "window", 0)
    expert, asked = some_rows(layout, 30), some_rows(layout, 5)
    memory.push(some_rows(layout, 50))
    monkeypatch.setattr(particles, "Memory", lambda *_: memory)
    monkeypatch.setattr(torch.optim, "Adam", Standing)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        memory.rows = memory.rows.to(torch.device(DEVICE))
        model = RewardModel(layout, expert, settings, 0, DEVICE)
        model._step(Health())  # the first one brings tensors to the device that stay there
        with NeverWaiting(torch.device(DEVICE)):
            model._step(None)
            model._step(Health())
        for b, layers in enumerate(model._layers):
            assert {layer.device.type for layer in layers} == {DEVICE}
            assert {values.device.type for values in model._query_block(b, asked.to(model._device), True)} == {"cpu"}
