"""Behaviour cloning: its loss, and that of held-out episodes."""

from __future__ import annotations

import math

import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import rollout
from bm3il.learner.cloning import BehaviourCloning, Cloning, clone
from bm3il.learner.settings import CloningSettings
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.layout import Layout
from bm3il.protocol.messages import Sender
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import ParameterSharing
from bm3il.protocol.telemetry import Telemetry


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_all_rows_are_weighed_alike_in_whatever_batches(sharing: ParameterSharing, batch_size: int) -> None:
    environment = make_environment("berlin?agents=7&types=3", 2)
    layout = Layout.of(environment.spec, sharing)
    policy = Policy(layout, (8,), torch.Generator().manual_seed(0))
    rows = (
        demonstrations := Demonstrations.from_trajectories(rollout(environment, policy, 5), environment.spec, "")
    ).rows(layout)
    cloning = Cloning(layout, demonstrations, batch_size, 3)
    absent = torch.rand(rows.active[0].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    cloning._rows.active[0][absent] = False

    block = layout.blocks[0]
    logits, options = policy.logits(0, block.see(rows.observations[0]))
    number = options.number(block.grid(rows.actions[0].long()).flatten(1, 2))
    surprise = -torch.log_softmax(logits, -1).gather(-1, number.unsqueeze(-1)).squeeze(-1)
    there = block.grid(~absent).flatten(1, 2)
    expected = sum(surprise[g][there[g]].mean().item() for g in range(block.groups))

    torch.testing.assert_close(cloning.loss_of_all(policy), torch.tensor(expected))


def test_a_clone_tells_how_far_it_is_while_it_is_made() -> None:
    environment = make_environment("berlin?agents=4&types=2", 2)
    layout = Layout.of(environment.spec, "type")
    policy = Policy(layout, (8,), torch.Generator().manual_seed(0))
    demonstrations = Demonstrations.from_trajectories(rollout(environment, policy, 5), environment.spec, "")
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    seen = []
    settings = CloningSettings(updates=1, iterations=3, batch_size=4)
    clone(policy, demonstrations, settings, 0, telemetry, lambda: seen.append(dict(telemetry.numbers)))
    telemetry.close()
    assert [numbers.get("cloning_iteration") for numbers in seen][:2] == [None, 0]
    assert all(math.isfinite(number) for numbers in seen for number in numbers.values())  # others never arrive
    assert seen[-1]["cloning_iterations"] == 3
    assert seen[-1]["cloning_left_seconds"] > 0
    assert not [name for name in telemetry.numbers if name.startswith("cloning_")]


def test_a_clone_ends_with_its_last_update_whatever_held_out_episodes_like(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_environment("berlin?agents=4&types=2", 2)
    layout = Layout.of(environment.spec, "type")
    policy = Policy(layout, (8,), torch.Generator().manual_seed(0))
    demonstrations = Demonstrations.from_trajectories(rollout(environment, policy, 5), environment.spec, "")
    seen: list[str] = []

    def worse_and_worse(_: Cloning, policy: Policy) -> torch.Tensor:
        seen.append(policy.sha256())
        return torch.tensor(float(len(seen)))

    monkeypatch.setattr(Cloning, "loss_of_all", worse_and_worse)
    settings = CloningSettings(updates=1, iterations=3, batch_size=4, held_out=0.5)
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    clone(policy, demonstrations, settings, 0, telemetry)
    telemetry.close()
    assert len(set(seen)) == 3
    assert policy.sha256() == seen[-1]


def test_a_clone_that_is_no_number_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make_environment("berlin?agents=4&types=2", 2)
    layout = Layout.of(environment.spec, "type")
    policy = Policy(layout, (8,), torch.Generator().manual_seed(0))
    demonstrations = Demonstrations.from_trajectories(rollout(environment, policy, 5), environment.spec, "")
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    settings = CloningSettings(updates=2, iterations=3, batch_size=4, learning_rate=1e30)
    with pytest.raises(NumericalError, match=r"cloning_loss is (nan|inf)"):
        clone(policy, demonstrations, settings, 0, telemetry)
    telemetry.close()


def test_the_rate_of_cloning_falls_to_a_twentieth() -> None:
    environment = make_environment("berlin?agents=4&types=2", 2)
    layout = Layout.of(environment.spec, "type")
    settings = CloningSettings(updates=1, iterations=3, batch_size=4, weight_decay=0.0, learning_rate=1e-2)
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    moved = []
    for progress in (0.0, 0.5, 1.0):
        policy = Policy(layout, (8,), torch.Generator().manual_seed(0))
        recorded = Demonstrations.from_trajectories(rollout(environment, policy, 5), environment.spec, "")
        before = [p.detach().clone() for p in policy.parameters()]
        run = BehaviourCloning(policy, recorded, settings, torch.device("cpu"), 0, telemetry)
        run.iterate(progress, lambda: None)
        # Adam's first step is as long as its rate.
        moved.append(max(float((p - q.detach()).abs().max()) for p, q in zip(before, policy.parameters(), strict=True)))
    telemetry.close()
    assert moved == pytest.approx([1e-2, 0.525e-2, 0.05e-2], rel=1e-2)
