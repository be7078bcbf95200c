"""Policies: masks, draws, parameters as arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bm3il.actors import gaussian
from bm3il.actors.policy import Policy, UniformPolicy, sample
from bm3il.protocol.layout import Layout, ParameterSharing
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.plain import observed, shown, to_rows

SPEC = EnvironmentSpec("toy", (TypeSpec("a", 3, 4, 3), TypeSpec("b", 2, 5, 2), TypeSpec("c", 1, 4, 3)), 5)


def build(sharing: ParameterSharing = "type", identity: bool = False, seed: int = 0) -> Policy:
    return Policy(Layout.of(SPEC, sharing, identity), (8,), torch.Generator().manual_seed(seed))


def view(episodes: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Observations, and masks that allow one to all actions."""
    random = np.random.default_rng(seed)
    observations, masks = [], []
    for t in SPEC.types:
        observations.append(random.normal(size=(episodes, t.count, t.observation_dim)).astype(np.float32))
        mask = random.random((episodes, t.count, t.action_dim)) < 0.4
        mask[..., 0] |= ~mask.any(axis=-1)
        masks.append(mask)
    return observations, masks


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("sharing", ["agent", "type"])
def test_forbidden_actions_are_never_taken(sharing: ParameterSharing, identity: bool, greedy: bool) -> None:
    observations, masks = view(500)
    actions = build(sharing, identity).act(shown(observations, masks), torch.Generator().manual_seed(0), greedy)
    for t, action, mask in zip(SPEC.types, actions, masks, strict=True):
        assert action.shape == (500, t.count)
        assert action.dtype == np.int64
        assert np.take_along_axis(mask, action[..., None], axis=-1).all()


def test_each_agent_acts_by_its_own_logits() -> None:
    """Greedy actions against the networks of the agents, one by one."""
    for sharing in ("agent", "type"):
        policy = build(sharing)
        observations, masks = view(20)
        actions = policy.act(shown(observations, masks), torch.Generator(), greedy=True)
        places = {0: (0, [0, 1, 2], 0), 1: (1, [0, 1], 0), 2: (0, [3], 1)}
        for m, (block, places_of_type, group_of_type) in places.items():
            network = policy.networks[block]
            for x, place in enumerate(places_of_type):
                group = place if sharing == "agent" else group_of_type
                for e in range(20):
                    hidden = torch.relu(
                        torch.tensor(observations[m][e, x]) @ network.weights[0][group] + network.biases[0][group, 0]
                    )
                    logits = (hidden @ network.weights[1][group] + network.biases[1][group, 0]).tolist()
                    allowed = [a for a in range(len(logits)) if masks[m][e, x, a]]
                    assert actions[m][e, x] == max(allowed, key=logits.__getitem__)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e9, 2.0]])
    drawn = sample(logits.expand(40_000, -1), torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, logits.softmax(-1)[0], rtol=0, atol=0.01)
    assert frequency[2] == 0


def test_the_same_generator_draws_the_same_actions() -> None:
    now, policy = shown(*view(50)), build()
    one, again, other = (policy.act(now, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_uniform_policy_draws_every_allowed_action_alike() -> None:
    masks = [np.tile(np.array([True, False, True]), (20_000, 1, 1))]
    spec = EnvironmentSpec("toy", (TypeSpec("a", 1, 2, 3),), 5)
    now = shown([np.zeros((20_000, 1, 2), np.float32)], masks)
    (actions,) = UniformPolicy(spec).act(now, torch.Generator().manual_seed(0))
    assert not (actions == 1).any()
    assert abs((actions == 0).mean() - 0.5) < 0.02


def test_an_identity_tells_agents_of_one_network_apart() -> None:
    observations, masks = view(1)
    observations[0][:] = 1.0
    masks[0][:] = True
    rows = Layout.of(SPEC, "type")
    for identity in (False, True):
        policy = build(identity=identity)
        block = rows.blocks[0]
        seen = observed(to_rows(rows, observations)[0], to_rows(rows, masks)[0])
        logits = policy.logits(0, block.see(seen))[0][0]
        assert torch.equal(logits[0], logits[1]) != identity


def test_parameters_travel_as_arrays() -> None:
    sent, received = build(seed=1), build(seed=2)
    arrays = sent.to_arrays()
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items()} == received.array_table()
    assert sent.sha256() != received.sha256()
    received.load_arrays(arrays)
    assert sent.sha256() == received.sha256()
    with torch.no_grad():
        next(sent.parameters()).add_(1)
    assert received.sha256() != sent.sha256()  # copies


def test_continuous_actions_stay_within_their_bounds() -> None:
    spec = EnvironmentSpec("toy", (TypeSpec("arm", 2, 3, 2, discrete=False), TypeSpec("leg", 1, 3, 2)), 5)
    policy = Policy(Layout.of(spec, "type"), (8,), torch.Generator().manual_seed(0))
    observations = [np.random.default_rng(0).normal(size=(400, t.count, 3)).astype(np.float32) for t in spec.types]
    now = shown(observations, [np.ones((400, t.count, 2), bool) for t in spec.types])
    for acts in (policy, UniformPolicy(spec)):
        arm, leg = acts.act(now, torch.Generator().manual_seed(0))
        assert (arm.shape, arm.dtype, leg.dtype) == ((400, 2, 2), np.float32, np.int64)
        assert 0.5 < np.abs(arm).max() <= 1
        assert abs(arm.mean()) < 0.3
    greedy = policy.act(now, torch.Generator(), greedy=True)[0]
    np.testing.assert_array_equal(greedy, policy.act(now, torch.Generator(), greedy=True)[0])


def test_it_tells_how_likely_its_actions_were() -> None:
    spec = EnvironmentSpec("toy", (TypeSpec("arm", 2, 3, 2, discrete=False), TypeSpec("leg", 3, 3, 4)), 5)
    policy = Policy(Layout.of(spec, "type"), (8,), torch.Generator().manual_seed(0))
    observations = [np.random.default_rng(0).normal(size=(50, t.count, 3)).astype(np.float32) for t in spec.types]
    masks = [np.ones((50, t.count, t.action_dim), bool) for t in spec.types]
    masks[1][:, :, 0] = False
    now = shown(observations, masks)
    for greedy in (False, True):
        actions, chances = policy.decide(now, torch.Generator().manual_seed(1), greedy)
        for acted, again in zip(actions, policy.act(now, torch.Generator().manual_seed(1), greedy), strict=True):
            np.testing.assert_array_equal(acted, again)
        blocks = zip(policy.layout.blocks, observations, masks, strict=True)
        arm, leg = (block.see(observed(torch.as_tensor(o), torch.as_tensor(m))) for block, o, m in blocks)
        density = gaussian.log_density(
            policy.outputs(0, arm), policy.layout.blocks[0].grid(torch.as_tensor(actions[0]))
        )
        torch.testing.assert_close(density[0].mT, torch.as_tensor(chances[0]), atol=1e-3, rtol=1e-3)
        allowed = policy.outputs(1, leg)[0, ..., 1:].transpose(0, 1).log_softmax(-1)
        wanted = allowed.gather(-1, torch.as_tensor(actions[1]).unsqueeze(-1) - 1).squeeze(-1)
        torch.testing.assert_close(wanted, torch.as_tensor(chances[1]))
