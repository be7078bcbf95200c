"""The learner on a GPU that need not be there.

PyTorch's fake tensors know their device and shape, hold no data, and refuse to be mixed with those of another device:
what runs here leaves nothing on the CPU that is computed with on the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bm3il.actors.policy import Policy
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.attention import attention_by_type
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.cloning import BehaviourCloning, Cloning
from bm3il.learner.critics import Context, Critic, ValueCritic
from bm3il.learner.replay import Batch, Replay
from bm3il.learner.segments import Segments
from bm3il.learner.settings import ClippedSettings, CloningSettings, LearnerSettings
from bm3il.protocol import demonstrations as module
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import compact_step
from bm3il.protocol.layout import Layout, ParameterSharing
from bm3il.protocol.messages import Sender
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.observations import forms
from bm3il.protocol.specs import EnvironmentSpec, Part, TypeSpec
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories
from tests.learner.slow_reference import spec_of
from tests.never_waiting import NeverWaiting

GPU = torch.device("meta")
HIDDEN, HEADS, ROWS = 8, 2, 6
UNEVEN = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))
MIXED = EnvironmentSpec(
    "mixed",
    (TypeSpec("a", 2, 3, 3), TypeSpec("b", 3, 4, 2, discrete=False), TypeSpec("c", 1, 4, 2, discrete=False)),
    5,
)
_PARTS = (Part("place", 2, "code"), Part("loads", 2, "shared", True), Part("home", 1, "constant", values=(1.0,)))
COMPACT = EnvironmentSpec(
    "compact",
    tuple(TypeSpec(name, 2, 6, 2, parts=(*_PARTS, Part("hours", 1)), mask="place") for name in ("a", "b")),
    5,
    tables=(("place", ((0,), (0, 1))),),
)
SPECS = {"discrete": UNEVEN, "mixed": MIXED, "compact": COMPACT}
CONTEXTS: tuple[Context, ...] = ("types", "uniform_types", "agents", "none")
NETWORKS: list[tuple[Context, ParameterSharing]] = [
    ("types", "type"),
    ("uniform_types", "agent"),
    ("agents", "type"),
    ("none", "agent"),
]
"""Each context, and both ways of sharing parameters: where the one lies does not depend on the other."""


class _Real(TorchFunctionMode):
    """What fake tensors are too lenient, or too simple, for: a generator of another device than what it fills is
    refused, and a parameter can be copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            copied = tensor.detach().clone()
            memo[id(tensor)] = torch.nn.Parameter(copied) if isinstance(tensor, torch.nn.Parameter) else copied
            return memo[id(tensor)]
        generator = kwargs.pop("generator", None)  # some fake operations know none
        result = func(*args, **kwargs)
        assert generator is None or generator.device.type == result.device.type, f"{func} with a generator elsewhere"
        return result


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """What `numpy` says of a fake tensor: one of the GPU has no array."""
    assert tensor.device.type == "cpu", "an array of a tensor that is not on the CPU"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Where `GPU` can be used. Networks are built outside: real parameters are moved, fake ones cannot be."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Real():
        yield


@pytest.fixture(autouse=True)
def _without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    apply = StackedMLP._apply

    def applied(self: StackedMLP, *args: Any, **options: Any) -> StackedMLP:
        """A real GPU takes parameters over in place; the pretended one gets new ones, which the layers must know."""
        apply(self, *args, **options)
        self._layers = self._layers.like(tuple(self.weights), tuple(self.biases))
        return self

    monkeypatch.setattr(StackedMLP, "_apply", applied)
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [GPU.type])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(FakeTensor, "numpy", _as_array, raising=False)
    monkeypatch.setattr(FakeTensor, "item", lambda self: 0.0, raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [0.0] * self.numel(), raising=False)
    yield
    forms.cache_clear()  # what forms copied to the pretended GPU is of this test


def batch_of(layout: Layout) -> Batch:
    """A batch of episodes in which nothing happens, on the CPU."""
    replay = Replay(layout, 4 * layout.spec.episode_length)
    replay.add(Trajectories.zeros(layout.spec, 4))
    return replay.sample(ROWS, torch.Generator().manual_seed(1))[0]


def policy_of(layout: Layout) -> Policy:
    return Policy(layout, (HIDDEN,), torch.Generator().manual_seed(0))


def demonstrations_of(spec: EnvironmentSpec) -> Demonstrations:
    """Four episodes in which nothing happens."""
    episodes = Trajectories.zeros(spec, 4)
    for name, array in episodes.arrays.items():
        if name.endswith((".masks", ".active")):
            array[:] = True
    episodes.lengths[:] = spec.episode_length
    return Demonstrations.from_trajectories(episodes, spec, "nothing")


@pytest.mark.parametrize(
    ("name", "kinds", "options", "context", "sharing"),
    [
        # What a critic attends to and how a policy draws do not know of each other: all contexts of both kinds of
        # critic, and then each other way of acting once.
        *[("discrete", (Critic, ActorCritic), {}, *network) for network in NETWORKS],
        *[("mixed", (ActionCritic, ActionActorCritic), {}, *network) for network in NETWORKS],
        *[("compact", (ActionCritic, ActionActorCritic), {}, *network) for network in NETWORKS[::2]],
        ("discrete", (Critic, ActorCritic), {"policy": "boltzmann"}, *NETWORKS[0]),
        ("discrete", (ActionCritic, ActionActorCritic), {}, *NETWORKS[0]),
        ("discrete", (ActionCritic, ActionActorCritic), {"policy": "boltzmann"}, *NETWORKS[1]),
        ("compact", (Critic, ActorCritic), {}, *NETWORKS[1]),
    ],
)
def test_an_update_runs_where_the_networks_are(
    name: str, kinds: tuple[Any, Any], options: dict[str, Any], context: Context, sharing: ParameterSharing
) -> None:
    layout = Layout.of(SPECS[name], sharing, True)
    settings = LearnerSettings(hidden=HIDDEN, heads=HEADS, attend_own_type=False, cloning_weight=0.1, **options)
    make_critic, make_learner = kinds
    critic = make_critic(layout, context, HIDDEN, HEADS, False, torch.Generator().manual_seed(1))
    demonstrations, batch, policy = demonstrations_of(SPECS[name]), batch_of(layout), policy_of(layout)
    with pretended_gpu():
        cloning = Cloning(layout, demonstrations, 4, 5, GPU)
        learner = make_learner(policy, critic, settings, GPU, 7)
        learner.update(batch, batch.rewards, 0.5, cloning)
        assert {p.device for network in (policy, critic) for p in network.parameters()} == {GPU}
        attention_by_type(critic, batch.rows.to(GPU))
    assert {"policy", "critic", "policy_adam", "critic_adam"} <= {name.partition("/")[0] for name in learner.state()}


@pytest.mark.parametrize(
    ("lagging", "name", "context", "sharing"),
    [
        *[(False, "discrete", *network) for network in NETWORKS],
        *[(lagging, name, *NETWORKS[lagging]) for lagging in (False, True) for name in SPECS if name != "discrete"],
        (True, "discrete", *NETWORKS[0]),
    ],
)
def test_a_clipped_update_runs_where_the_networks_are(
    lagging: bool, name: str, context: Context, sharing: ParameterSharing
) -> None:
    layout, policy = Layout.of(SPECS[name], sharing, True), policy_of(Layout.of(SPECS[name], sharing, True))
    settings = LearnerSettings(hidden=HIDDEN, heads=HEADS, clipped=ClippedSettings(epochs=1, parts=2, clone_weight=0.1))
    critic = ValueCritic(layout, context, HIDDEN, HEADS, True, torch.Generator().manual_seed(1))
    chunk = Trajectories.zeros(SPECS[name], 3)
    chunk.lengths[0] = 2
    segments = Segments.of([chunk], layout)
    rewards = [torch.zeros(segments.num_steps, block.num_agents) for block in layout.blocks]
    with pretended_gpu():
        learner = ClippedActorCritic(policy, critic, settings, GPU, 7, lagging)
        learner.start_from(policy)
        learner.update(segments, rewards, 0.5)
        assert {p.device for network in (policy, critic) for p in network.parameters()} == {GPU}
    assert {"policy", "critic", "clone"} <= {name.partition("/")[0] for name in learner.state()}


@contextmanager
def never_waiting(monkeypatch: pytest.MonkeyPatch, reads: int) -> Iterator[None]:
    """Where a GPU's numbers may be read `reads` times in all."""
    read: list[str] = []
    monkeypatch.setattr(FakeTensor, "item", lambda self: read.append("item") or 0.0)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: read.append("tolist") or [0.0] * self.numel())
    with NeverWaiting(GPU):
        yield
    assert len(read) == reads


@pytest.mark.parametrize(
    ("name", "context"), [*[("discrete", context) for context in CONTEXTS], ("mixed", "types"), ("compact", "types")]
)
def test_an_update_does_not_wait_for_the_device(name: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of(SPECS[name], "type", True)
    kinds = (ActionCritic, ActionActorCritic) if name == "mixed" else (Critic, ActorCritic)
    critic = kinds[0](layout, context, HIDDEN, HEADS, False, torch.Generator().manual_seed(1))
    batch, policy = batch_of(layout), policy_of(layout)
    with pretended_gpu():
        learner = kinds[1](policy, critic, LearnerSettings(hidden=HIDDEN, heads=HEADS), GPU, 7)  # type: ignore[arg-type]
        learner.update(batch, batch.rewards, 0.0)  # the first one brings tensors to the device that stay there
        with never_waiting(monkeypatch, reads=0):
            learner.update(batch, batch.rewards, 0.5)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_rows_lie_where_they_are_learned_from(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but their numbers goes to the device for a batch, and nothing comes back."""
    layout = Layout.of(SPECS[name], "type")
    length = layout.spec.episode_length
    demonstrations, chunk = demonstrations_of(SPECS[name]), Trajectories.zeros(layout.spec, 2)
    chunk.lengths[:] = [length, length if whole else 2]
    with pretended_gpu():
        replay = Replay(layout, 4 * length, GPU)
        replay.add(chunk)
        with never_waiting(monkeypatch, reads=0):
            batch, numbers = replay.sample(ROWS, torch.Generator().manual_seed(1))
        assert {tensor.device for tensor in batch.tensors()} == {GPU}
        assert numbers.device.type == "cpu"
        cloning = Cloning(layout, demonstrations, 4, 5, GPU)
        assert {tensor.device for tensor in cloning._rows.tensors()} == {GPU}
    assert len(numbers) == ROWS


@pytest.mark.parametrize(
    ("name", "context"), [*[("discrete", context) for context in CONTEXTS], ("mixed", "types"), ("compact", "types")]
)
def test_a_clipped_iteration_reads_once_from_the_device(
    name: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, policy = Layout.of(SPECS[name], "type", True), policy_of(Layout.of(SPECS[name], "type", True))
    settings = LearnerSettings(hidden=HIDDEN, heads=HEADS, clipped=ClippedSettings(epochs=2, parts=2, clone_weight=0.1))
    critic = ValueCritic(layout, context, HIDDEN, HEADS, True, torch.Generator().manual_seed(1))
    chunk = Trajectories.zeros(SPECS[name], 3)
    chunk.lengths[:] = SPECS[name].episode_length
    segments = Segments.of([chunk], layout)
    rewards = [torch.zeros(segments.num_steps, block.num_agents) for block in layout.blocks]
    with pretended_gpu():
        learner = ClippedActorCritic(policy, critic, settings, GPU, 7)
        learner.start_from(policy)
        learner.update(segments, rewards, 0.0)
        with never_waiting(monkeypatch, reads=1):
            learner.update(segments, rewards, 0.5)


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("name", SPECS)
def test_cloning_runs_where_the_policy_is(
    name: str, sharing: ParameterSharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, settings = Layout.of(SPECS[name], sharing, True), CloningSettings(updates=2, batch_size=4, held_out=0.5)
    policy, demonstrations = policy_of(layout), demonstrations_of(SPECS[name])
    telemetry = Telemetry("learner", 0, Sender("test", "learner-0"))
    telemetry.close()
    monkeypatch.setattr(module, "check_block", lambda *_: None)  # they were checked above; fake masks allow nothing
    with pretended_gpu():
        algorithm = BehaviourCloning(policy, demonstrations, settings, GPU, 3, telemetry)
        algorithm.iterate(0.5, lambda: None)
        assert all(parameter.device == GPU for parameter in algorithm.policy.parameters())
    assert {"policy", "adam"} <= {name.partition("/")[0] for name in algorithm.state()[0]}


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("name", SPECS)
def test_a_policy_acts_and_is_published_from_where_it_is(name: str, sharing: ParameterSharing) -> None:
    layout, spec = Layout.of(SPECS[name], sharing, True), SPECS[name]
    policy = policy_of(layout)
    columns = [
        {column: np.ones(shape, dtype) for column, (dtype, shape) in form.table_of(3).items()} for form in forms(spec)
    ]
    per_agent = [np.zeros((3, t.count), np.float32) for t in spec.types]
    ended = np.zeros(3, bool)
    now = compact_step(spec, columns, [zeros == 0 for zeros in per_agent], per_agent, ended, ended)
    with pretended_gpu():
        policy.to(GPU)
        for greedy in (False, True):
            actions = policy.act(now, torch.Generator().manual_seed(0), greedy)
            assert [len(action) for action in actions] == [3] * spec.num_types
    assert policy.to_arrays().keys() == policy.array_table().keys()
