"""Clipped updates: against loops, and what must hold of them whatever the figures are."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.learner import losses
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.critics import Context, ValueCritic
from bm3il.learner.segments import Segments
from bm3il.learner.settings import ClippedSettings, LearnerSettings
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.trajectories import Trajectories
from tests.learner.slow_reference import agents_of, spec_of
from tests.plain import shown

HIDDEN, HEADS = 8, 2
UNEVEN = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3), episode_length=6)
CONTINUOUS = EnvironmentSpec("toy", (TypeSpec("arm", 2, 3, 2, discrete=False), TypeSpec("leg", 1, 4, 3)), 6)
SETTINGS = LearnerSettings(
    hidden=HIDDEN,
    heads=HEADS,
    discount=0.9,
    policy_learning_rate=1e-3,
    critic_learning_rate=1e-3,
    clipped=ClippedSettings(epochs=2, parts=3, clip=0.2, entropy_weight=0.01),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(
    spec: EnvironmentSpec = UNEVEN,
    sharing: ParameterSharing = "type",
    context: Context = "types",
    settings: LearnerSettings = SETTINGS,
    lagging: bool = False,
    seed: int = 0,
) -> ClippedActorCritic:
    layout = Layout.of(spec, sharing)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(layout, (HIDDEN,), generator)
    critic = ValueCritic(layout, context, HIDDEN, HEADS, True, generator)
    return ClippedActorCritic(policy, critic, settings, torch.device("cpu"), seed, lagging)


def played(built: ClippedActorCritic, episodes: int = 5, seed: int = 1) -> tuple[Segments, list[torch.Tensor]]:
    """Episodes of several lengths by the policy as it is, in which agents die; and a reward for each step."""
    spec, random = built.layout.spec, np.random.default_rng(seed)
    chunk = Trajectories.zeros(spec, episodes)
    chunk.lengths[:] = random.integers(2, spec.episode_length + 1, episodes)
    chunk.lengths[0] = spec.episode_length
    for e, length in enumerate(chunk.lengths):
        chunk.terminated[length - 1, e] = e % 2
    for m, t in enumerate(spec.types):
        chunk.observations[m][:] = random.normal(size=chunk.observations[m].shape)
        chunk.action_masks[m][:] = random.random(chunk.action_masks[m].shape) < 0.7
        chunk.action_masks[m][..., 0] = True
        steps = np.arange(spec.episode_length + 1)[:, None, None]
        ends = random.integers(0, 2 * spec.episode_length, (episodes, t.count))  # half of them die on the way
        chunk.active[m][:] = (steps < ends) & (steps <= chunk.lengths[:, None])
    generator = torch.Generator().manual_seed(seed)
    for t in range(spec.episode_length):
        now = shown([o[t] for o in chunk.observations], [a[t] for a in chunk.action_masks])
        for m, (action, chance) in enumerate(zip(*built.policy.decide(now, generator), strict=True)):
            chunk.actions[m][t], chunk.log_probabilities[m][t] = action, chance
    segments = Segments.of([chunk], built.layout)
    rewards = [torch.randn(segments.num_steps, block.num_agents, generator=generator) for block in built.layout.blocks]
    return segments, rewards


def with_deaths(segments: Segments) -> Segments:
    """Agents die in the middle of their episodes, each at a step of its own."""
    random = np.random.default_rng(7)
    for active in segments.active:
        ends = torch.from_numpy(random.integers(1, len(active) + 1, active.shape[1:]))
        active &= torch.arange(len(active))[:, None, None] < ends
    return segments


def gradients(built: ClippedActorCritic, segments: Segments, rewards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the policies, from one part that holds all rows, before they are clipped and applied."""
    steps = built._look_back(segments, rewards)
    built._backward(steps, learn_policy=True)
    return [p.grad.clone() for p in built.policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", ["none", "uniform_types", "types", "agents"])
def test_the_policies_move_along_the_advantages_of_every_agent(sharing: ParameterSharing, context: Context) -> None:
    """Agent by agent, step by step: where old and new policy are the same, the gradient is that of −Â log π − c H."""
    built = build(sharing=sharing, context=context)
    segments, rewards = played(built)
    drawn_from = built._generator.get_state()
    found = gradients(built, segments, rewards)
    built._generator.set_state(drawn_from)  # what the others would do in the last view is drawn
    with torch.no_grad():
        values = built._values(segments)
    per_step = segments.spread(rewards)
    settings, everybody = built.settings, agents_of(built.layout)
    advantage: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for agent in everybody:
        b, i = agent.block, agent.place
        for e in range(segments.played.shape[1]):
            length, ahead = int(segments.played[:, e].sum()), 0.0
            for t in reversed(range(length)):
                alive_next = bool(segments.active[b][t + 1, e, i]) and not bool(segments.terminated[t, e])
                follows = float(values[b][t + 1, e, i]) if alive_next else 0.0
                delta = float(per_step[b][t, e, i]) + settings.discount * follows - float(values[b][t, e, i])
                goes_on = t + 1 < length and bool(segments.active[b][t + 1, e, i])
                ahead = delta + settings.discount * settings.clipped.decay * ahead * goes_on
                if segments.active[b][t, e, i]:
                    advantage.setdefault((b, agent.group), {})[t * 100 + e, i] = ahead
    built.policy.zero_grad()
    loss = torch.zeros(())
    for (b, _), cells in advantage.items():
        numbers = np.array(list(cells.values()))
        scaled = (numbers - numbers.mean()) / numbers.std()
        for ((step, i), _), wanted in zip(cells.items(), scaled, strict=True):
            t, e = divmod(step, 100)
            seen = segments.observations[b]
            block, mask = built.layout.blocks[b], seen.masks()[t, e, i]
            output = block.rows(built.policy.outputs(b, block.see(seen[t, e : e + 1])))[0, i]
            log_policy = output.masked_fill(~mask, FORBIDDEN_LOGIT).log_softmax(-1)
            entropy = -(log_policy.exp() * log_policy).sum()
            gain = float(wanted) * log_policy[segments.actions[b][t, e, i]]
            loss = loss - (gain + settings.clipped.entropy_weight * entropy) / len(cells)
    loss.backward()
    for mine, parameter in zip(found, built.policy.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-4)


def test_a_better_action_becomes_likelier_and_the_clip_holds_it_back() -> None:
    built = build(settings=dataclasses.replace(SETTINGS, policy_learning_rate=0.02, clipped=ClippedSettings(clip=0.1)))
    segments, _ = played(built, episodes=40)
    rewards = [(a[segments.played] == 0).float() for a in segments.actions]
    rows = segments.rows()
    with torch.no_grad():
        before = built._log_probabilities(rows)
    for _ in range(3):
        figures = built.update(segments, rewards, 0.0)
    with torch.no_grad():
        after = built._log_probabilities(rows)
    chosen = (rows.actions[0] == 0) & rows.active[0] & (rows.observations[0].masks().sum(-1) > 1)
    gain = (after[0] - before[0])[chosen]
    assert 0 < float(gain.mean()) < np.log(1.1) + 0.1  # a few steps past the bound: the last one before it was read
    assert figures["critic_loss"] < 10


def test_nothing_that_was_not_played_matters() -> None:
    one, other = build(), build()
    segments, rewards = played(one)
    one.update(segments, rewards, 0.0)
    changed = copy.deepcopy(segments)
    gone = ~changed.played
    for b in range(len(changed.actions)):
        changed.actions[b][gone] = 0
        changed.log_probabilities[b][gone] = 5
        changed.rewards[b][:] = float("nan")
    other.update(changed, rewards, 0.0)
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_while_the_critics_learn_first_the_policy_stays() -> None:
    built = build()
    segments, rewards = played(built)
    before, critic = built.policy.sha256(), copy.deepcopy(built.critic.state_dict())
    built.update(segments, rewards, 0.0, learn_policy=False)
    assert built.policy.sha256() == before
    assert any(not torch.equal(critic[name], value) for name, value in built.critic.state_dict().items())


def test_without_lag_the_truncated_weights_change_nothing() -> None:
    one, other = build(lagging=False), build(lagging=True)
    segments, rewards = played(one)
    for built in (one, other):
        built.update(segments, rewards, 0.0)
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_rows_that_the_policy_would_hardly_play_hardly_count() -> None:
    built = build(lagging=True)
    segments, rewards = played(built)
    lagging = copy.deepcopy(segments)
    for column in lagging.log_probabilities:
        column += 3.0  # whoever acted did this twenty times as often
    with torch.no_grad():
        now, behind = built._look_back(segments, rewards), built._look_back(lagging, rewards)
    for near, far in zip(now.weight, behind.weight, strict=True):
        torch.testing.assert_close(far, near * np.exp(-3.0), atol=1e-6, rtol=1e-4)


def test_the_clone_holds_the_policy() -> None:
    moved = {}
    for clone_weight in (0.0, 5.0):
        clipped = dataclasses.replace(SETTINGS.clipped, clone_weight=clone_weight, clip=10.0)
        built = build(settings=dataclasses.replace(SETTINGS, policy_learning_rate=0.01, clipped=clipped))
        built.start_from(built.policy)
        segments, rewards = played(built)
        start = copy.deepcopy(built.policy)
        for _ in range(10):
            built.update(segments, rewards, 0.0)
        apart = [
            (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
            for p, q in zip(
                built._outputs(built.policy, segments.rows()), built._outputs(start, segments.rows()), strict=True
            )
        ]
        moved[clone_weight] = float(torch.stack(apart).mean().detach())
    assert moved[5.0] < 0.3 * moved[0.0]


@pytest.mark.parametrize("spec", [UNEVEN, CONTINUOUS])
def test_a_state_goes_on_to_the_same_bits(spec: EnvironmentSpec) -> None:
    one = build(spec)
    one.start_from(one.policy)
    segments, rewards = played(one)
    one.update(segments, rewards, 0.0)
    other = build(spec, seed=9)
    other.load_state({name: array.copy() for name, array in one.state().items()})
    for built in (one, other):
        built.update(segments, rewards, 0.5)
    assert one.policy.sha256() == other.policy.sha256()
    assert one.clone is not None
    assert other.clone is not None
    assert one.clone.sha256() == other.clone.sha256() != one.policy.sha256()


def test_a_better_continuous_action_becomes_likelier() -> None:
    settings = dataclasses.replace(
        SETTINGS, policy_learning_rate=0.01, clipped=dataclasses.replace(SETTINGS.clipped, clone_weight=0.01)
    )
    built = build(CONTINUOUS, settings=settings)
    built.start_from(built.policy)
    for seed in range(30):
        segments, _ = played(built, episodes=20, seed=seed)
        rewards = [-(segments.actions[0][segments.played][..., 0] - 0.5).abs(), torch.zeros(segments.num_steps, 1)]
        built.update(segments, rewards, 0.0)
    segments, _ = played(built, episodes=50, seed=99)
    assert float((segments.actions[0][segments.played][..., 0] - 0.5).abs().mean()) < 0.4


def test_a_loss_that_is_no_number_is_told() -> None:
    built = build()
    segments, rewards = played(built)
    rewards[0][0] = float("nan")
    with pytest.raises(NumericalError, match="loss is nan"):
        built.update(segments, rewards, 0.0)


@pytest.mark.parametrize("kind", ["bounds", "bfloat16"])
def test_ratios_begin_at_one_whatever_rounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An action near its bounds does not tell the number that was drawn, and bfloat16 has other logits."""
    settings = dataclasses.replace(SETTINGS, precision="bfloat16") if kind == "bfloat16" else SETTINGS
    built = build(CONTINUOUS if kind == "bounds" else UNEVEN, settings=settings)
    with torch.no_grad():
        for stack in built.policy.networks:
            for part in (stack.weights[-1], stack.biases[-1]):  # type: ignore[union-attr, index]
                part.mul_(3.0)
        if kind == "bounds":
            built.policy.networks[0].biases[-1][..., :2] = 8.0  # type: ignore[union-attr, index]
    segments, rewards = played(built)
    first: list[float] = []
    gain, loss = losses.clipped_gain, losses.clipped_loss

    def seen_gain(log_ratio: torch.Tensor, advantage: torch.Tensor, clip: float, weight: torch.Tensor) -> Any:
        first.append(float((log_ratio * (weight > 0)).abs().max()))
        return gain(log_ratio, advantage, clip, weight)

    def seen_loss(logits: torch.Tensor, number: torch.Tensor, old: torch.Tensor, *rest: Any) -> Any:
        now = torch.log_softmax(logits.float(), -1).gather(-1, number.unsqueeze(-1)).squeeze(-1)
        first.append(float(((now - old) * (rest[1] > 0)).abs().max()))
        return loss(logits, number, old, *rest)

    monkeypatch.setattr(losses, "clipped_gain", seen_gain)
    monkeypatch.setattr(losses, "clipped_loss", seen_loss)
    built.update(segments, rewards, 0.0)
    assert max(first[: len(built.layout.blocks)]) < 1e-5


def test_critics_learn_towards_what_was_earned_and_what_follows_in_units_of_the_horizon() -> None:
    """By loops. Without a context V needs nobody's actions, also in the last views."""
    built = build(context="none", settings=dataclasses.replace(SETTINGS, reward_offset=0.25))
    segments, rewards = played(built)
    segments = with_deaths(segments)
    settings, horizon = built.settings, 6.0  # 1 / (1 − γ) is 10, and an episode has 6 steps
    steps = built._look_back(segments, rewards)
    per_step = segments.spread(rewards)
    times, episodes = segments.active[0].shape[:2]
    for b, block in enumerate(built.layout.blocks):
        everything = JointRows(
            segments.observations,
            [torch.cat([a, a[:1] * 0]) for a in segments.actions],
            segments.active,
        ).map(lambda tensor: tensor.flatten(0, 1))
        with torch.no_grad():
            value = horizon * block.rows(built.critic(everything)[b]).unflatten(0, (times, episodes))
        wanted = torch.zeros(times - 1, episodes, block.num_agents)
        for e in range(episodes):
            for i in range(block.num_agents):
                ahead = 0.0
                for t in reversed(range(int(segments.played[:, e].sum()))):
                    lives = bool(segments.active[b][t + 1, e, i])
                    bootstrapped = lives and not bool(segments.terminated[t, e])
                    delta = float(per_step[b][t, e, i]) - 0.25 - float(value[t, e, i])
                    delta += settings.discount * float(value[t + 1, e, i]) * bootstrapped
                    goes_on = lives and t + 1 < int(segments.played[:, e].sum())
                    ahead = delta + settings.discount * settings.clipped.decay * ahead * goes_on
                    wanted[t, e, i] = float(value[t, e, i]) + ahead
        there = segments.of_rows(segments.active)[b]
        torch.testing.assert_close(steps.target[b][there], segments.of_rows([wanted])[0][there], atol=1e-4, rtol=1e-4)
    built._backward(steps, learn_policy=False)
    found = [p.grad.clone() for p in built.critic.parameters() if p.grad is not None]
    built.critic.zero_grad()
    loss = torch.zeros(())
    for b, (block, value) in enumerate(zip(built.layout.blocks, built.critic(steps.rows), strict=True)):
        error = (block.rows(value) - steps.target[b] / horizon) ** 2
        grid = block.grid(error * steps.rows.active[b])
        loss = loss + (grid.sum((1, 2)) / block.grid(steps.rows.active[b]).sum((1, 2)).clamp(min=1)).sum()
    loss.backward()
    for mine, parameter in zip(found, built.critic.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-4)


def test_in_the_last_view_the_others_do_what_their_policies_would(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(context="types")
    segments, _ = played(built)
    last = segments.played.sum(0), torch.arange(segments.played.shape[1])
    drawn = [torch.ones_like(active[last].long()) for active in segments.active]
    monkeypatch.setattr(built, "_draw", lambda views: drawn)
    with torch.no_grad():
        values = built._values(segments)
        rows = JointRows([o[last] for o in segments.observations], drawn, [a[last] for a in segments.active])
        for b, (block, value) in enumerate(zip(built.layout.blocks, built.critic(rows), strict=True)):
            torch.testing.assert_close(values[b][last], 6.0 * block.rows(value))


def test_async_policies_stay_near_the_learners_own_and_not_near_the_actors() -> None:
    built = build(lagging=True)
    segments, rewards = played(built)
    lagging = copy.deepcopy(segments)
    for column in lagging.log_probabilities:
        column += 3.0
    with torch.no_grad():
        own = built._log_probabilities(lagging.rows())
    for found, expected in zip(built._look_back(lagging, rewards).old_log_probability, own, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_update_is_epochs_times_parts_clipped_steps() -> None:
    for name in ("policy", "critic"):
        built = build(settings=dataclasses.replace(SETTINGS, **{f"{name}_gradient_norm": 1e-9}))
        segments, rewards = played(built)
        built.update(segments, rewards, 0.0)
        moments = [a for k, a in built._optimisers[name].arrays() if "exp_avg_sq" in k]
        assert moments, name
        assert max(float(np.abs(a).max()) for a in moments) < 1e-17, name
        steps = [int(a) for k, a in built._optimisers[name].arrays() if k.endswith("step")]
        assert set(steps) == {SETTINGS.clipped.epochs * SETTINGS.clipped.parts}


def test_rates_fall_on_the_way() -> None:
    """At the end of a run whose rates fall to 0 nothing moves."""
    built = build(settings=dataclasses.replace(SETTINGS, final_learning_rate=0.0))
    segments, rewards = played(built)
    before = built.policy.sha256(), copy.deepcopy(built.critic.state_dict())
    built.update(segments, rewards, 1.0)
    assert built.policy.sha256() == before[0]
    assert all(torch.equal(before[1][name], value) for name, value in built.critic.state_dict().items())
