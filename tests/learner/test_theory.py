"""The paper's theorems, on functions and games small enough to know the answer.

Theorem 3.1, as reconstructed: let Q^i(s, a) = Σ_m α_m (1/X_m) Σ_{j of type m} q(a^i, a^j), α on the simplex and q
K-Lipschitz in a^j, and Q^i(s, a^i, ã) = Σ_m α_m q(a^i, ā_m) with the types' mean actions ā_m. If no action is farther
than ε from the mean of its type, every term differs by at most K ε, and so does their average:
|Q(s, a) − Q(s, a^i, ã)| ≤ K ε.

Theorem 3.2: the mean-field iteration with a Boltzmann policy that is greedy in the limit with infinite exploration ends
within that bound of the Nash values, added up over the horizon: K ε / (1 − γ). In the games below agents of a type play
alike in equilibrium, so ε = 0 there, and what is left is the error of a finite number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.mean_field import mean_actions
from protocol.layout import Layout
from protocol.specs import EnvironmentSpec, TypeSpec

Pairwise = Callable[[np.ndarray], np.ndarray]


def lipschitz(random: np.random.Generator, width: int, constant: float) -> Pairwise:
    """A convex piecewise linear function of points [..., width] with slopes of length `constant` at most."""
    slopes = random.normal(size=(5, width))
    slopes *= constant * random.uniform(0, 1, (5, 1)) / np.linalg.norm(slopes, axis=1, keepdims=True)
    offsets = random.normal(size=5)
    return lambda points: (points @ slopes.T + offsets).max(axis=-1)


def type_means(actions: list[np.ndarray]) -> list[np.ndarray]:
    """ā_m by the learner's own code, from continuous actions [X_m, A] per type."""
    width = actions[0].shape[1]
    types = tuple(TypeSpec(f"type{m}", len(a), 1, width, discrete=False) for m, a in enumerate(actions))
    (block,) = Layout.of(EnvironmentSpec("any", types, 1), "type").blocks
    rows = torch.tensor(np.concatenate(actions)[None])
    means, present = mean_actions(block, rows, torch.ones(rows.shape[:2], dtype=torch.bool))
    assert present.all()
    return list(means[0].numpy())


def deviation_and_spread(actions: list[np.ndarray], weights: np.ndarray, q: Pairwise) -> tuple[float, float]:
    """|Q(s, a) − Q(s, a^i, ã)|, and ε."""
    means = type_means(actions)
    exact = sum(w * q(a).mean() for w, a in zip(weights, actions, strict=True))
    approximate = sum(w * q(mean) for w, mean in zip(weights, means, strict=True))
    spread = max(np.linalg.norm(a - mean, axis=1).max() for a, mean in zip(actions, means, strict=True))
    return abs(float(exact - approximate)), float(spread)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    width=st.integers(1, 4),
    constant=st.floats(0.01, 10),
)
def test_theorem_3_1_the_mean_field_errs_by_at_most_k_epsilon(
    seed: int, counts: list[int], width: int, constant: float
) -> None:
    random = np.random.default_rng(seed)
    actions = [random.uniform(-1, 1, (count, width)).astype(np.float32) for count in counts]
    weights = random.dirichlet(np.ones(len(counts)))
    deviation, spread = deviation_and_spread(actions, weights, lipschitz(random, width, constant))
    assert deviation <= constant * spread + 1e-5 * (1 + constant)


def test_the_bound_is_tight_and_needs_its_assumption() -> None:
    actions = [np.array([[-0.5], [0.5]], np.float32), np.zeros((3, 1), np.float32)]
    weights = np.array([1.0, 0.0])
    deviation, spread = deviation_and_spread(actions, weights, lambda x: 3 * np.abs(x[..., 0]))
    assert deviation == pytest.approx(3 * spread)
    steeper, _ = deviation_and_spread(actions, weights, lambda x: 4 * np.abs(x[..., 0]))
    assert steeper > 3 * spread


class Game:
    """A Markov game of two types, two actions. Agents differ by type only; a state may lead to another one.

    The reward of an agent of type m in state s that does a, where f_k is the part of the agents of type k that do 1, is
    base[s, m, a] + Σ_k pull[s, m, a, k] f_k; the next state is 1 with probability of the part of all agents that do 1.
    """

    counts = (2, 3)
    discount = 0.6

    def __init__(self, states: int) -> None:
        self.states = states
        self.type_of_agent = np.repeat([0, 1], self.counts)
        self.base = np.array([[[0.0, 1.0], [0.5, 0.0]], [[1.0, 0.2], [0.0, 0.8]]])[:states]
        self.pull = np.array(
            [
                [[[0.2, 0.1], [0.4, -0.2]], [[0.1, 0.3], [0.2, 0.1]]],
                [[[0.3, 0.0], [0.1, 0.2]], [[0.2, 0.2], [0.1, 0.4]]],
            ]
        )[:states]

    def fractions(self, joint: np.ndarray) -> np.ndarray:
        return np.array([joint[self.type_of_agent == m].mean() for m in (0, 1)])

    def rewards(self, state: int, joint: np.ndarray) -> np.ndarray:
        own = self.base[state, self.type_of_agent, joint]
        return own + self.pull[state, self.type_of_agent, joint] @ self.fractions(joint)

    def next_one(self, joint: np.ndarray) -> float:
        """The probability that the next state is 1."""
        return float(joint.mean()) if self.states == 2 else 0.0

    def nash(self) -> tuple[np.ndarray, np.ndarray]:
        """Values [states, agents] and actions [states, agents] of the one pure equilibrium, by enumeration of all
        joint actions within value iteration. Fails if a stage has not exactly one."""
        agents = len(self.type_of_agent)
        value, play = np.zeros((self.states, agents)), np.zeros((self.states, agents), int)
        for _ in range(200):
            updated = np.empty_like(value)
            for state in range(self.states):
                found = []
                for joint in map(np.array, product((0, 1), repeat=agents)):
                    payoff = self.payoff(state, joint, value)
                    deviations = [np.where(np.arange(agents) == i, 1 - joint, joint) for i in range(agents)]
                    if all(self.payoff(state, d, value)[i] <= payoff[i] for i, d in enumerate(deviations)):
                        found.append((joint, payoff))
                assert len(found) == 1, f"state {state} has {len(found)} pure equilibria"
                play[state], updated[state] = found[0]
            value = updated
        return value, play

    def payoff(self, state: int, joint: np.ndarray, value: np.ndarray) -> np.ndarray:
        following = value[0]
        if self.states == 2:
            following = value[0] + self.next_one(joint) * (value[1] - value[0])
        return self.rewards(state, joint) + self.discount * following


def mean_field_iteration(game: Game, steps: int, seed: int) -> np.ndarray:
    """Q of type m, tabular: [states, m, own action, count of 1 in type 0, in type 1]; returns the values [states, N].

    Everybody draws from the Boltzmann policy over Q at the types' mean actions seen last in that state, with a
    temperature that falls and a floor of exploration that falls too; each entry learns with the rate of its visits.
    """
    random = np.random.default_rng(seed)
    shape = (game.states, 2, 2, game.counts[0] + 1, game.counts[1] + 1)
    q, visits = np.zeros(shape), np.zeros(shape)
    seen = np.zeros((game.states, 2), int)
    value = np.zeros((game.states, 2))
    state = 0
    for step in range(steps):
        temperature, explore = max(0.02, 2 * 0.9995**step), 1 / (1 + step / 300)
        preference = q[state, :, 1, seen[state, 0], seen[state, 1]] - q[state, :, 0, seen[state, 0], seen[state, 1]]
        chance = 1 / (1 + np.exp(-np.clip(preference / temperature, -50, 50)))
        chance = (1 - explore) * chance + explore / 2
        joint = (random.random(len(game.type_of_agent)) < chance[game.type_of_agent]).astype(int)
        counts = np.array([joint[game.type_of_agent == m].sum() for m in (0, 1)])
        following = int(random.random() < game.next_one(joint))
        rewards = game.rewards(state, joint)
        for agent, m in enumerate(game.type_of_agent):
            entry = (state, m, joint[agent], counts[0], counts[1])
            visits[entry] += 1
            rate = 1 / visits[entry] ** 0.7
            q[entry] += rate * (rewards[agent] + game.discount * value[following, m] - q[entry])
        seen[state] = counts
        here = q[state, :, :, counts[0], counts[1]]
        share = np.stack([1 - chance, chance], axis=1)
        value[state] += 0.05 * ((share * here).sum(axis=1) - value[state])
        state = following
    return value[:, game.type_of_agent]


@pytest.mark.parametrize("states", [1, 2])
def test_theorem_3_2_the_iteration_ends_at_the_nash_values(states: int) -> None:
    game = Game(states)
    nash, play = game.nash()
    for m in (0, 1):  # all of a type play alike: ε = 0
        assert len(np.unique(play[:, game.type_of_agent == m], axis=1).T) == 1
    found = mean_field_iteration(game, 20_000, seed=states)
    scale = np.abs(nash).max()
    np.testing.assert_allclose(found, nash, atol=0.05 * scale)
