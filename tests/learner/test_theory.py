"""The paper's theorems, on functions and games small enough to know the answer, by the learner's own parts.

Theorem 3.1. What is assumed:

- Q^i(s, a) = Σ_m α_m (1/X_m) Σ_{j of type m} Q^{ij}(s, a^i, a^j), over the others j ≠ i, α on the simplex;
- every Q^{ij} is K-Lipschitz in a^j;
- ã^i = Σ_m α_m ā_m, with the same α and the types' mean actions ā_m;
- (1/X_m) Σ_j |a^j − ã^i| ≤ δ_m, and Σ_m α_m δ_m ≤ ε.

Then |Q^i(s, a) − Q^i(s, a^i, ã^i)| ≤ K ε, where Q^i(s, a^i, ã^i) has ã^i in the place of every a^j.

Theorem 3.2. What is assumed: every stage has one equilibrium; the policies are greedy in the limit with infinite
exploration; the critics can say what Q is. Then Q ends within K ε / (1 − γ) of the Nash-Q. In the games below all
agents do the same in equilibrium, so ε = 0. What is left is the temperature at which a run ends, which adds at most
temperature · log A / (1 − γ), and that a run does end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.actors.policy import Policy
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.critics import Attention, Context, Critic
from bm3il.learner.replay import Batch
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from tests.learner.slow_reference import one_hot
from tests.plain import seen_by, to_rows

Pairwise = Callable[[torch.Tensor], torch.Tensor]
"""Q^{ij}(s, a^i, ·) of one pair: points [width] → a number."""


@dataclass(frozen=True)
class View:
    """What the first agent sees: α_m, ã, and the other agents' action vectors, type by type."""

    weights: list[float]
    mean_field: torch.Tensor
    others: list[list[torch.Tensor]]

    def distances(self) -> list[float]:
        """The least δ_m: mean distances from ã, 0 where there is nobody."""
        return [
            float(sum((a - self.mean_field).norm() for a in of_m)) / len(of_m) if of_m else 0.0 for of_m in self.others
        ]

    def epsilon(self) -> float:
        """The least ε."""
        return sum(w * delta for w, delta in zip(self.weights, self.distances(), strict=True))

    def deviation(self, q: Callable[[int, int], Pairwise]) -> float:
        """|Q^i(s, a) − Q^i(s, a^i, ã)|, where q(m, j) is the pairwise Q for the j-th other agent of type m."""
        total = 0.0
        for m, (weight, of_m) in enumerate(zip(self.weights, self.others, strict=True)):
            for j, action in enumerate(of_m):
                total += weight / len(of_m) * float(q(m, j)(action) - q(m, j)(self.mean_field))
        return abs(total)


def view(counts: list[int], width: int, discrete: bool, context: Context, seed: int) -> View:
    """By the learner's attention, with embeddings and values that leave actions as they are; actions are random."""
    types = tuple(TypeSpec(f"type{m}", count, 1, width, discrete) for m, count in enumerate(counts))
    layout = Layout.of(EnvironmentSpec("any", types, 1), "type")
    (block,) = layout.blocks
    generator = torch.Generator().manual_seed(seed)
    attention = Attention(layout, context, width, 1, True, generator)
    with torch.no_grad():
        attention.value.copy_(torch.eye(width))
        attention.embeddings[0].weights[0].copy_(torch.eye(width).expand(len(counts), -1, -1))
        attention.embeddings[0].biases[0].zero_()
    if discrete:
        actions = torch.randint(width, (1, block.num_agents), generator=generator)
        vectors = [one_hot(int(a), width) for a in actions[0]]
    else:
        actions = torch.rand(1, block.num_agents, width, generator=generator) * 2 - 1
        vectors = list(actions[0])
    rows = JointRows([torch.zeros(1, block.num_agents, 1)], [actions], [torch.ones(1, block.num_agents).bool()])
    encoded = [3 * torch.randn(block.groups, block.slots, width, generator=generator)]
    first = np.cumsum([0, *counts])
    others = [vectors[max(1, start) : start + count] for start, count in zip(first, counts, strict=False)]
    with torch.no_grad():
        weights, (mixed,) = attention.weights(encoded, rows), attention(encoded, rows)
    if weights is None:
        present = sum(len(of_m) > 0 for of_m in others)
        return View([1 / present if of_m else 0.0 for of_m in others], mixed[0, 0], others)
    return View(weights[0, 0].tolist(), mixed[0, 0], others)


def lipschitz(random: np.random.Generator, width: int, constant: float) -> Pairwise:
    """A convex piecewise linear function with slopes of length `constant` at most."""
    slopes = random.normal(size=(5, width))
    slopes *= constant * random.uniform(0, 1, (5, 1)) / np.linalg.norm(slopes, axis=1, keepdims=True)
    a, b = torch.tensor(slopes), torch.tensor(random.normal(size=5))
    return lambda point: (a @ point + b).max()


def cone(constant: float, tip: torch.Tensor) -> Pairwise:
    """As steep as `constant` allows in every direction from the tip."""
    return lambda point: constant * (point - tip).norm()


@pytest.mark.usefixtures("float64")
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    width=st.integers(2, 4),
    discrete=st.booleans(),
    context=st.sampled_from(["types", "uniform_types"]),
    constant=st.floats(0.01, 10),
)
def test_theorem_3_1_the_mean_field_errs_by_at_most_k_epsilon(
    seed: int, counts: list[int], width: int, discrete: bool, context: Context, constant: float
) -> None:
    if sum(counts) == 1:
        return  # nobody else is there
    seen = view(counts, width, discrete, context, seed)
    assert sum(seen.weights) == pytest.approx(1)
    expected = sum(
        (w * sum(of_m) / len(of_m) for w, of_m in zip(seen.weights, seen.others, strict=True) if of_m),
        start=torch.zeros(width),
    )
    torch.testing.assert_close(seen.mean_field, expected, rtol=1e-9, atol=1e-12)
    random = np.random.default_rng(seed)
    pairs = [[lipschitz(random, width, constant) for _ in of_m] for of_m in seen.others]
    assert seen.deviation(lambda m, j: pairs[m][j]) <= constant * seen.epsilon() + 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("discrete", [False, True])
def test_the_bound_is_tight_and_needs_its_assumptions(discrete: bool) -> None:
    seen, constant = view([3, 2, 4], 3, discrete, "types", seed=2), 2.0
    bound = constant * seen.epsilon()
    assert seen.deviation(lambda m, j: cone(constant, seen.mean_field)) == pytest.approx(bound)

    def breaks(case: View, steepness: float, bound: float) -> bool:
        return case.deviation(lambda m, j: cone(steepness, case.mean_field)) > bound + 1e-6

    assert breaks(seen, 1.1 * constant, bound)  # a Q that is not K-Lipschitz
    narrow = [min(seen.distances())] * 3  # one type that is farther off than its δ
    assert breaks(seen, constant, constant * sum(w * d for w, d in zip(seen.weights, narrow, strict=True)))
    order = np.argsort(seen.distances())
    weights = np.empty(3)
    weights[order] = sorted(seen.weights, reverse=True)  # an ε of other weights than those of Q
    assert breaks(seen, constant, constant * float(weights @ seen.distances()))
    elsewhere = View(seen.weights, seen.mean_field + 1, seen.others)  # an ã that is not the types' weighed mean
    assert breaks(elsewhere, constant, bound)


class Game:
    """A Markov game of two types, two agents and two actions each; `states` is 1 (the stage repeats itself) or 2.

    An agent of type m that does a in state s gets base[s, m, a] + pull[s, m, a] · f, where f is the part of the *other*
    agents of type 0 that do 1. The next state is 1 with the probability of the part of all agents that do 1.
    In state 0 it is best for type 0 to do 1 whatever the others do, and then for type 1 too; state 1 is its mirror.
    """

    discount = 0.6
    type_of_agent = np.array([0, 0, 1, 1])
    base = np.array([[[0.0, 0.5], [0.6, 0.0]], [[0.8, 0.0], [1.0, 0.4]]])
    pull = np.array([[[0.2, 0.4], [0.0, 1.0]], [[0.2, 0.1], [-0.9, 0.0]]])

    def __init__(self, states: int) -> None:
        self.states = states
        types = tuple(TypeSpec(f"type{m}", 2, states, 2) for m in (0, 1))
        self.spec = EnvironmentSpec("game", types, 100)

    def rewards(self, state: np.ndarray, joint: np.ndarray) -> np.ndarray:
        """state [B], joint actions [B, 4] → [B, 4]."""
        own_type = self.type_of_agent == 0
        others_of_0 = joint[:, own_type].sum(1, keepdims=True) - joint * own_type
        fraction = others_of_0 / np.where(own_type, 1, 2)
        where = (state[:, None], self.type_of_agent, joint)
        return self.base[where] + self.pull[where] * fraction

    def next_one(self, joint: np.ndarray) -> np.ndarray:
        """The probability that the next state is 1."""
        return joint.mean(-1) * (self.states == 2)

    def payoff(self, state: int, joint: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Of every agent [4], with the values [states, 4] of what follows."""
        following = value[0] + self.next_one(joint) * (value[-1] - value[0])
        return self.rewards(np.array([state]), joint[None])[0] + self.discount * following

    def deviations(self, state: int, joint: np.ndarray, value: np.ndarray) -> np.ndarray:
        """[4, 2]: what an agent gets for each of its actions, if the others do what the joint action says."""
        agents = range(len(joint))
        changed = [[np.where(np.arange(len(joint)) == i, a, joint) for a in (0, 1)] for i in agents]
        return np.array([[self.payoff(state, changed[i][a], value)[i] for a in (0, 1)] for i in agents])

    def nash(self) -> tuple[np.ndarray, np.ndarray]:
        """Nash-Q [states, 4, 2] of every own action against the others' equilibrium, and the actions [states, 4] of the
        one pure equilibrium, by enumeration of all joint actions within value iteration.

        Fails if a stage has not exactly one.
        """
        value = np.zeros((self.states, 4))
        play = np.zeros((self.states, 4), int)
        for _ in range(100):
            for state in range(self.states):
                found = []
                for joint in map(np.array, product((0, 1), repeat=4)):
                    q = self.deviations(state, joint, value)
                    if (q[range(4), joint] >= q.max(1)).all():
                        found.append(joint)
                assert len(found) == 1, f"state {state} has {len(found)} pure equilibria"
                play[state] = found[0]
            value = np.array([self.payoff(state, play[state], value) for state in range(self.states)])
        return np.array([self.deviations(state, play[state], value) for state in range(self.states)]), play


UPDATES, ROWS = 400, 64
LEARNING = LearnerSettings(
    hidden=16,
    heads=2,
    policy="boltzmann",
    discount=Game.discount,
    target_rate=0.1,
    policy_learning_rate=1e-2,
    critic_learning_rate=1e-2,
    final_learning_rate=0.05,
    temperature=1.0,
    final_temperature=0.02,
)


def learn(game: Game, settings: LearnerSettings, seed: int) -> ActorCritic:
    """Updates on fresh rows, each a step of 64 games that go on side by side.

    Everybody follows its policy, but for a part of random actions that falls to a fiftieth: every own action goes on
    being tried against what the others do.
    """
    layout = Layout.of(game.spec, "type")
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    critic = Critic(layout, "types", settings.hidden, settings.heads, True, generator)
    learner = ActorCritic(Policy(layout, (16,), generator), critic, settings, torch.device("cpu"), seed)
    state = random.integers(game.states, size=ROWS)
    for number in range(UPDATES):
        progress = number / UPDATES
        observations = seen_by(layout, to_rows(layout, observe(game, state)))
        joint = np.concatenate(learner.policy.choose(observations, generator)[0], axis=1)
        explores = random.random(joint.shape) < max(0.02, 1 - 1.5 * progress)
        joint = np.where(explores, random.integers(2, size=joint.shape), joint)
        following = (random.random(ROWS) < game.next_one(joint)).astype(int)
        rewards = to_rows(layout, np.split(game.rewards(state, joint).astype(np.float32), 2, axis=1))
        active = [torch.ones(ROWS, 4, dtype=torch.bool)]
        batch = Batch(
            rows=JointRows(observations, [torch.from_numpy(joint)], active),
            next_observations=seen_by(layout, to_rows(layout, observe(game, following))),
            next_active=active,
            rewards=rewards,
            terminated=torch.zeros(ROWS, dtype=torch.bool),
        )
        learner.update(batch, rewards, progress)
        state = following
    return learner


def observe(game: Game, state: np.ndarray) -> list[np.ndarray]:
    """Observations of both types [B, 2, states]: the state, one-hot."""
    return [np.eye(game.states, dtype=np.float32)[state][:, None].repeat(2, axis=1)] * 2


def errors(game: Game, learner: ActorCritic) -> tuple[float, float]:
    """The largest error of Q against the others' equilibrium, and the least probability of playing it."""
    nash, play = game.nash()
    layout = learner.layout
    observations = to_rows(layout, observe(game, np.arange(game.states)))
    active = [torch.ones(game.states, 4, dtype=torch.bool)]
    (block,) = layout.blocks
    with torch.no_grad():
        seen = seen_by(layout, observations)
        (q,) = learner.critic(JointRows(seen, [torch.from_numpy(play)], active))
        logits = learner.policy.outputs(0, block.see(seen[0]))
    chance = block.rows(logits).softmax(-1).gather(-1, torch.from_numpy(play).unsqueeze(-1))
    return float(np.abs(block.rows(q).numpy() - nash).max()), float(chance.min())


@pytest.mark.parametrize("states", [1, 2])
def test_theorem_3_2_critics_and_boltzmann_policies_end_at_the_nash_q(states: int) -> None:
    torch.set_num_threads(1)
    game = Game(states)
    play = game.nash()[1]
    assert (play == play[:, :1]).all()  # everybody does the same: ε = 0
    error, chance = errors(game, learn(game, LEARNING, seed=states))
    softness = LEARNING.final_temperature * np.log(2) / (1 - game.discount)
    assert error <= softness
    assert chance > 0.95
