"""Softmaxes and sums over the few actions that a table allows give what those over all actions give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import rollout
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.cloning import Cloning
from bm3il.learner.critics import Critic, ValueCritic
from bm3il.learner.replay import Replay
from bm3il.learner.segments import Segments
from bm3il.learner.settings import ClippedSettings, LearnerSettings
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.grid import ALL, ObservationGrid
from bm3il.protocol.networks.options import Options
from bm3il.protocol.registry import make_environment

ENVIRONMENT = make_environment("berlin?types=2&agents=6&sight=near", 4)
LAYOUT = Layout.of(ENVIRONMENT.spec, "type")
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("float64")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def off_policy(critic: type[Critic], learner: type[ActorCritic], policy: str) -> list[torch.Tensor]:
    actor = Policy(LAYOUT, (8,), generator())
    settings = LearnerSettings(hidden=8, heads=2, policy=policy)  # type: ignore[arg-type]
    built = learner(actor, critic(LAYOUT, "types", 8, 2, True, generator()), settings, CPU, 3)  # type: ignore[arg-type]
    replay, dice = Replay(LAYOUT, 400), generator()
    replay.add(rollout(ENVIRONMENT, actor, 5))
    for _ in range(3):
        batch, _ = replay.sample(12, dice)
        built.update(batch, [reward.double() for reward in batch.rewards], 0.5)
    return [*actor.parameters(), *built.critic.parameters()]


def clipped() -> list[torch.Tensor]:
    actor = Policy(LAYOUT, (8,), generator())
    settings = LearnerSettings(hidden=8, heads=2, clipped=ClippedSettings(epochs=2, parts=3, clone_weight=0.3))
    value = ValueCritic(LAYOUT, "types", 8, 2, True, generator())
    built = ClippedActorCritic(actor, value, settings, CPU, 3)
    built.start_from(actor)
    segments = Segments.of([rollout(ENVIRONMENT, actor, 5)], LAYOUT)
    rewards = [reward.double() for reward in segments.of_rows(segments.rewards)]
    for _ in range(2):
        built.update(segments, rewards, 0.5)
    return [*actor.parameters(), *built.critic.parameters()]


def cloned() -> list[torch.Tensor]:
    actor = Policy(LAYOUT, (8,), generator())
    played = rollout(ENVIRONMENT, actor, 5)
    loss = Cloning(LAYOUT, Demonstrations.from_trajectories(played, ENVIRONMENT.spec, "itself"), 20, 3).loss(actor)
    loss.backward()
    return [loss.detach(), *(p.grad for p in actor.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "learned",
    [
        lambda: off_policy(Critic, ActorCritic, "actor"),
        lambda: off_policy(Critic, ActorCritic, "boltzmann"),
        lambda: off_policy(ActionCritic, ActionActorCritic, "actor"),
        clipped,
        cloned,
    ],
    ids=["actor", "boltzmann", "of own actions", "clipped", "cloned"],
)
def test_what_is_learned_is_the_same(
    learned: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = learned()
    monkeypatch.setattr(ObservationGrid, "options", lambda self, tile=ALL: Options(self.masks(tile)))
    for mine, theirs in zip(few, learned(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("greedy", [False, True])
def test_the_same_is_done(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ENVIRONMENT.reset(2).seen(ENVIRONMENT.spec)
    policy = Policy(LAYOUT, (8,), generator())
    few, chances = policy.choose(seen, generator(), greedy)
    monkeypatch.setattr(ObservationGrid, "options", lambda self, tile=ALL: Options(self.masks(tile)))
    all_of_them, expected = policy.choose(seen, generator(), greedy)
    for mine, theirs in zip([*few, *chances], [*all_of_them, *expected], strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs))
