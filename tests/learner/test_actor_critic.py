"""A whole update against loops, and what must hold of its state."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.learner import actor_critic, few_actions, mixture
from bm3il.learner.actor_critic import ActorCritic, Schedule
from bm3il.learner.critics import Context, Critic
from bm3il.learner.figures import Figures
from bm3il.learner.replay import Batch
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.layout import JointRows, Layout, ParameterSharing
from bm3il.protocol.networks import stacked
from bm3il.protocol.observations import Observations
from tests.learner.slow_reference import agents_of, log_policy, q_values, random_batch, spec_of
from tests.plain import observed

HIDDEN, HEADS = 8, 2
UNEVEN = spec_of((3, 4, 3), (2, 5, 2), (1, 4, 3))
UNEVEN_LAYOUTS = {sharing: Layout.of(UNEVEN, sharing) for sharing in ("agent", "type")}
SETTINGS = LearnerSettings(hidden=HIDDEN, heads=HEADS, discount=0.9, reward_offset=0.25, temperature=0.3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(
    sharing: ParameterSharing = "type", context: Context = "types", settings: LearnerSettings = SETTINGS, seed: int = 0
) -> ActorCritic:
    layout = Layout.of(UNEVEN, sharing)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(layout, (HIDDEN,), generator)
    critic = Critic(layout, context, HIDDEN, HEADS, True, generator)
    built = ActorCritic(policy, critic, settings, torch.device("cpu"), seed)
    for target in (built.target_policy, built.target_critic):  # as after some training: not equal to the trained ones
        for parameter in target.parameters():
            parameter.data.mul_(0.8)
    return built


def gradients(built: ActorCritic, batch: Batch, patch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The gradients of an update before they are clipped and applied."""
    patch.setattr(ActorCritic, "_step", lambda *_: None)
    built.update(batch, batch.rewards, 0.0)
    networks = (("policy", built.policy), ("critic", built.critic))
    return {f"{name}.{key}": p.grad for name, network in networks for key, p in network.named_parameters()}


def slow_loss(built: ActorCritic, batch: Batch, next_actions: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 8, 10 and the expectation of Eq. 13's score function, one row and agent at a time."""
    settings, everybody = built.settings, agents_of(built.layout)
    following = JointRows(batch.next_observations, next_actions, batch.next_active)
    losses, rows_of = {}, {}
    for agent in everybody:
        for row in range(len(batch.rows)):
            if not batch.rows.active[agent.block][row, agent.place]:
                continue
            q = q_values(built.critic, batch.rows, HEADS, True, row, agent)
            target = float(batch.rewards[agent.block][row, agent.place]) - settings.reward_offset
            if batch.next_active[agent.block][row, agent.place] and not batch.terminated[row]:
                next_q = q_values(built.target_critic, following, HEADS, True, row, agent)
                next_log = log_policy(built.target_policy, batch.next_observations, row, agent)
                for a, log in enumerate(next_log):
                    if log is not None:
                        value = next_q[a] - settings.temperature * log
                        target += settings.discount * float(log.exp() * value)
            taken = int(batch.rows.actions[agent.block][row, agent.place])
            loss = (q[taken] - target) ** 2
            log = log_policy(built.policy, batch.rows.observations, row, agent)
            p = {a: float(v.detach().exp()) for a, v in enumerate(log) if v is not None}
            baseline = sum(p[a] * float(q[a].detach()) for a in p)
            for a in p:
                gain = settings.temperature * math.log(p[a]) - (float(q[a].detach()) - baseline)
                loss = loss + p[a] * log[a] * gain
            network = (agent.block, agent.group)
            losses[network] = losses.get(network, 0.0) + loss
            rows_of[network] = rows_of.get(network, 0) + 1
    return sum(losses[network] / rows_of[network] for network in losses)


@pytest.mark.parametrize("sharing", ["agent", "type"])
@pytest.mark.parametrize("context", ["types", "agents", "none"])
def test_gradients_are_those_of_the_equations(
    sharing: ParameterSharing, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, batch = build(sharing, context), random_batch(UNEVEN_LAYOUTS[sharing], 6, seed=1)
    drawn: list[torch.Tensor] = []
    original = actor_critic.draw

    def recording(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(original(logits, generator))
        return drawn[-1]

    monkeypatch.setattr(actor_critic, "draw", recording)
    fast = gradients(built, batch, monkeypatch)
    next_actions = [block.joint(actions) for block, actions in zip(built.layout.blocks, drawn, strict=True)]
    for network in (built.policy, built.critic, built.target_policy, built.target_critic):
        network.zero_grad()
        network.double()
    torch.set_default_dtype(torch.float64)
    try:
        slow_loss(built, _double(batch), next_actions).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    slow = {f"policy.{key}": p.grad for key, p in built.policy.named_parameters()}
    slow |= {f"critic.{key}": p.grad for key, p in built.critic.named_parameters()}
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient.double(), slow[name], rtol=1e-4, atol=1e-6, msg=name)


def _double(batch: Batch) -> Batch:
    now, following = (
        [observed(seen.dense().double(), seen.masks()) for seen in observations]
        for observations in (batch.rows.observations, batch.next_observations)
    )
    return dataclasses.replace(
        batch, rows=dataclasses.replace(batch.rows, observations=now), next_observations=following
    )


def _moved(seen: Observations) -> Observations:
    """Other observations, with the same masks."""
    return observed(seen.dense() + 1, seen.masks())


def test_row_blocks_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are terminated, so that nothing depends on the order in which actions are drawn."""
    batch = dataclasses.replace(random_batch(UNEVEN_LAYOUTS["type"], 100, 2), terminated=torch.ones(100).bool())
    whole = gradients(build(), batch, monkeypatch)
    monkeypatch.setattr(ActorCritic, "_chunk_rows", lambda self, size: 37)
    for name, gradient in gradients(build(), batch, monkeypatch).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_tiles_do_not_change_the_gradient(sharing: ParameterSharing, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(UNEVEN_LAYOUTS[sharing], 50, 2)
    whole = gradients(build(sharing), batch, monkeypatch)
    for module in (stacked, mixture, few_actions):
        monkeypatch.setattr(module, "TILE_NUMBERS", 7 * HIDDEN)
    for name, gradient in gradients(build(sharing), batch, monkeypatch).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_value_of_what_follows_counts_unless_the_row_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(UNEVEN_LAYOUTS["type"], 8, 3)
    changed = dataclasses.replace(batch, next_observations=[_moved(seen) for seen in batch.next_observations])
    for terminated, same in ((torch.ones(8).bool(), True), (torch.zeros(8).bool(), False)):
        one, other = (
            gradients(build(), dataclasses.replace(b, terminated=terminated), monkeypatch) for b in (batch, changed)
        )
        assert all(torch.equal(one[name], other[name]) for name in one) == same


def test_an_agent_that_dies_is_not_bootstrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward of its last step is all that its target holds, whatever its next observation says."""
    batch = dataclasses.replace(random_batch(UNEVEN_LAYOUTS["type"], 8, 4), terminated=torch.zeros(8).bool())
    batch.next_active[1][:] = False
    first, second = batch.next_observations
    changed = dataclasses.replace(batch, next_observations=[first, _moved(second)])
    one, other = (gradients(build(), b, monkeypatch) for b in (batch, changed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_inactive_agents_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(UNEVEN_LAYOUTS["type"], 8, 5)
    batch.rows.active[1][:] = False
    result = gradients(build(context="none"), batch, monkeypatch)
    silent = [name for name in result if ".1." in name]
    assert len(silent) >= 6
    assert all((result[name] == 0).all() for name in silent)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_inputs_give_the_same_bits(precision: str) -> None:
    settings = dataclasses.replace(SETTINGS, precision=precision)
    batch = random_batch(UNEVEN_LAYOUTS["agent"], 64, 6)
    states = []
    for _ in range(2):
        built = build("agent", settings=settings)
        for number in range(3):
            built.update(batch, batch.rewards, number / 3)
        states.append(built.state())
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_restored_state_goes_on_bit_by_bit() -> None:
    batch = random_batch(UNEVEN_LAYOUTS["type"], 32, 7)
    straight = build()
    straight.update(batch, batch.rewards, 0.1)
    saved = {name: array.copy() for name, array in straight.state().items()}
    straight.update(batch, batch.rewards, 0.2)
    resumed = build(seed=9)
    resumed.load_state(saved)
    resumed.update(batch, batch.rewards, 0.2)
    expected, found = straight.state(), resumed.state()
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_loss_that_is_not_finite_is_told_when_it_is_read() -> None:
    batch = random_batch(UNEVEN_LAYOUTS["type"], 16, 8)
    figures = Figures()
    figures.add(build().update(batch, [torch.full_like(r, float("nan")) for r in batch.rewards], 0.0))
    with pytest.raises(NumericalError, match="critic_loss"):
        figures.means()


def test_targets_move_by_their_rate() -> None:
    batch = random_batch(UNEVEN_LAYOUTS["type"], 16, 9)
    built = build()
    before = [p.clone() for p in built.target_critic.parameters()]
    built.update(batch, batch.rewards, 0.0)
    for old, target, trained in zip(before, built.target_critic.parameters(), built.critic.parameters(), strict=True):
        expected = old + SETTINGS.target_rate * (trained.detach() - old)
        torch.testing.assert_close(target, expected)


def test_bfloat16_products_give_nearly_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = dataclasses.replace(random_batch(UNEVEN_LAYOUTS["agent"], 200, 10), terminated=torch.ones(200).bool())
    exact = gradients(build("agent"), batch, monkeypatch)
    rounded = gradients(
        build("agent", settings=dataclasses.replace(SETTINGS, precision="bfloat16")), batch, monkeypatch
    )
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, name


def test_draws_follow_the_softmax_and_never_take_a_forbidden_action() -> None:
    logits = torch.tensor([[-1e9, 0.0, 1.0, -1e9, 2.0, -1e9]])
    drawn = actor_critic.draw(logits.expand(40_000, -1), torch.rand(40_000, generator=torch.Generator().manual_seed(0)))
    frequency = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(frequency, logits.softmax(-1)[0], rtol=0, atol=0.01)
    assert (frequency[[0, 3, 5]] == 0).all()


def test_a_forbidden_first_action_is_not_drawn_by_a_zero() -> None:
    assert actor_critic.draw(torch.tensor([[-1e9, -1e9, 1.0, 2.0]]), torch.zeros(1)).tolist() == [2]


def test_schedule_falls_geometrically_then_stays() -> None:
    settings = LearnerSettings(temperature=0.4, final_temperature=0.1, temperature_anneal=0.5, final_learning_rate=0.2)
    assert Schedule.at(0.0, settings) == Schedule(0.4, 1.0)
    assert Schedule.at(0.25, settings).temperature == pytest.approx(0.2)
    assert Schedule.at(0.5, settings).temperature == pytest.approx(0.1)
    assert Schedule.at(1.0, settings).temperature == pytest.approx(0.1)
    assert Schedule.at(0.5, settings).learning_rate == pytest.approx(0.6)
